"""The plan of a run that has a deadline, or names its policy: what is left to do, how much slack, and what was decided why.

Fills in what the policies may know (`placement.situation`) from the journal, the market and the machine's own report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.errors import ConfigError
from holdfast.ledger.profiles import JobProfile
from holdfast.ledger.run_state import Attempt, RunState
from holdfast.model import TrainingJob
from holdfast.placement.policies import BEST, DEFAULT, Terms, check_name, policy_named
from holdfast.placement.policy import GiveUp, Launch, PastAttempt, Wait
from holdfast.placement.situation import (
    LONGEST_TICK_SECONDS,
    TICKS,
    Attempted,
    Decision,
    PoolHistory,
    PoolView,
    Situation,
    renew_hopes,
    reserve_seconds_for,
    tick_seconds_for,
)

GUESSED_BOOT_SECONDS, GUESSED_STOP_SECONDS = 120.0, 10.0
LEAST_MEASURED_STEPS, LEAST_MEASURED_FRACTION = 20, 0.01
"""So much of a run tells more about its steps than what was said of them before."""
REFUSED: frozenset[str] = frozenset({"no-capacity", "quota", "preempted", "lost"})


def policy_of(job: TrainingJob) -> str:
    """The policy that the job runs under."""
    if job.provisioning == "on-demand":
        return "on-demand"
    return job.policy or (BEST if job.has_deadline else DEFAULT)


def is_planned(job: TrainingJob) -> bool:
    """Does a policy of `placement.policies` decide? Else `placement.policy` alone does, between machines."""
    return job.has_deadline or policy_of(job) != DEFAULT


def most_attempts(job: TrainingJob) -> int:
    """Whoever waits for spot asks at every tick: so many refusals are no failure of the job's."""
    return job.max_attempts + (int(2 * TICKS) if is_planned(job) else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How much there is to do, in seconds of useful machine time."""

    total_seconds: float
    done_seconds: float
    """Committed."""
    source: str

    @property
    def left_seconds(self) -> float:
        return max(0.0, self.total_seconds - self.done_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One decision, and what it was taken on."""

    at: datetime
    policy: str
    deadline_at: datetime | None
    work: Work | None
    """None: not known yet."""
    restart_seconds: float
    slack_seconds: float | None
    """Beyond the reserve: how long nothing may go forward until only on-demand is in time."""
    pool: str
    """Empty: wait."""
    reason: str

    @property
    def words(self) -> str:
        where = f"on {self.pool}" if self.pool else "wait"
        parts = [f"{where}: {self.reason}"]
        if self.work is not None:
            parts.append(f"{hours(self.work.left_seconds)} of work left ({self.work.source})")
        if self.slack_seconds is not None:
            parts.append(f"slack {hours(self.slack_seconds)}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "deadline_at": self.deadline_at.isoformat() if self.deadline_at else None,
            "work_seconds": round(self.work.total_seconds, 1) if self.work else None,
            "done_seconds": round(self.work.done_seconds, 1) if self.work else None,
            "estimate": self.work.source if self.work else "not known yet",
            "restart_seconds": round(self.restart_seconds, 1),
            "slack_seconds": None if self.slack_seconds is None else round(self.slack_seconds, 1),
            "pool": self.pool,
            "reason": self.reason,
        }


def hours(seconds: float) -> str:
    """90 s, 12 min, 3.4 h; with its sign."""
    if abs(seconds) < 180:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if abs(seconds) < 3 * 3600 else f"{seconds / 3600:.1f} h"


def refuse_a_past_deadline(deadline_at: datetime, now: datetime) -> None:
    if deadline_at <= now:
        raise ConfigError(
            f"deadline: {deadline_at.isoformat()} is past, on the cloud's clock it is {now.isoformat(timespec='seconds')}; "
            "name a later one"
        )


class Planner:
    """Of one run in one process; what it must not forget is in the journal."""

    def __init__(
        self,
        job: TrainingJob,
        offers: Sequence[Offer],
        profile: JobProfile,
        detect_seconds: float,
        seen: Callable[[CapacityPool], PoolHistory | None],
    ) -> None:
        """`detect_seconds`: what passes, on the cloud's clock, between a machine's end and the next one's launch.

        `seen`: what is known of a pool's past; asked once, at the first decision.
        """
        self._job, self._offers, self._profile = job, list(offers), profile
        self._detect_seconds = detect_seconds
        self._seen = seen
        self._history: list[PoolHistory | None] | None = None
        self.policy = policy_of(job)
        check_name(self.policy)
        self._decider = policy_named(
            self.policy,
            Terms(
                offers=self._offers,
                provisioning="spot" if job.provisioning == "spot" else "spot-then-on-demand",
                failed_spot_attempts_to_fall_back=job.fallback.after_failed_spot_attempts,
                max_attempts=most_attempts(job),
            ),
        )
        self._next_tick: datetime | None = None
        self.last: Plan | None = None

    # -- decisions ----------------------------------------------------------------------------------------------------

    def next_machine(
        self, state: RunState, past: Sequence[PastAttempt], offers: Sequence[Offer], now: datetime
    ) -> Launch | Wait | GiveUp:
        """`past`: the attempts that count, as placement sees them. `offers`: that fit the job, with their prices now."""
        job = self._job
        launched = sum(attempt.launched_at is not None for attempt in state.attempts)
        if launched >= job.max_attempts or len(past) >= most_attempts(job):
            return GiveUp(f"{launched} machines were had, which is max_attempts; raise it to go on")
        self._next_tick = None
        situation = self._situation(state, past, offers, None, {}, now)
        decision = self._decide(state, situation, None, {}, now)
        if decision.pool is None:
            if decision.until_seconds == math.inf:
                return GiveUp(decision.reason)
            until = decision.until_seconds
            at = now + timedelta(seconds=situation.tick_seconds)
            if until is not None and state.started_at:
                at = max(state.started_at + timedelta(seconds=until), now + timedelta(seconds=1))
            return Wait(at, decision.reason)
        pool = self._offers[decision.pool].pool
        chosen = next((one for one in offers if one.pool == pool), self._offers[decision.pool])
        last = past[-1] if past else None
        fell_back = pool.provisioning_model == "on-demand" and last is not None and last.provisioning_model == "spot"
        assert self.last
        return Launch(chosen, self.last.words, fell_back)

    def is_due(self, now: datetime) -> bool:
        return self._next_tick is None or now >= self._next_tick

    def why_move(
        self,
        state: RunState,
        past: Sequence[PastAttempt],
        offers: Sequence[Offer],
        attempt: Attempt,
        report: Mapping[str, Any],
        now: datetime,
    ) -> str | None:
        """At a tick: words when the living machine is to be left."""
        situation = self._situation(state, past, offers, attempt, report, now)
        self._next_tick = now + timedelta(seconds=situation.tick_seconds)
        if situation.current is None:
            return None  # the account does not sell such machines any more, but this one lives
        decision = self._decide(state, situation, attempt, report, now)
        return None if decision.pool == situation.current else decision.reason

    def _decide(
        self,
        state: RunState,
        situation: Situation,
        attempt: Attempt | None,
        report: Mapping[str, Any],
        now: datetime,
    ) -> Decision:
        work = self.work(state, attempt, report, now)
        if work is None and self._job.has_deadline:
            decision = self._unknown(situation)
        else:
            decision = self._decider.decide(situation)
        slack = situation.slack_seconds if work is not None and self._job.has_deadline else None
        self.last = Plan(
            at=now,
            policy=self.policy,
            deadline_at=self._job.deadline_at(state.started_at or now),
            work=work,
            restart_seconds=situation.restart_seconds,
            slack_seconds=slack,
            pool="" if decision.pool is None else situation.pools[decision.pool].name,
            reason=decision.reason,
        )
        return decision

    def _unknown(self, situation: Situation) -> Decision:
        """Nobody knows yet how long it takes: a first machine will tell, and no time is spent on waiting for a cheap one."""
        if situation.current is not None:
            return Decision(situation.current, "measures how long a step takes")
        spot = [index for index, pool in enumerate(situation.pools) if pool.spot and pool.available]
        if spot and not any(one.outcome in REFUSED for one in situation.attempts):
            best = min(spot, key=lambda index: situation.pools[index].usd_per_hour)
            return Decision(best, "measures how long a step takes")
        on_demand = [index for index, pool in enumerate(situation.pools) if not pool.spot]
        best = min(on_demand, key=lambda index: situation.pools[index].usd_per_hour)
        return Decision(best, "how long a step takes must be known soon")

    # -- what is known ------------------------------------------------------------------------------------------------

    def _situation(
        self,
        state: RunState,
        past: Sequence[PastAttempt],
        offers: Sequence[Offer],
        attempt: Attempt | None,
        report: Mapping[str, Any],
        now: datetime,
    ) -> Situation:
        if self._history is None:
            self._history = [self._seen(one.pool) for one in self._offers]
        started = state.started_at or now
        prices = {one.pool: one.usd_per_hour for one in offers}
        views = [
            PoolView(
                name=str(one.pool),
                spot=one.pool.provisioning_model == "spot",
                usd_per_hour=prices.get(one.pool, one.usd_per_hour),
            )
            for one in self._offers
        ]
        index = {one.pool: place for place, one in enumerate(self._offers)}
        attempts = [
            Attempted(index[one.pool], one.outcome, (one.ended_at - started).total_seconds(), one.made_progress)
            for one in past
            if one.pool in index
        ]
        for one in attempts:
            if one.outcome in REFUSED:
                views[one.pool].available, views[one.pool].since_seconds = False, one.ended_seconds
        deadline_at = self._job.deadline_at(started)
        deadline_seconds = (deadline_at - started).total_seconds() if deadline_at else math.inf
        tick = tick_seconds_for(deadline_seconds) if deadline_at else LONGEST_TICK_SECONDS
        now_seconds = (now - started).total_seconds()
        current = index.get(attempt.pool) if attempt else None
        renew_hopes(views, current, now_seconds, tick)
        for one in past:
            if one.outcome == "quota" and one.pool in index:  # asking again mends none
                views[index[one.pool]].available = False
        for one in self._offers:
            if one.pool not in prices:
                views[index[one.pool]].available = False
        work = self.work(state, attempt, report, now)
        total = work.total_seconds if work else 1.0
        restart = self.restart_seconds(state, report, attempt)
        launched_at = attempt.launched_at if attempt else None
        age = (now - launched_at).total_seconds() if launched_at else 0.0
        trains = report.get("marks", {}).get("resumed") is not None
        return Situation(
            now_seconds=now_seconds,
            deadline_seconds=deadline_seconds - reserve_seconds_for(total),
            work_total_seconds=total,
            work_done_seconds=work.done_seconds if work else 0.0,
            restart_seconds=restart,
            pools=views,
            current=current,
            current_since_seconds=now_seconds - age,
            pending_seconds=0.0 if trains or current is None else max(0.0, restart - age),
            tick_seconds=tick,
            attempts=attempts,
            history=self._history,
        )

    def work(self, state: RunState, attempt: Attempt | None, report: Mapping[str, Any], now: datetime) -> Work | None:
        """Measured where enough steps were, else calibrated, else as the job says; None: nobody knows."""
        kind = attempt.pool.instance_type if attempt else self._offers[0].pool.instance_type
        total_steps = report.get("total_steps") or _total_steps(state) or self._profile.total_steps
        committed = max(state.committed_step, report.get("committed_step") or 0)
        step_seconds, steps = _measured_steps(state, attempt, report)
        total: float | None
        if total_steps and step_seconds and steps >= max(LEAST_MEASURED_STEPS, LEAST_MEASURED_FRACTION * total_steps):
            total, source = total_steps * step_seconds, f"measured over {steps} steps"
        elif self._job.work_hours:
            total, source = self._job.work_hours * 3600, "as the job says"
        else:
            total, source = self._profile.work_seconds(kind), "calibrated"
        if total is None:
            return None
        done = min(1.0, committed / total_steps) * total if total_steps else 0.0
        return Work(total_seconds=total, done_seconds=done, source=source)

    def restart_seconds(self, state: RunState, report: Mapping[str, Any] = {}, attempt: Attempt | None = None) -> float:
        """The worst that was calibrated, or seen in this run; before, a guess."""
        measured = self._profile.of(self._offers[0].pool.instance_type)
        boots = [one.boot_seconds for one in state.attempts if one.boot_seconds is not None]
        if attempt and attempt.launched_at and (resumed := report.get("marks", {}).get("resumed")):
            boots.append((datetime.fromisoformat(resumed) - attempt.launched_at).total_seconds())
        if measured:
            boots.append(measured.boot_seconds)
        elif not boots:
            boots = [GUESSED_BOOT_SECONDS]
        stop = measured.stop_seconds if measured else GUESSED_STOP_SECONDS
        asks = [(one.launched_at or one.detected_at) for one in state.attempts]
        asking = [(at - one.reserved_at).total_seconds() for at, one in zip(asks, state.attempts, strict=True) if at]
        return max(boots) + stop + self._detect_seconds + max(asking, default=0.0)

    def check(self, state: RunState, now: datetime) -> None:
        """Raises ConfigError, before anything is spent, where the deadline can't be kept, or its cost passes a cap."""
        job = self._job
        deadline_at = job.deadline_at(state.started_at or now)
        if deadline_at is None:
            return
        refuse_a_past_deadline(deadline_at, now)
        work = self.work(state, None, {}, now)
        if work is None:
            return
        restart, reserve = self.restart_seconds(state), reserve_seconds_for(work.total_seconds)
        needed, there_are = work.left_seconds + restart + reserve, (deadline_at - now).total_seconds()
        if needed > there_are:
            raise ConfigError(
                f"deadline: {deadline_at.isoformat()} is in {hours(there_are)}, but even on demand the job takes "
                f"{hours(needed)}: {hours(work.left_seconds)} of work ({work.source}), {hours(restart)} to start, "
                f"{hours(reserve)} in reserve; name {(now + timedelta(seconds=needed)).isoformat(timespec='minutes')} or later"
            )
        self._check_caps(work, restart)

    def _check_caps(self, work: Work, restart: float) -> None:
        job = self._job
        machine_hours = (work.total_seconds + restart) / 3600
        if job.max_run_hours < machine_hours:
            raise ConfigError(
                f"max_run_hours: {job.max_run_hours:g} machine hours are not enough for {machine_hours:.2f} hours of work and "
                "start, so the deadline can't be kept; raise it"
            )
        price = min(one.usd_per_hour for one in self._offers if one.pool.provisioning_model == "on-demand")
        if job.max_usd is not None and job.max_usd < machine_hours * price:
            raise ConfigError(
                f"max_usd: keeping the deadline may take ${machine_hours * price:.2f} ({machine_hours:.2f} h on demand at "
                f"${price:.3f}/h), more than the cap of ${job.max_usd:g}; raise it, or drop the deadline"
            )


def _total_steps(state: RunState) -> int | None:
    told = [one.report["total_steps"] for one in state.attempts if one.report.get("total_steps")]
    return told[-1] if told else None


def _measured_steps(state: RunState, attempt: Attempt | None, report: Mapping[str, Any]) -> tuple[float | None, int]:
    """Mean seconds of a step over the run, and over how many."""
    seconds, steps = 0.0, 0
    for one in state.attempts:
        if one.outcome and one.step_seconds:
            seconds, steps = seconds + one.step_seconds * one.trained_steps, steps + one.trained_steps
    first_at, last_at = report.get("marks", {}).get("first-step"), report.get("last_step_at")
    if attempt and first_at and last_at and report.get("step"):
        here = report["step"] - (report.get("resumed_step") or 0) - 1  # the first may compile, or warm up
        if here > 0:
            ran = datetime.fromisoformat(last_at) - datetime.fromisoformat(first_at)
            seconds, steps = seconds + max(0.0, ran.total_seconds()), steps + here
    return (seconds / steps if steps else None), steps
