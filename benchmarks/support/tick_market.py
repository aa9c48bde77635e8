"""A job on recorded pools, tick by tick: whole ticks are billed, every launch and every change of machine costs the overhead.

The market keeps the traces to itself. A policy gets a situation, in which a pool is available or not at the present tick.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.placement.situation import Attempted, Policy, PoolHistory, PoolView, Situation

MOST_REFUSALS = 10
"""At one tick; a policy that asks on in vain waits then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Of a job."""

    work_hours: float = 48.0
    deadline_hours: float
    overhead_hours: float
    tick_seconds: float = 600.0
    spot_usd_per_hour: float = 0.9731
    on_demand_usd_per_hour: float = 3.06
    move_usd: float = 0.0
    """The egress of a checkpoint, paid at a launch in another pool than the last one that trained."""

    @property
    def name(self) -> str:
        return f"{self.deadline_hours:g} h, overhead {self.overhead_hours:g} h"

    @property
    def ticks(self) -> int:
        """To the deadline."""
        return int(self.deadline_hours * 3600 / self.tick_seconds + 1e-9)


@dataclass(slots=True)
class Played:
    usd: float = 0.0
    missed: bool = False
    launches: int = 0
    on_demand_ticks: int = 0


def play(
    policy: Policy, setting: Setting, pools: Sequence[bytes], start: int, history: Sequence[PoolHistory | None] = ()
) -> Played:
    """One run that starts at tick `start` of the spot pools' records. A missed deadline is made up for on demand."""
    tick, overhead = setting.tick_seconds, setting.overhead_hours * 3600
    spot_usd, on_demand_usd = (usd * tick / 3600 for usd in (setting.spot_usd_per_hour, setting.on_demand_usd_per_hour))
    on_demand = len(pools)
    views = [PoolView(f"spot-{index}", True, setting.spot_usd_per_hour) for index in range(on_demand)]
    views.append(PoolView("on-demand", False, setting.on_demand_usd_per_hour))
    attempts: list[Attempted] = []
    situation = Situation(
        now_seconds=0.0,
        deadline_seconds=setting.ticks * tick,
        work_total_seconds=setting.work_hours * 3600,
        work_done_seconds=0.0,
        restart_seconds=overhead,
        pools=views,
        tick_seconds=tick,
        attempts=attempts,
        history=history,
        loss_seconds=0.0,
        move_usd=setting.move_usd,
        sees_all=True,
    )
    played = Played()
    work, done, pending = situation.work_total_seconds, 0.0, 0.0
    current: int | None = None
    last_spot: int | None = None
    trained = False
    first = True
    for number in range(setting.ticks):
        now = number * tick
        for index, record in enumerate(pools):
            available = record[start + number] == 1
            view = views[index]
            if first or available != view.available:
                view.available, view.since_seconds = available, now if not first else 0.0
        first = False
        if current is not None and not views[current].available:
            attempts.append(Attempted(current, "preempted", now, trained))
            current, pending = None, 0.0
        situation.now_seconds, situation.work_done_seconds = now, done
        situation.current, situation.pending_seconds = current, pending
        chosen = policy.decide(situation).pool
        refusals = 0
        while chosen is not None and not views[chosen].available:
            attempts.append(Attempted(chosen, "no-capacity", now, False))
            refusals += 1
            chosen = policy.decide(situation).pool if refusals < MOST_REFUSALS else None
        if chosen != current:
            if current is not None:
                attempts.append(Attempted(current, "moved", now, trained))
            pending, trained = 0.0, False
            if chosen is not None:
                pending = overhead
                situation.current_since_seconds = now
                played.launches += 1
                if chosen != on_demand:
                    if last_spot not in (None, chosen):
                        played.usd += setting.move_usd
                    last_spot = chosen
            current = chosen
        if current is None:
            continue
        played.usd += on_demand_usd if current == on_demand else spot_usd
        played.on_demand_ticks += current == on_demand
        progress = tick - pending
        pending = max(0.0, -progress)
        if progress > 0:
            done += progress
            trained = True
            if done >= work - 1e-6:
                return played
    played.missed = True
    left = work - done + (overhead if current != on_demand else pending)
    played.usd += -(-(left - 1e-6) // tick) * on_demand_usd
    return played
