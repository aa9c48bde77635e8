"""Policies with a deadline, on any market: in time, blind to what is to come, and ours near the exact optimum."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.policy import terms_of
from benchmarks.support.fit_hazards import fit
from benchmarks.support.optimum import optimal_usd
from benchmarks.support.semi_markov import KNOWN, Exact, draw, optimum
from benchmarks.support.tick_market import Setting, play
from holdfast.market.traces import Trace
from holdfast.placement.fitted_hazards import FITTED
from holdfast.placement.hazards import Belief
from holdfast.placement.least_cost import LeastCost
from holdfast.placement.policies import POLICIES, policy_named
from holdfast.placement.situation import Decision, Policy, PoolView, Situation
from holdfast.placement.value_tables import Terms as TableTerms
from holdfast.placement.value_tables import tables

HOUR = 3600.0

markets = st.lists(st.integers(1, 40), min_size=1, max_size=20).flatmap(
    lambda lengths: st.booleans().map(
        lambda first: b"".join(bytes([(place + first) % 2]) * length for place, length in enumerate(lengths))
    )
)
jobs = st.builds(
    Setting,
    work_hours=st.sampled_from([1.0, 4.0, 7.3]),
    deadline_hours=st.just(0.0),
    overhead_hours=st.sampled_from([0.0, 0.05, 0.2, 0.5]),
    tick_seconds=st.sampled_from([60.0, 600.0, 1800.0]),
    spot_usd_per_hour=st.sampled_from([0.1, 0.97, 2.9]),
    on_demand_usd_per_hour=st.just(3.06),
)


def with_room(job: Setting, room_hours: float) -> Setting:
    """A deadline that on-demand alone can keep, on whole ticks."""
    least = math.ceil((job.work_hours + job.overhead_hours) * HOUR / job.tick_seconds + 1e-9)
    ticks = least + math.floor(room_hours * HOUR / job.tick_seconds)
    return replace(job, deadline_hours=ticks * job.tick_seconds / HOUR)


def long_enough(market: bytes, job: Setting) -> bytes:
    return market * (1 + job.ticks // len(market))


@settings(max_examples=60, deadline=None)
@given(market=markets, job=jobs, room=st.floats(0, 6), name=st.sampled_from(sorted(POLICIES)))
def test_no_policy_misses_a_deadline_that_on_demand_can_keep_nor_costs_more_than_on_demand_all_the_time(
    market: bytes, job: Setting, room: float, name: str
) -> None:
    job = with_room(job, room)
    played = play(policy_named(name, terms_of(job)), job, [long_enough(market, job)], 0)
    assert not played.missed
    assert played.usd <= job.ticks * job.tick_seconds / HOUR * job.on_demand_usd_per_hour + 1e-6


@settings(max_examples=25, deadline=None)
@given(
    market=markets,
    other=markets,
    job=jobs,
    room=st.floats(0, 6),
    name=st.sampled_from(sorted(POLICIES)),
    when=st.floats(0, 1),
)
def test_markets_that_are_the_same_up_to_now_get_the_same_decisions(
    market: bytes, other: bytes, job: Setting, room: float, name: str, when: float
) -> None:
    job = with_room(job, room)
    now = int(when * job.ticks)
    first = long_enough(market, job)
    second = first[: now + 1] + long_enough(other, job)
    decisions = [decisions_of(policy_named(name, terms_of(job)), job, record) for record in (first, second)]
    upto = [[one for one in of if one[0] <= now * job.tick_seconds] for of in decisions]
    assert upto[0] == upto[1]


@settings(max_examples=25, deadline=None)
@given(
    market=markets,
    job=jobs,
    room=st.floats(0, 6),
    taken=st.sets(st.integers(0, 60)),
    name=st.sampled_from(sorted(POLICIES)),
)
def test_removing_capacity_never_lowers_the_optimum_which_no_policy_beats(
    market: bytes, job: Setting, room: float, taken: set[int], name: str
) -> None:
    job = with_room(replace(job, overhead_hours=min(job.overhead_hours, job.tick_seconds / HOUR)), room)
    record = long_enough(market, job)
    less = bytes(0 if tick in taken else there for tick, there in enumerate(record))
    with_all, with_less = (float(optimal_usd(job, [one], [0])[0]) for one in (record, less))
    assert with_all <= with_less + 1e-6
    assert with_all <= play(policy_named(name, terms_of(job)), job, [record], 0).usd + 1e-6


@settings(max_examples=20, deadline=None)
@given(first=markets, second=markets, job=jobs, room=st.floats(0, 6), fee=st.sampled_from([0.0, 0.5]))
def test_with_several_pools_it_is_in_time_too_and_more_pools_never_raise_the_optimum(
    first: bytes, second: bytes, job: Setting, room: float, fee: float
) -> None:
    job = with_room(replace(job, overhead_hours=min(job.overhead_hours, job.tick_seconds / HOUR), move_usd=fee), room)
    records = [long_enough(market, job)[: job.ticks] for market in (first, second)]
    played = play(LeastCost(FITTED), job, records, 0)
    assert not played.missed
    both, one = (float(optimal_usd(job, pools, [0])[0]) for pools in (records, records[:1]))
    assert both <= one + 1e-6 and both <= played.usd + 1e-6


def test_where_the_hazards_are_known_it_costs_hardly_more_than_the_exact_optimum() -> None:
    job = Setting(work_hours=12, deadline_hours=15, overhead_hours=0.05)
    least, choices, unit = optimum(job, KNOWN)
    paid = exact = expected = 0.0
    for seed in range(60):
        record, ages = draw(KNOWN, 300 + job.ticks, seed)
        paid += play(LeastCost(KNOWN), job, [record], 300, (Trace(600.0, record[:300], ""),)).usd
        exact += play(Exact(choices, unit, record[300:], ages[300:]), job, [record], 300).usd
        expected += least[record[300], ages[300]]
    assert exact == pytest.approx(expected, rel=0.1)
    assert paid < 1.02 * exact
    values = tables(KNOWN, TableTerms(600.0, 15 * HOUR, 3 * HOUR - 180, 180.0, 0.9731, 3.06))
    assert float(values.expected_usd[1, 0, -1, 0]) == pytest.approx(least[1, 0], rel=0.01)


def test_what_was_seen_of_a_zone_changes_what_is_expected_of_it() -> None:
    scarce, plenty = (b"\x00" * 140 + b"\x01" * 4) * 7, (b"\x01" * 140 + b"\x00" * 4) * 7
    chances = []
    for seen in (scarce, plenty):
        belief = Belief.of_history(FITTED, Trace(600.0, seen + b"\x00" * 12, ""), 0.0, False)
        belief.saw(False, 0.0)
        chances.append(belief.changed_within(HOUR))
    assert chances[0] < 0.9 * chances[1]
    young = Belief.of_history(FITTED, Trace(600.0, b"\x00\x01", ""), 0.0, True)
    rate = young.rate_per_second()
    young.saw(True, 5 * HOUR)
    assert young.rate_per_second() < rate / 4


def test_a_fitted_library_has_the_hazards_of_the_market_that_it_was_fitted_to() -> None:
    library = fit([Trace(600.0, draw(KNOWN, 6000, seed)[0], "drawn") for seed in range(4)], markets=1)
    assert np.array(library.rates)[0, :, :5] * 600 == pytest.approx(
        -np.log(1 - (1 - np.exp(-np.array(KNOWN.rates)[0, :, :5] * 600))), rel=0.3
    )


def situation(*spot_usd: float, current: int | None = None, slack_hours: float = 10.0) -> Situation:
    pools = [PoolView(f"spot-{place}", True, usd) for place, usd in enumerate(spot_usd)] + [
        PoolView("demand", False, 3.0)
    ]
    return Situation(
        now_seconds=0.0, deadline_seconds=(20.0 + slack_hours) * HOUR, work_total_seconds=20 * HOUR, work_done_seconds=0.0,
        restart_seconds=600.0, pools=pools, current=current, sees_all=True,
    )  # fmt: skip


@pytest.mark.parametrize("tick", [37.0, 600.0, 7200.0])
def test_it_decides_at_any_tick_and_gives_its_reasons(tick: float) -> None:
    asked = situation(1.0)
    asked.tick_seconds = tick
    decision = LeastCost(FITTED).decide(asked)
    assert decision.pool == 0 and "least" in decision.reason and "on-demand $" in decision.reason


def test_spot_that_saves_nothing_is_left_alone() -> None:
    assert LeastCost(FITTED).decide(situation(3.0)).pool == 1


def test_it_takes_the_cheapest_pool_and_leaves_a_machine_only_for_one_that_saves_more_than_the_move_costs() -> None:
    assert LeastCost(FITTED).decide(situation(1.0, 0.8)).pool == 1
    assert LeastCost(FITTED).decide(situation(1.0, 0.99, current=0)).pool == 0
    assert LeastCost(FITTED).decide(situation(2.5, 0.3, current=0)).pool == 1


def test_without_a_deadline_it_waits_for_spot() -> None:
    asked = situation(1.0)
    asked.deadline_seconds = math.inf
    assert LeastCost(FITTED).decide(asked).pool == 0
    asked.pools[0].available = False
    assert LeastCost(FITTED).decide(asked).pool is None


@settings(max_examples=25, deadline=None)
@given(
    work=st.sampled_from([1.0, 15.0, 600.0, 72000.0]), slack=st.floats(0.5, 400.0), tick=st.sampled_from([10.0, 600.0])
)
def test_beside_spot_that_is_there_no_tick_is_idle(work: float, slack: float, tick: float) -> None:
    """However small the work is beside the steps of the tables, or the time. Where spot may well not last to the end,
    on-demand can be the cheaper one.
    """
    asked = situation(1.0, slack_hours=slack)
    asked.tick_seconds, asked.work_total_seconds = tick, work
    assert LeastCost(FITTED).decide(asked).pool is not None


@dataclass
class Recorder:
    policy: Policy
    decisions: list[tuple[float, int | None]]
    asks_while_running: bool = True

    def decide(self, situation: Situation) -> Decision:
        decision = self.policy.decide(situation)
        self.decisions.append((situation.now_seconds, decision.pool))
        return decision


def decisions_of(policy: Policy, job: Setting, record: bytes) -> list[tuple[float, int | None]]:
    recorder = Recorder(policy, [])
    play(recorder, job, [record], 0)
    return recorder.decisions


def test_a_pool_that_nobody_has_asked_lately_is_not_worth_leaving_a_machine_for_at_once() -> None:
    asked = situation(1.0, current=1)
    asked.sees_all = False
    asked.pools[0].available, asked.pools[0].since_seconds = False, 0.0
    policy = LeastCost(FITTED)
    policy.decide(asked)
    asked.now_seconds, asked.pools[0].available = 60.0, True  # a hope
    asked.deadline_seconds = 21 * HOUR
    assert policy.decide(asked).pool == 1
    asked.now_seconds = 600.0
    asked.sees_all = True
    asked.deadline_seconds = 32 * HOUR
    assert policy.decide(asked).pool == 0
