"""What a store's runs have seen of a capacity pool, as a record that the policies begin with."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from holdfast.drivers.protocol import CapacityPool
from holdfast.market.history import Life
from holdfast.placement.situation import UNSEEN, Seen

SEEN_FOR = timedelta(days=7)
TICK_SECONDS = 60.0


def seen_of(lives: Iterable[Life], pool: CapacityPool, now: datetime) -> Seen | None:
    """Of the week that ends now. While a machine lived the pool had one to give; where one was refused or taken, it had none.

    None: nobody looked.
    """
    ticks = int(SEEN_FOR.total_seconds() / TICK_SECONDS)
    begin = now - SEEN_FOR
    record = bytearray([UNSEEN]) * ticks

    def tick(at: datetime) -> int:
        return min(int((at - begin).total_seconds() // TICK_SECONDS), ticks - 1)

    own = [life for life in lives if life.pool == pool and begin <= life.ended_at <= now]
    for life in own:
        if life.refused or life.preempted:
            record[tick(life.ended_at)] = 0
    for life in own:
        if life.launched_at is not None:
            first, end = max(0, tick(life.launched_at)), tick(life.ended_at)
            record[first:end] = b"\x01" * (end - first)
    return Seen(TICK_SECONDS, bytes(record)) if own else None
