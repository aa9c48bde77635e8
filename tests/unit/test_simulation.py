"""Simulated runs: no feasible deadline is missed, no policy beats the bound, and the figures are those of hand-made markets."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.errors import ConfigError
from holdfast.ledger.billing import BillingTerms
from holdfast.market.traces import Trace
from holdfast.placement.policies import POLICIES, Terms, policy_named
from holdfast.placement.situation import Decision, Situation
from holdfast.simulation.engine import SimulatedPool, Workload, omniscient_usd, simulate
from holdfast.simulation.fitted import FittedMarket
from holdfast.simulation.outcomes import Distribution, Outcome, sentence
from holdfast.simulation.plots import draw
from holdfast.simulation.study import Drawn, Question, Recorded, Study, carry_out

SPOT_USD, ON_DEMAND_USD = 1.0, 3.0
TICK = 600.0
BY_THE_SECOND = BillingTerms(minimum_seconds=0.0)


def offer(model: str, zone: str = "z1") -> Offer:
    pool = CapacityPool("local", "r", zone, "t", model)  # type: ignore[arg-type]
    usd = SPOT_USD if model == "spot" else ON_DEMAND_USD
    return Offer(pool=pool, usd_per_hour=usd, on_demand_usd_per_hour=ON_DEMAND_USD, vcpus=1, memory_gib=1)


OFFERS = [offer("spot"), offer("on-demand")]


def trace(*stretches: int, first: bool = True, name: str = "trace") -> Trace:
    """Stretches of ticks with capacity and without, in turn."""
    data, state = b"", first
    for ticks in stretches:
        data += (b"\x01" if state else b"\x00") * ticks
        state = not state
    return Trace(TICK, data, name)


def run(workload: Workload, recorded: Trace, policy: str, seed: int = 0) -> Outcome:
    pools = [SimulatedPool("spot", True, SPOT_USD, recorded), SimulatedPool("on-demand", False, ON_DEMAND_USD)]
    made = policy_named(policy, Terms(offers=OFFERS))
    return simulate(workload, pools, made, TICK, BY_THE_SECOND, draw=random.Random(seed))


def test_the_figures_of_a_run_that_is_preempted_once_without_notice() -> None:
    """An hour of capacity, half an hour without, then for ever; two hours of work, boot 100 s, a commit every 700 s."""
    workload = Workload(work_seconds=7200, boot_seconds=100, checkpoint_seconds=700, noticed_share=0.0)
    outcome = run(workload, trace(6, 3, 100), "greedy")
    assert (outcome.interruptions, outcome.launches) == (1, 2)
    assert outcome.lost_seconds == 0.0  # (3600 - 100) is a whole number of commits
    assert outcome.refusals == 2  # at its end, and at every tick until there is capacity again
    odd = run(replace(workload, boot_seconds=150), trace(6, 3, 100), "greedy")
    assert odd.lost_seconds == pytest.approx(3450 - 4 * 700)
    billed = 3600 + 150 + 7200 - 2800
    assert odd.usd == pytest.approx(billed / 3600 * SPOT_USD) and odd.spot_seconds == pytest.approx(billed)
    assert odd.finish_seconds == pytest.approx(5400 + 150 + 7200 - 2800, abs=5)


def test_an_announced_preemption_loses_nothing_and_the_first_hour_may_be_free() -> None:
    workload = Workload(work_seconds=7200, boot_seconds=150, checkpoint_seconds=700, noticed_share=1.0)
    assert run(workload, trace(5, 1, 100), "greedy").lost_seconds == 0
    pools = [SimulatedPool("spot", True, SPOT_USD, trace(5, 1, 100)), SimulatedPool("od", False, ON_DEMAND_USD)]
    free = BillingTerms(free_if_preempted_within_seconds=3600)
    paid = simulate(workload, pools, policy_named("greedy", Terms(offers=OFFERS)), TICK, free)
    assert paid.usd == pytest.approx((150 + 7200 - 2850) / 3600 * SPOT_USD)


def test_the_default_falls_back_after_three_failures_and_greedy_at_the_last_safe_instant() -> None:
    never = trace(400, first=False)
    workload = Workload(work_seconds=7200, deadline_seconds=20_000, boot_seconds=100)
    default = run(workload, never, "spot-then-on-demand")
    assert (default.refusals, default.launches) == (3, 1) and default.finish_seconds < 7200 + 100 + 120
    greedy = run(workload, never, "greedy")
    assert 20_000 - 2 * TICK <= greedy.finish_seconds <= 20_000 and not greedy.late
    assert greedy.usd == pytest.approx((7200 + 100) / 3600 * ON_DEMAND_USD)


def test_the_time_that_the_orchestrator_and_the_machine_take_is_simulated_too() -> None:
    """An hour of capacity, half an hour without, then for ever; two hours of work."""
    workload = Workload(
        work_seconds=7200, begin_seconds=7, launch_seconds=3, boot_seconds=100, stop_seconds=20, refusal_seconds=15,
        detect_seconds=40, noticed_share=1.0, notice_seconds=120, unused_notice_seconds=30,
    )  # fmt: skip
    outcome = run(workload, trace(6, 3, 100), "greedy")
    first_seconds = 3600 - 30 - 10  # launched after 10 s, gone 30 s before it is taken
    trained = first_seconds - 20 - 100
    # From the decision at 3610 on it waits a tick each time: asked in vain twice, a machine comes the third time.
    launched = 3610 + TICK + 2 * (15 + TICK) + 3
    last_seconds = 100 + 7200 - trained + 20
    assert (outcome.launches, outcome.refusals, outcome.interruptions, outcome.lost_seconds) == (2, 2, 1, 0)
    assert outcome.spot_seconds == pytest.approx(first_seconds + last_seconds)
    assert [how for _, how, _ in outcome.way] == ["preempted", "finished"]
    assert outcome.finish_seconds == pytest.approx(launched + last_seconds - 20)


def test_a_machine_that_is_told_of_its_end_before_its_first_step_ends_when_it_hears_it() -> None:
    workload = Workload(
        work_seconds=3600, boot_seconds=300, noticed_share=1.0, notice_seconds=500, short_life_seconds=200
    )
    outcome = run(workload, trace(1, 1, 100), "greedy")
    assert outcome.way[0] == (True, "preempted", 200.0)


def test_a_machine_that_is_asked_to_leave_trains_on_until_it_hears_it() -> None:
    pools = [SimulatedPool("spot", True, SPOT_USD, trace(100)), SimulatedPool("on-demand", False, ON_DEMAND_USD)]

    class Moves:
        asks_while_running = True

        def decide(self, situation: Situation) -> Decision:
            return Decision(0 if situation.now_seconds >= 1200 else 1, "now")

    workload = Workload(work_seconds=3600, boot_seconds=100, stop_seconds=20, obey_seconds=10, detect_seconds=5)
    outcome = simulate(workload, pools, Moves(), TICK, BY_THE_SECOND)
    assert outcome.way == [(False, "moved", 1230.0), (True, "finished", pytest.approx(100 + 3600 - 1110 + 20))]


stretches = st.lists(st.integers(1, 30), min_size=1, max_size=30)


@settings(max_examples=120, deadline=None)
@given(
    stretches=stretches,
    first=st.booleans(),
    work=st.floats(600, 40_000),
    room=st.floats(0, 30_000),
    boot=st.floats(0, 900),
    commit=st.sampled_from([0.0, 300.0, 1800.0]),
    noticed=st.floats(0, 1),
    policy=st.sampled_from(sorted(POLICIES)),
    seed=st.integers(0, 5),
)
def test_no_policy_is_late_where_on_demand_alone_would_be_in_time_nor_beats_the_bound(
    stretches: list[int],
    first: bool,
    work: float,
    room: float,
    boot: float,
    commit: float,
    noticed: float,
    policy: str,
    seed: int,
) -> None:
    workload = Workload(
        work_seconds=work,
        deadline_seconds=work + boot + 20 + room,
        boot_seconds=boot,
        stop_seconds=20,
        checkpoint_seconds=commit,
        noticed_share=noticed,
    )
    recorded = trace(*stretches, first=first)
    outcome = run(workload, recorded, policy, seed)
    assert not outcome.late
    pools = [SimulatedPool("spot", True, SPOT_USD, recorded), SimulatedPool("on-demand", False, ON_DEMAND_USD)]
    bound = omniscient_usd(workload, pools)
    assert outcome.usd >= bound - 1e-6
    assert bound <= (work + boot) / 3600 * ON_DEMAND_USD + 1e-6


@settings(max_examples=60, deadline=None)
@given(stretches=stretches, remove=st.integers(0, 400), work=st.floats(600, 40_000))
def test_removing_capacity_never_lowers_the_omniscient_cost(stretches: list[int], remove: int, work: float) -> None:
    recorded = trace(*stretches)
    place = remove % len(recorded.available)
    less = Trace(TICK, recorded.available[:place] + b"\x00" + recorded.available[place + 1 :], "less")
    workload = Workload(work_seconds=work, deadline_seconds=work * 2, boot_seconds=120)

    def bound(of: Trace) -> float:
        return omniscient_usd(
            workload, [SimulatedPool("spot", True, SPOT_USD, of), SimulatedPool("od", False, ON_DEMAND_USD)]
        )

    assert bound(less) >= bound(recorded) - 1e-9


def test_a_fitted_market_has_the_share_and_the_lengths_of_its_record() -> None:
    recorded = trace(*[12, 3, 40, 5, 7, 9, 25, 2] * 8)
    fitted = FittedMarket.of([recorded])
    drawn = fitted.draw(200_000, random.Random(1))
    seen = sum(recorded.available) / len(recorded.available)
    assert sum(drawn.available) / len(drawn.available) == pytest.approx(seen, abs=0.02)
    assert {ticks for up, ticks in drawn.runs()[1:-1] if up} == {7, 12, 25, 40}
    always = FittedMarket.of([trace(50)]).draw(500, random.Random(1))
    assert sum(always.available) == 500


def question(**changes: object) -> Question:
    workload = Workload(work_seconds=24 * 3600, deadline_seconds=36 * 3600, boot_seconds=300, checkpoint_seconds=1200)
    recorded = trace(*[30, 6, 80, 12, 9, 20, 140, 4] * 4)
    made = Question(
        job="gpt",
        workload=workload,
        offers=OFFERS,
        markets=Recorded([recorded]),
        policies=["greedy", "uniform-progress"],
        chosen="greedy",
        runs=60,
    )
    return replace(made, **changes)


def test_a_study_says_the_same_twice_and_compares_all_policies_on_the_same_markets() -> None:
    told = carry_out(question())
    assert told.to_json() == carry_out(question()).to_json()
    assert {one.policy for one in told.distributions} == {"greedy", "uniform-progress", "on-demand"}
    on_demand = told.of("on-demand")
    assert on_demand.mean("usd") == pytest.approx((24 + 300 / 3600) * ON_DEMAND_USD)
    assert told.bound_usd <= min(one.mean("usd") for one in told.distributions)
    assert told.sentence.endswith("never late") and "on-demand $72.2" in told.sentence
    assert "omniscient bound" in told.to_markdown()
    assert draw(told.distributions, told.bound_usd, 36.0, told.sentence)[:4] == b"\x89PNG"


def test_a_record_that_is_shorter_than_a_run_is_refused_and_a_model_of_it_is_not() -> None:
    short = trace(30, 6, 20, 4, 30)
    with pytest.raises(ConfigError, match="lasts 15 h, but a run may last 36 h"):
        carry_out(question(markets=Recorded([short])))
    told = carry_out(question(markets=Drawn(FittedMarket.of([short])), runs=5))
    assert isinstance(told, Study) and len(told.of("greedy").outcomes) == 5


def test_the_sentence() -> None:
    usd = [40.0] * 41 + [60.3] * 41 + [100.0] * 18
    told = Distribution("ours", [Outcome(usd=one) for one in usd])
    assert sentence(told, 230.4) == "82 % likely under $61; on-demand $230; never late"
    late = Distribution("ours", [Outcome(usd=1.0, late=number < 3) for number in range(500)])
    assert sentence(late, 2.0) == "always under $1.00; on-demand $2.00; late in 3 of 500"
    assert math.isfinite(told.mean("usd"))
