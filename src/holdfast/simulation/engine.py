"""One run, simulated: the production policies meet a recorded or drawn market, second by second, and the bill adds up.

What is simulated: starts that train nothing, refusals, preemptions with and without notice, work since the last commit that is
lost, changes of machine that commit first, machines that end themselves before they are taken, the time that the orchestrator
itself takes, per-second billing with its minimum. What is not: a program that fails, a cloud whose interface is away, prices
that change during the run. `benchmarks/agreement.py` holds it against real runs.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.ledger.billing import BillingTerms
from holdfast.market.traces import Trace
from holdfast.placement.situation import Attempted, Policy, PoolView, Situation, renew_hopes
from holdfast.simulation.outcomes import Outcome

MOST_LAUNCHES = 10_000
"""A policy that asks for more than so many machines is wrong, and would never end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A job as a simulation sees it. Seconds are the cloud's."""

    work_seconds: float
    """Of useful machine time."""
    deadline_seconds: float = math.inf
    """From the run's start."""
    begin_seconds: float = 0.0
    """From the run's start to its first decision."""
    launch_seconds: float = 0.0
    """From a decision to the launch, where billing begins."""
    boot_seconds: float = 120.0
    """From a launch to the first step."""
    stop_seconds: float = 0.0
    """From the last step to the end of billing, of a machine that is asked to stop, was told of its end, or has finished."""
    refusal_seconds: float = 1.0
    """From a decision to the next one, where no machine came of it."""
    detect_seconds: float = 0.0
    """From a machine's end to the next decision."""
    obey_seconds: float = 0.0
    """For how long a machine that is asked to leave still trains."""
    notice_seconds: float = 120.0
    """Between an announcement and the end."""
    unused_notice_seconds: float = 0.0
    """Of those, what is left when the machine has ended itself: it leaves while a last commit is safe."""
    short_life_seconds: float | None = None
    """From a launch to the end of a machine that is told of it before its first step; None: as long as the boot."""
    told_restart_seconds: float | None = None
    """What the policy is told that another machine costs, the worst that was seen; None: the sum of the times above."""
    checkpoint_seconds: float = 0.0
    """Between two commits: at a preemption without notice, what came after the last is lost. 0: nothing ever is."""
    noticed_share: float = 0.9
    """Of preemptions that come with a notice long enough for a commit."""
    reserve_seconds: float = 0.0
    """Kept between the policy's deadline and the job's, for what is slower than measured."""

    @property
    def restart_seconds(self) -> float:
        """Between two machines, time that trains nothing."""
        asking = max(self.launch_seconds, self.refusal_seconds)
        return self.stop_seconds + self.detect_seconds + asking + self.boot_seconds


class SimulatedPool:
    """A capacity pool with its own record of when it had something to give; None: always."""

    def __init__(self, name: str, spot: bool, usd_per_hour: float, trace: Trace | None = None) -> None:
        self.name, self.spot, self.usd_per_hour, self.trace = name, spot, usd_per_hour, trace
        self._changes: list[float] = []
        self._first = True
        if trace is not None:
            self._first = bool(trace.available[0])
            at = 0.0
            for _, ticks in trace.runs():
                at += ticks * trace.gap_seconds
                self._changes.append(at)
            self._changes.pop()  # the record's end is no change: its last state is taken to go on

    def available_at(self, seconds: float) -> bool:
        return self._first ^ bool(bisect_right(self._changes, seconds) & 1)

    def next_change(self, seconds: float) -> float:
        """After that instant; inf: none."""
        place = bisect_right(self._changes, seconds)
        return self._changes[place] if place < len(self._changes) else math.inf

    def lives(self, start: float, end: float) -> list[tuple[float, float]]:
        """Stretches with capacity between two instants."""
        found, at = [], start
        while at < end:
            until = min(end, self.next_change(at))
            if self.available_at(at):
                found.append((at, until))
            at = until
        return found


def simulate(
    workload: Workload,
    pools: Sequence[SimulatedPool],
    policy: Policy,
    tick_seconds: float,
    terms: BillingTerms,
    start_seconds: float = 0.0,
    draw: random.Random | None = None,
) -> Outcome:
    """One run that begins `start_seconds` into the pools' records. `draw`: which preemptions are announced."""
    return _Run(workload, pools, policy, tick_seconds, terms, start_seconds, draw or random.Random(0)).to_the_end()


class _Run:
    def __init__(
        self,
        workload: Workload,
        pools: Sequence[SimulatedPool],
        policy: Policy,
        tick_seconds: float,
        terms: BillingTerms,
        start_seconds: float,
        draw: random.Random,
    ) -> None:
        self.workload, self.pools, self.policy, self.tick_seconds, self.terms = (
            workload,
            pools,
            policy,
            tick_seconds,
            terms,
        )
        self.start, self.draw = start_seconds, draw
        self.attempts: list[Attempted] = []
        self.done = 0.0
        self.outcome = Outcome()
        self.situation = Situation(
            now_seconds=0.0,
            deadline_seconds=workload.deadline_seconds - workload.reserve_seconds,
            work_total_seconds=workload.work_seconds,
            work_done_seconds=0.0,
            restart_seconds=workload.restart_seconds
            if workload.told_restart_seconds is None
            else workload.told_restart_seconds,
            pools=[PoolView(pool.name, pool.spot, pool.usd_per_hour) for pool in pools],
            tick_seconds=tick_seconds,
            attempts=self.attempts,
        )

    def to_the_end(self) -> Outcome:
        now, situation, outcome = self.workload.begin_seconds, self.situation, self.outcome
        views = situation.pools
        while outcome.launches + outcome.refusals < MOST_LAUNCHES:
            situation.now_seconds, situation.work_done_seconds, situation.current = now, self.done, None
            situation.pending_seconds = 0.0
            renew_hopes(views, None, now, self.tick_seconds)
            decision = self.policy.decide(situation)
            if decision.pool is None:
                until = decision.until_seconds
                if until == math.inf:
                    break
                now = max(now + 1e-3, until if until is not None else now + self.tick_seconds)
                continue
            pool = self.pools[decision.pool]
            launched = now + self.workload.launch_seconds
            if not pool.available_at(self.start + launched):
                outcome.refusals += 1
                self._ended(decision.pool, "no-capacity", min(launched, now + self.workload.refusal_seconds))
                now += self.workload.refusal_seconds
                continue
            outcome.launches += 1
            now = self._live(decision.pool, launched)
            if self.done >= self.workload.work_seconds - 1e-6:
                outcome.finish_seconds = now
                outcome.late = now > self.workload.deadline_seconds + 1e-6
                return outcome
        outcome.finish_seconds, outcome.late = now, True
        return outcome

    def _live(self, index: int, launched: float) -> float:
        """One machine to its end; when the next can be asked for, or, of the last, when its work is done."""
        workload, situation = self.workload, self.situation
        pool = self.pools[index]
        trains_at = launched + workload.boot_seconds
        finishes_at = trains_at + workload.work_seconds - self.done
        taken_at = pool.next_change(self.start + launched) - self.start
        noticed = taken_at < math.inf and self.draw.random() < workload.noticed_share
        notice_at, leaves_at = taken_at, taken_at  # trains no more from then on
        if noticed:
            notice_at = max(launched, taken_at - workload.notice_seconds)
            if notice_at < trains_at:  # heard before there was anything to save: it ends itself when it hears it
                heard = workload.boot_seconds if workload.short_life_seconds is None else workload.short_life_seconds
                notice_at = leaves_at = min(max(notice_at, launched + heard), taken_at)
            else:
                leaves_at = max(notice_at, taken_at - workload.unused_notice_seconds - workload.stop_seconds)
        decides_until = min(finishes_at, notice_at)
        if self.policy.asks_while_running:
            situation.current, situation.current_since_seconds = index, launched
            now = launched + self.tick_seconds
            decide, step = self.policy.decide, workload.checkpoint_seconds
            while now < decides_until:
                trained = now - trains_at
                situation.now_seconds = now
                if trained > 0:
                    situation.work_done_seconds = self.done + (trained - trained % step if step else trained)
                    situation.pending_seconds = 0.0
                else:
                    situation.pending_seconds = -trained
                renew_hopes(situation.pools, index, now, self.tick_seconds)
                if decide(situation).pool != index:
                    if trained > 0 and now + workload.obey_seconds >= finishes_at:
                        break
                    return self._move(index, launched, now, taken_at)
                if not self.policy.asks_while_running:
                    break
                now += self.tick_seconds
        if finishes_at <= leaves_at:
            self.done = workload.work_seconds
            self._bill(pool, launched, finishes_at + workload.stop_seconds, "finished")
            return finishes_at
        trained = max(0.0, leaves_at - trains_at)
        gone_at = min(taken_at, leaves_at + workload.stop_seconds) if noticed and trained else leaves_at
        return self._taken(index, launched, gone_at, trained, noticed)

    def _move(self, index: int, launched: float, now: float, taken_at: float) -> float:
        """It commits, and the next machine is asked for when it is gone."""
        trains = now - launched > self.workload.boot_seconds
        left_at = now + self.workload.obey_seconds if trains else now  # what has no program yet is ended at once
        trained = left_at - launched - self.workload.boot_seconds if trains else 0.0
        self.done += trained
        over = min(left_at + self.workload.stop_seconds, max(now, taken_at))
        self._bill(self.pools[index], launched, over, "moved")
        self._ended(index, "moved", over, trained > 0)
        return over + self.workload.detect_seconds

    def _taken(self, index: int, launched: float, now: float, trained: float, noticed: bool) -> float:
        step = self.workload.checkpoint_seconds
        lost = trained % step if step and not noticed else 0.0
        self.done += trained - lost
        self.outcome.lost_seconds += lost
        self.outcome.interruptions += 1
        self._bill(self.pools[index], launched, now, "preempted")
        self._ended(index, "preempted", now, trained - lost > step / 2)
        return now + self.workload.detect_seconds

    def _ended(self, index: int, outcome: str, now: float, made_progress: bool = False) -> None:
        self.attempts.append(Attempted(index, outcome, now, made_progress))
        if outcome != "moved":
            view = self.situation.pools[index]
            view.available, view.since_seconds = False, now

    def _bill(self, pool: SimulatedPool, launched: float, ended: float, outcome: str) -> None:
        ran = ended - launched
        self.outcome.way.append((pool.spot, outcome, ran))
        if outcome == "preempted" and pool.spot and ran < self.terms.free_if_preempted_within_seconds:
            return
        seconds = max(ran, self.terms.minimum_seconds)
        self.outcome.usd += seconds / 3600 * pool.usd_per_hour
        if pool.spot:
            self.outcome.spot_seconds += seconds
        else:
            self.outcome.on_demand_seconds += seconds


def omniscient_usd(workload: Workload, pools: Sequence[SimulatedPool], start_seconds: float = 0.0) -> float:
    """No policy can be cheaper: what the work costs when the longest stretches of spot capacity are known and used first.

    Every stretch pays one start. What is left over is bought on demand, wherever it fits. Work lost, ticks, minimum billing
    and the order of things are left out, all in favour of this bound.
    """
    spot = [pool for pool in pools if pool.spot]
    on_demand_usd = min(pool.usd_per_hour for pool in pools if not pool.spot)
    horizon = workload.deadline_seconds
    if math.isinf(horizon):
        horizon = max((pool.trace.seconds for pool in spot if pool.trace), default=workload.work_seconds * 10)
    price = min((pool.usd_per_hour for pool in spot), default=on_demand_usd)
    stretches = _joined([life for pool in spot for life in pool.lives(start_seconds, start_seconds + horizon)])
    left, usd = workload.work_seconds, 0.0
    for seconds in sorted((end - start for start, end in stretches), reverse=True):
        trained = min(left, seconds - workload.boot_seconds)
        if trained <= 0:
            break
        usd += (trained + workload.boot_seconds) / 3600 * price
        left -= trained
    if left > 1e-9:
        usd += (left + workload.boot_seconds) / 3600 * on_demand_usd
    everything_on_demand = (workload.work_seconds + workload.boot_seconds) / 3600 * on_demand_usd
    return min(usd, everything_on_demand)


def _joined(stretches: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(stretches):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
