"""What a policy may know when it decides, and what it may decide. Only what is knowable then; time is float seconds.

The simulator, the benchmark and the controller of real runs fill in the same fields, so all three run the same policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

HOPE_TICKS = 6
"""While an on-demand machine trains, a spot pool that refused or took one is taken to have nothing for so many ticks: to find out
costs a restart. Without a machine it costs nothing, and is tried at every tick."""


@dataclass(slots=True)
class PoolView:
    """One capacity pool as it looks now. Mutable: a simulation changes it in place, tick by tick."""

    name: str
    spot: bool
    usd_per_hour: float
    available: bool = True
    """As last known: a pool that nobody has asked is hoped to be."""
    since_seconds: float = 0.0
    """When it was last seen to change; 0 where it never was."""


@dataclass(slots=True)
class Attempted:
    """A launch that has ended."""

    pool: int
    outcome: str
    """As of an attempt: no-capacity, preempted, moved ..."""
    ended_seconds: float
    made_progress: bool = False


class PoolHistory(Protocol):
    """Whether a pool had a machine to give, up to the first decision. A `market.traces.Trace` is one."""

    @property
    def gap_seconds(self) -> float: ...

    @property
    def available(self) -> bytes:
        """One byte a tick, oldest first: 1, 0, or UNSEEN where nobody looked."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """A `PoolHistory` of what machines that were asked for have shown."""

    gap_seconds: float
    available: bytes


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
    attempts: Sequence[Attempted] = ()
    """Oldest first."""
    history: Sequence[PoolHistory | None] = ()
    """Of each of these pools, what was seen of it before the first decision; empty: nothing."""
    loss_seconds: float = math.inf
    """Of useful machine time, the most that is lost with a machine that is taken; inf: whatever it did since the last tick."""
    move_usd: float = 0.0
    """The checkpoint's egress to a machine in another pool than the last spot machine's."""
    sees_all: bool = False
    """Is `available` what is, of every pool? Else it is a hope where nobody has asked, which costs the machine in use."""

    @property
    def work_left_seconds(self) -> float:
        return self.work_total_seconds - self.work_done_seconds

    @property
    def slack_seconds(self) -> float:
        """Time that may pass without progress, a start on demand included; below zero an interruption may be too much."""
        return self.deadline_seconds - self.now_seconds - self.work_left_seconds - self.restart_seconds


class Decision(NamedTuple):
    pool: int | None
    """Index of the pool to run on, the one in use included; None: wait."""
    reason: str
    until_seconds: float | None = None
    """Of waiting: when to ask again; None: at the next tick. inf: the policy has given up."""


class Policy(Protocol):
    """Made anew for every run, and asked in the order of time."""

    asks_while_running: bool
    """Can a running machine's end be its decision? If not, it need be asked between machines only."""

    def decide(self, situation: Situation) -> Decision: ...


def renew_hopes(pools: Sequence[PoolView], current: int | None, now_seconds: float, tick_seconds: float) -> None:
    """What was seen full is worth another try some time later. Changes `pools` in place."""
    on_demand = current is not None and not pools[current].spot
    wait = HOPE_TICKS * tick_seconds if on_demand else tick_seconds
    for pool in pools:
        if not pool.available and now_seconds - pool.since_seconds >= wait - 1e-6:
            pool.available = True


def on_demand_pool(situation: Situation) -> int:
    """The one in use when it is one, else the cheapest; one that refused just now only when all did."""
    current = situation.current
    if current is not None and not situation.pools[current].spot:
        return current
    pools = situation.pools
    on_demand = [index for index, pool in enumerate(pools) if not pool.spot]
    return min(on_demand, key=lambda index: (not pools[index].available, pools[index].usd_per_hour))


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


def is_safe(situation: Situation, pool: int | None) -> bool:
    """May the time to the next tick be spent so, and on-demand then still be in time, whatever happens? Exact.

    On-demand is taken to be always to be had. Whoever waits loses the tick; a spot machine keeps of it what is neither the
    overhead of its launch nor lost when it is taken at the end; and then another start is to be paid.
    """
    kept = 0.0
    if pool is not None:
        if not situation.pools[pool].spot:
            return True
        pending = situation.pending_seconds if pool == situation.current else situation.restart_seconds
        kept = max(0.0, situation.tick_seconds - pending - situation.loss_seconds)
    return situation.slack_seconds >= situation.tick_seconds - kept - ROUNDING_SECONDS


ROUNDING_SECONDS = 1e-6
UNSEEN = 2
USED_UP = "the slack is used up"
LONGEST_TICK_SECONDS, SHORTEST_TICK_SECONDS, TICKS = 600.0, 10.0, 300.0
RESERVE_FRACTION = 0.02


def tick_seconds_for(deadline_seconds: float) -> float:
    """Between two decisions: a 300th of the time there is, ten minutes at most. What may go wrong in one is kept as slack."""
    return min(LONGEST_TICK_SECONDS, max(SHORTEST_TICK_SECONDS, deadline_seconds / TICKS))


def reserve_seconds_for(work_seconds: float) -> float:
    """Kept before the deadline for what is slower than estimated: policies never see it."""
    return RESERVE_FRACTION * work_seconds
