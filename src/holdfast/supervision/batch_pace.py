"""A batch job's deadline: how long what is left takes the whole fleet, and what that lets its next machines be.

Machines that live are left alone: spot goes on working when the slack is used up. From then on whatever is taken is replaced on
demand, so that no machine is lost twice; one start of all of them, and one batch, are kept as slack for that. That start may take
twice as long as the longest that was seen: of several machines the slowest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.placement.fleet_policy import Paced, PastRound
from holdfast.placement.policies import BEST, Terms, policy_named
from holdfast.placement.situation import (
    Policy,
    PoolHistory,
    PoolView,
    Situation,
    renew_hopes,
    reserve_seconds_for,
    tick_seconds_for,
)
from holdfast.supervision.plan import hours

if TYPE_CHECKING:
    from holdfast.supervision.batch_run import BatchRun

GUESSED_START_SECONDS = 300.0
"""From a launch to the first batch, before any was seen."""
LEAST_BATCHES_PER_MACHINE = 2
"""So many tell how long one takes."""
MEASURED_AGAIN_WALL_SECONDS = 30.0


class Pace:
    """Of one run in one process. Seconds are the cloud's."""

    def __init__(self, run: BatchRun, seen: Callable[[CapacityPool], PoolHistory | None]) -> None:
        """`seen`: what is known of a pool's past; asked once, at the policy's first decision."""
        self._run, self._seen = run, seen
        self._policy: Policy | None = None
        self._offers: Sequence[Offer] = ()
        self._history: Sequence[PoolHistory | None] = ()
        self._measured: float | None = None
        self._measured_at = float("-inf")

    def decide(self, offers: Sequence[Offer], rounds: Sequence[PastRound], now: datetime) -> Paced | None:
        """None: no hurry."""
        run, job = self._run, self._run.job
        started = run.state.started_at or now
        deadline_at = job.deadline_at(started)
        if deadline_at is None:
            return None
        deadline_seconds = (deadline_at - started).total_seconds()
        tick = tick_seconds_for(deadline_seconds)
        again_at = now + timedelta(seconds=tick)
        batch_seconds = self._batch_seconds()
        if batch_seconds is None:
            if any(pool.provisioning_model == "spot" for past in rounds for pool in _lost(past)):
                return Paced(model="on-demand", reason="how long a batch takes must be known soon", again_at=again_at)
            return Paced(model="spot", reason="measures how long a batch takes", again_at=again_at)
        assert run.tally
        total = run.tally.batches * batch_seconds / job.machines
        left = run.tally.left * batch_seconds / job.machines
        restart = run.start_seconds or GUESSED_START_SECONDS
        reserve = reserve_seconds_for(total) + restart + batch_seconds * max(1, job.workers_per_machine)
        policy = self._begin(offers)
        situation = Situation(
            now_seconds=(now - started).total_seconds(),
            deadline_seconds=deadline_seconds - reserve,
            work_total_seconds=total,
            work_done_seconds=total - left,
            restart_seconds=restart,
            pools=self._views(offers, rounds, started, now, tick),
            tick_seconds=tick,
            history=self._history,
        )
        decision = policy.decide(situation)
        model = None if decision.pool is None else self._offers[decision.pool].pool.provisioning_model
        words = (
            f"{decision.reason}; {hours(left)} of work left for {job.machines} machines; "
            f"slack {hours(situation.slack_seconds)}"
        )
        return Paced(model=model, reason=words, again_at=again_at)

    def _begin(self, offers: Sequence[Offer]) -> Policy:
        if self._policy is None:
            self._offers = list(offers)
            self._policy = policy_named(BEST, Terms(offers=self._offers))
            self._history = [self._seen(one.pool) for one in self._offers]
        return self._policy

    def _views(
        self, offers: Sequence[Offer], rounds: Sequence[PastRound], started: datetime, now: datetime, tick: float
    ) -> list[PoolView]:
        prices = {one.pool: one.usd_per_hour for one in offers}
        lost: dict[CapacityPool, datetime] = {}
        for past in rounds:
            for pool, at in _lost(past).items():
                lost[pool] = max(at, lost.get(pool, at))
        views = []
        for one in self._offers:
            view = PoolView(
                str(one.pool), one.pool.provisioning_model == "spot", prices.get(one.pool, one.usd_per_hour)
            )
            if one.pool in lost:
                view.available, view.since_seconds = False, (lost[one.pool] - started).total_seconds()
            views.append(view)
        renew_hopes(views, None, (now - started).total_seconds(), tick)
        for view, one in zip(views, self._offers, strict=True):
            if one.pool not in prices:
                view.available = False
        return views

    def _batch_seconds(self) -> float | None:
        """That a machine takes for a batch, all its workers together; None: too few are done."""
        if time.monotonic() - self._measured_at >= MEASURED_AGAIN_WALL_SECONDS:
            run = self._run
            if run.tally is None or run.tally.done < LEAST_BATCHES_PER_MACHINE * run.job.machines:
                return None
            self._measured, self._measured_at = run.machine_seconds() / run.tally.done, time.monotonic()
        return self._measured


def _lost(past: PastRound) -> dict[CapacityPool, datetime]:
    """Pools that refused machines of a round, or took them, and when they last did."""
    found = dict.fromkeys(past.refused_pools, past.answered_at)
    for pool, at in past.taken:
        found[pool] = max(at, found.get(pool, at))
    return found
