"""Offers as they look to somebody with a memory: interruption rates from what was seen, and what is to be avoided now."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from holdfast.clock import Clock
from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.drivers.several import SomeOffers
from holdfast.errors import HoldfastError
from holdfast.market.hazards import hazards_by_age
from holdfast.market.history import History, Life
from holdfast.market.interruptions import Estimate, Observation, estimate
from holdfast.market.monitor import Judgement, family_of, read_judgement
from holdfast.market.seen import seen_of
from holdfast.market.traces import Trace
from holdfast.placement.situation import Seen
from holdfast.storage import ObjectStore

log = logging.getLogger(__name__)

HORIZON = timedelta(days=60)
HALF_LIFE = timedelta(days=14)
"""A market changes: what was seen so long ago counts half."""
FAMILY_WEIGHT = 0.25
"""Of what other pools of the same family in the same region have shown."""
TRACE_WEIGHT, MOST_TRACE_EVENTS = 0.2, 10.0
"""A public trace is of another year: it counts for little, and never for more than so many interruptions."""
READ_AGAIN_WALL_SECONDS = 60.0


class InformedMarket:
    """Of one store; read again once a minute at most. A store that does not answer leaves the drivers' own estimates."""

    def __init__(self, store: ObjectStore, clock: Clock, history: History | None = None) -> None:
        self._store, self._clock = store, clock
        self._history = history or History(store)
        self._read_at = float("-inf")
        self._lives: Sequence[Life] = ()
        self._judgement: Judgement | None = None

    def inform(self, offers: Sequence[Offer]) -> Sequence[Offer]:
        """The same offers in the same order. What some clouds have not told stays missing."""
        self._read()
        informed = [
            dataclasses.replace(
                offer,
                interruptions_per_hour=found.per_hour if found else offer.interruptions_per_hour,
                cooled=self._judgement.cooled(offer.pool) if self._judgement else "",
            )
            for offer, found in zip(offers, estimates(offers, self._lives, self._clock.now()), strict=True)
        ]
        return SomeOffers(informed, offers.missing) if isinstance(offers, SomeOffers) else informed

    def spot_share(self, asked: float, offers: Iterable[Offer]) -> float:
        """A fleet's share, less while every pool that fits is cooled."""
        self._read()
        return self._judgement.spot_share(asked, offers) if self._judgement else asked

    def hazards(self, offer: Offer) -> tuple[tuple[float, float], ...]:
        """Of the offer's type, by a machine's age; see `market.hazards`."""
        if offer.pool.provisioning_model != "spot":
            return ()
        return hazards_by_age(self._lives, offer.pool, offer.interruptions_per_hour)

    def seen(self, pool: CapacityPool) -> Seen | None:
        """What runs on this store have seen of the pool lately; None: nothing."""
        self._read()
        return seen_of(self._lives, pool, self._clock.now()) if pool.provisioning_model == "spot" else None

    def forget(self) -> None:
        """There is something new in the history."""
        self._read_at = float("-inf")

    def _read(self) -> None:
        if time.monotonic() - self._read_at < READ_AGAIN_WALL_SECONDS:
            return
        self._read_at = time.monotonic()
        now = self._clock.now()
        try:
            self._lives = self._history.lives(now - HORIZON)
            self._judgement = read_judgement(self._store, now)
        except (HoldfastError, OSError, ValueError, KeyError) as error:
            log.warning("the history of interruptions can't be read, what is known stays: %r", error)


def estimates(
    offers: Sequence[Offer], lives: Iterable[Life], now: datetime, traces: Sequence[Trace] = ()
) -> list[Estimate | None]:
    """For each offer; None for what is not interrupted: on-demand, and pools whose driver says 0."""
    events: dict[CapacityPool, float] = defaultdict(float)
    hours: dict[CapacityPool, float] = defaultdict(float)
    for life in lives:
        if life.launched_at and life.pool.provisioning_model == "spot":
            weight = 0.5 ** (max(timedelta(0), now - life.ended_at) / HALF_LIFE)
            events[life.pool] += weight * life.preempted
            hours[life.pool] += weight * max(0.0, life.hours)
    return [
        _estimate(offer, events, hours, traces)
        if offer.pool.provisioning_model == "spot" and offer.interruptions_per_hour > 0
        else None
        for offer in offers
    ]


def _estimate(
    offer: Offer, events: dict[CapacityPool, float], hours: dict[CapacityPool, float], traces: Sequence[Trace]
) -> Estimate:
    pool, family = offer.pool, family_of(offer.pool.instance_type)
    alike = [
        other
        for other in hours
        if other != pool
        and (other.cloud, other.region) == (pool.cloud, pool.region)
        and family_of(other.instance_type) == family
    ]
    seen = [
        Observation(source="own history", events=events.get(pool, 0.0), hours=hours.get(pool, 0.0)),
        Observation(
            source=f"{family} in {pool.region}",
            events=sum(events[other] for other in alike),
            hours=sum(hours[other] for other in alike),
            weight=FAMILY_WEIGHT,
        ),
    ]
    for trace in traces:
        if trace_is_of(trace, offer):
            ended, seconds = trace.losses()
            seen.append(
                Observation(
                    source=f"trace {trace.name}",
                    events=ended,
                    hours=seconds / 3600,
                    weight=min(TRACE_WEIGHT, MOST_TRACE_EVENTS / max(1, ended)),
                )
            )
    words = "prior" + (f" with {offer.capacity_advice}" if offer.capacity_advice else "")
    return estimate(offer.interruptions_per_hour, [one for one in seen if one.hours > 0], words)


def trace_is_of(trace: Trace, offer: Offer) -> bool:
    """By the name that the public traces have: zone, GPU, how many; us-west-2a_v100_1."""
    zone, _, rest = trace.name.partition("_")
    gpu, _, count = rest.partition("_")
    return (
        zone == offer.pool.zone
        and gpu.lower() == offer.gpu_name.lower() != ""
        and count.isdigit()
        and int(count) == offer.gpus
    )
