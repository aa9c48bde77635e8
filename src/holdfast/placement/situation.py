"""What a policy may know when it decides, and what it may decide. Only what is knowable then; time is float seconds.

The simulator, the benchmark and the controller of real runs fill in the same fields, so all three run the same policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class PoolView:
    """One capacity pool as it looks now. Mutable: a simulation changes it in place, tick by tick."""

    name: str
    spot: bool
    usd_per_hour: float
    available: bool = True
    """As last known: a pool that nobody has asked is taken to be available."""
    since_seconds: float = 0.0
    """When it was last seen to change; the start of the observation where it never did."""
    known: bool = True
    """Is `available` an observation, or a hope?"""


@dataclass(slots=True)
class Situation:
    """Seconds count from the run's start, before which there is nothing to see but `history`."""

    now_seconds: float
    deadline_seconds: float
    """inf: no hurry."""
    work_total_seconds: float
    """Of useful machine time; what is not known is an estimate, on the safe side."""
    work_done_seconds: float
    """Of those, what would be kept if the machine vanished now."""
    restart_seconds: float
    """Machine time without progress that every launch, and every change of machine, costs."""
    pools: Sequence[PoolView]
    """At least one of them is on-demand."""
    current: int | None = None
    """Index of the pool in use."""
    current_since_seconds: float = 0.0
    """When its machine was launched."""
    pending_seconds: float = 0.0
    """What is left of the overhead of that launch."""
    tick_seconds: float = 600.0
    """The policy is asked again after so long at the latest."""
    failed_spot_attempts: int = 0
    """In a row: refused, or taken before enough new progress."""
    history: Sequence[object] = field(default=())
    """Traces of these pools from before the run's start."""

    @property
    def work_left_seconds(self) -> float:
        return self.work_total_seconds - self.work_done_seconds

    @property
    def slack_seconds(self) -> float:
        """Time that may pass without progress, a change to on-demand now included; below zero the deadline is lost."""
        return self.deadline_seconds - self.now_seconds - self.work_left_seconds - self.seconds_to_on_demand

    @property
    def seconds_to_on_demand(self) -> float:
        """Overhead until an on-demand machine makes progress."""
        current = self.pools[self.current] if self.current is not None else None
        return self.pending_seconds if current and not current.spot else self.restart_seconds


@dataclass(frozen=True, slots=True)
class Decision:
    pool: int | None
    """Index of the pool to run on, the one in use included; None: wait."""
    reason: str


class Policy(Protocol):
    """Made anew for every run, and asked in the order of time."""

    def decide(self, situation: Situation) -> Decision: ...


def on_demand_pool(situation: Situation) -> int:
    """The cheapest; the one in use when it is one."""
    current = situation.current
    if current is not None and not situation.pools[current].spot:
        return current
    best, best_usd = -1, math.inf
    for index, pool in enumerate(situation.pools):
        if not pool.spot and pool.usd_per_hour < best_usd:
            best, best_usd = index, pool.usd_per_hour
    return best


def spot_pool(situation: Situation) -> int | None:
    """The one in use while it lasts, else the cheapest that is available; None: there is none."""
    current = situation.current
    if current is not None and situation.pools[current].spot and situation.pools[current].available:
        return current
    best, best_usd = None, math.inf
    for index, pool in enumerate(situation.pools):
        if pool.spot and pool.available and pool.usd_per_hour < best_usd:
            best, best_usd = index, pool.usd_per_hour
    return best


def must_leave_spot(situation: Situation) -> bool:
    """Would another tick without progress, and then a start on demand, be too late? Exact: on-demand is always to be had.

    A machine that is taken at the end of the tick has cost the tick, and its replacement pays the restart; the same holds
    for a tick of waiting, and for a tick after leaving on-demand, of which the overhead then is to be paid again.
    """
    left = situation.deadline_seconds - situation.now_seconds - situation.work_left_seconds
    return left - situation.restart_seconds < situation.tick_seconds
