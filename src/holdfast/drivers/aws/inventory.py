"""All machines of one region, from one description that every caller shares.

EC2 is eventually consistent: what was launched may not be shown yet, and what is shown may be missing once. So what this
process launched or saw is remembered, and absence alone is no end.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from holdfast.clock import Clock
from holdfast.drivers.protocol import Machine
from holdfast.errors import HoldfastError

log = logging.getLogger(__name__)

UNSEEN_SECONDS = 300.0
"""For which a machine that is not shown counts as living."""
REMEMBERED = timedelta(hours=24)
"""EC2 itself forgets a terminated instance after about an hour."""


@dataclass(slots=True)
class _Known:
    machine: Machine
    launched_at: float = float("-inf")
    """`time.monotonic()`, of what was launched here."""
    ever_shown: bool = False
    missed_at: float | None = None
    """When the first of the answers was asked for that did not show it."""


class Inventory:
    def __init__(
        self,
        region: str,
        clock: Clock,
        fetch: Callable[[], Sequence[Machine]],
        unseen_seconds: float = UNSEEN_SECONDS,
    ) -> None:
        self.region = region
        self._unseen_seconds = unseen_seconds
        self._clock = clock
        self._fetch = fetch
        self._condition = threading.Condition()
        self._known: dict[str, _Known] = {}
        self._fetching = False
        self._described_at = float("-inf")
        """When the description that is known was asked for."""
        self._changed_at = float("-inf")
        self._finished = 0
        self._last: tuple[float, HoldfastError | None] = (float("-inf"), None)
        """Of the description that finished last: when it was asked for, and why it failed."""

    def machines(self, max_age_seconds: float) -> list[Machine]:
        """A caller that comes while a description is under way waits for that one instead of asking for another."""
        with self._condition:
            called_at = time.monotonic()
            finished_before = self._finished
            while not self._will_do(called_at, max_age_seconds, finished_before):
                if self._fetching:
                    self._condition.wait()
                else:
                    self._describe()
            return [known.machine for known in self._known.values()]

    def launched(self, machine: Machine) -> Machine:
        """The machine as it is known from now on."""
        with self._condition:
            self._changed_at = time.monotonic()
            known = self._known.get(machine.id)
            if known is None or not known.ever_shown:
                known = _Known(_with_end(machine, self._clock.now()), launched_at=self._changed_at)
                self._known[machine.id] = known
            return known.machine

    def changed(self) -> None:
        """A description that was asked for before this moment is out of date."""
        with self._condition:
            self._changed_at = time.monotonic()

    def known(self, machine_id: str) -> Machine | None:
        with self._condition:
            known = self._known.get(machine_id)
            return known.machine if known else None

    def may_be_hidden(self, machine_id: str) -> bool:
        """Was it launched here so lately that EC2 may not know it yet?"""
        with self._condition:
            known = self._known.get(machine_id)
            return bool(known and not known.ever_shown and time.monotonic() - known.launched_at < self._unseen_seconds)

    # -----------------------------------------------------------------------------------------------------------------

    def _will_do(self, called_at: float, max_age_seconds: float, finished_before: int) -> bool:
        began_at, failure = self._last
        if self._finished > finished_before and began_at >= self._changed_at:
            if failure:
                raise type(failure)(*failure.args) from failure  # each thread its own
            return True
        return max_age_seconds > 0 and self._described_at >= called_at - max_age_seconds

    def _describe(self) -> None:
        self._fetching = True
        began_at = time.monotonic()
        failure: HoldfastError | None = None
        shown: Sequence[Machine] = ()
        self._condition.release()
        try:
            shown = self._fetch()
        except HoldfastError as error:
            failure = error
        finally:
            self._condition.acquire()
            self._fetching = False
            self._condition.notify_all()
        self._last = (began_at, failure)
        self._finished += 1
        if not failure:
            self._described_at = began_at
            self._remember(shown, began_at)

    def _remember(self, shown: Sequence[Machine], began_at: float) -> None:
        now = self._clock.now()
        for machine in shown:
            before = self._known.get(machine.id)
            if before and before.machine.state == "terminated":
                continue  # an end is told once, in the same words for ever
            self._known[machine.id] = _Known(_with_end(machine, now), ever_shown=True)
        here = {machine.id for machine in shown}
        for machine_id, known in list(self._known.items()):
            if machine_id in here:
                continue
            known.missed_at = began_at if known.missed_at is None else known.missed_at
            if known.machine.state != "terminated" and began_at - known.missed_at > self._unseen_seconds:
                known.machine = _vanished(known, now)
                log.warning("machine=%s is no longer shown by EC2 and counts as ended", machine_id)
            if known.machine.terminated_at and now - known.machine.terminated_at > REMEMBERED:
                del self._known[machine_id]


def _with_end(machine: Machine, now: datetime) -> Machine:
    """EC2 tells the hour of an end for what its API ended; else it is when the end was first seen."""
    if machine.state != "terminated" or machine.terminated_at:
        return machine
    return dataclasses.replace(machine, terminated_at=max(now, machine.launched_at))


def _vanished(known: _Known, now: datetime) -> Machine:
    detail = "EC2 shows it no longer" if known.ever_shown else "EC2 never showed it after its launch"
    ended_at = max(now, known.machine.launched_at)
    return dataclasses.replace(known.machine, state="terminated", terminated_at=ended_at, detail=detail)
