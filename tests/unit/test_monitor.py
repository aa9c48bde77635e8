"""The monitor: what was taken too often lately is avoided, told of, and forgiven in time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from holdfast.clock import WallClock
from holdfast.drivers.protocol import CapacityPool, Machine, Offer
from holdfast.drivers.several import SomeOffers
from holdfast.errors import TransientError
from holdfast.market.history import History, Life
from holdfast.market.informed import InformedMarket, estimates
from holdfast.market.monitor import Judgement, changes, judge, read_judgement, write_judgement
from holdfast.market.traces import Trace
from holdfast.placement.policy import Situation, rank
from holdfast.storage import open_store

NOW = datetime.now(UTC)


def pool(zone: str = "us-east-1a", kind: str = "g5.xlarge", model="spot") -> CapacityPool:
    return CapacityPool("aws", zone[:-1], zone, kind, model)


def lived(where: CapacityPool, hours_ago: float, hours: float, *, preempted: bool = True, number: int = 0) -> Life:
    ended_at = NOW - timedelta(hours=hours_ago)
    return Life(
        run="r",
        token=f"{where}-{hours_ago}-{number}",
        pool=where,
        launched_at=ended_at - timedelta(hours=hours),
        ended_at=ended_at,
        recorded_at=ended_at + timedelta(microseconds=number),
        outcome="preempted" if preempted else "finished",
    )


def machine(where: CapacityPool, hours: float) -> Machine:
    return Machine(id="i", pool=where, state="running", launched_at=NOW - timedelta(hours=hours))


def offer(where: CapacityPool, usd: float = 0.4, **fields) -> Offer:
    return Offer(
        pool=where,
        usd_per_hour=usd,
        on_demand_usd_per_hour=1.0,
        vcpus=4,
        memory_gib=16,
        gpus=1,
        gpu_name="A10G",
        interruptions_per_hour=0.06 if where.provisioning_model == "spot" else 0.0,
        **fields,
    )


def scopes(judgement: Judgement) -> list[str]:
    return [str(alarm.scope) for alarm in judgement.alarms]


def test_more_than_a_quarter_of_the_machines_taken_raises_an_alarm_for_the_pool():
    lives = [
        lived(pool(), 1, 0.5),
        lived(pool(), 2, 0.5),
        *[lived(pool(), 3, 1, preempted=False, number=n) for n in range(4)],
    ]
    found = judge(lives, [], NOW)
    assert scopes(found) == ["aws/us-east-1a/g5.xlarge"]
    assert "2 of 6 spot machines were taken in 6 h" in found.alarms[0].why


def test_more_than_a_tenth_per_instance_hour_raises_it_too():
    calm = [lived(pool(), 0.1, 1.5, preempted=False, number=n) for n in range(7)]
    found = judge([lived(pool(), 1, 1), lived(pool(), 2, 1), *calm], [], NOW)
    assert "more than 0.1 per instance-hour" in found.alarms[0].why


def test_machines_that_still_live_count_with_their_hours():
    lives = [lived(pool(), 1, 2), lived(pool(), 2, 2)]
    assert not judge(lives, [machine(pool(), 40) for _ in range(7)], NOW).alarms
    rates = judge(lives, [machine(pool(), 40)], NOW).rates
    assert rates[-1].hours == pytest.approx(2 + 2 + 6)  # only what lies within the window


def test_one_accident_is_no_alarm_and_what_is_older_than_the_window_is_forgotten():
    assert not judge([lived(pool(), 1, 0.1)], [], NOW).alarms
    assert not judge([lived(pool(), 7, 1), lived(pool(), 6.5, 1)], [], NOW).alarms
    assert not judge([lived(pool(model="on-demand"), 1, 1), lived(pool(model="on-demand"), 2, 1)], [], NOW).alarms


def test_a_family_is_cooled_when_two_of_its_pools_fail_and_a_region_when_two_families_do():
    here = [lived(pool("us-east-1a"), 1, 1), lived(pool("us-east-1b"), 1, 1)]
    assert scopes(judge(here, [], NOW)) == ["aws/us-east-1/g5"]
    both = [*here, lived(pool("us-east-1a", "p4d.24xlarge"), 1, 1), lived(pool("us-east-1b", "p4d.24xlarge"), 1, 1)]
    assert "aws/us-east-1" in scopes(judge(both, [], NOW))


def test_a_cooled_pool_comes_after_a_dearer_one_in_the_ranking_that_runs_use(tmp_path: Path):
    store = open_store(f"file://{tmp_path}")
    cheap, dear = offer(pool("us-east-1a"), 0.40), offer(pool("us-east-1b"), 0.45)
    write_judgement(store, judge([lived(cheap.pool, 1, 3), lived(cheap.pool, 2, 3)], [], NOW))
    informed = InformedMarket(store, WallClock()).inform([cheap, dear])
    assert "were taken in 6 h" in informed[0].cooled and not informed[1].cooled
    assert [one.pool.zone for one in ranked(informed)] == ["us-east-1b", "us-east-1a"]
    assert [one.pool.zone for one in ranked([cheap, dear])] == ["us-east-1a", "us-east-1b"]


def ranked(offers) -> list[Offer]:
    situation = Situation(
        now=NOW,
        offers=offers,
        attempts=[],
        provisioning="spot",
        failed_spot_attempts_to_fall_back=3,
        max_attempts=9,
        restart_seconds=120,
        save_seconds=1,
    )
    return rank(offers, situation)


def test_history_alone_turns_the_ranking_when_the_losses_cost_more_than_the_discount(tmp_path: Path):
    store = open_store(f"file://{tmp_path}")
    cheap, dear = offer(pool("us-east-1a"), 0.400), offer(pool("us-east-1b"), 0.405)
    History(store).record([lived(cheap.pool, 30 + n, 0.5, number=n) for n in range(40)])
    informed = InformedMarket(store, WallClock()).inform([cheap, dear])
    assert informed[0].interruptions_per_hour > 0.7 > 0.1 > cheap.interruptions_per_hour
    assert ranked(informed)[0].pool == dear.pool


def test_a_fleet_asks_for_fewer_spot_machines_only_while_every_pool_that_fits_is_cooled():
    both = [pool("us-east-1a"), pool("us-east-1b")]
    judgement = judge([lived(where, ago, 1) for where in both for ago in (1, 2)], [], NOW)
    offers = [offer(where) for where in both]
    assert judgement.spot_share(0.8, offers) == 0.4
    assert judgement.spot_share(0.8, [*offers, offer(pool("us-west-2a"))]) == 0.8
    assert Judgement(judged_at=NOW).spot_share(0.8, offers) == 0.8


def test_a_judgement_lapses_after_an_hour(tmp_path: Path):
    store = open_store(f"file://{tmp_path}")
    written = judge([lived(pool(), 1, 1), lived(pool(), 2, 1)], [], NOW)
    write_judgement(store, written)
    assert read_judgement(store, NOW + timedelta(minutes=59)) == written
    assert not read_judgement(store, NOW + timedelta(minutes=61)).alarms


def test_only_what_is_new_and_what_is_over_is_told():
    bad = judge([lived(pool(), 1, 1), lived(pool(), 2, 1)], [], NOW)
    calm = Judgement(judged_at=NOW)
    assert changes(calm, bad) == (list(bad.alarms), [])
    assert changes(bad, bad) == ([], [])
    assert changes(bad, calm) == ([], [bad.alarms[0].scope])


def test_what_one_cloud_has_not_told_stays_missing(tmp_path: Path):
    market = InformedMarket(open_store(f"file://{tmp_path}"), WallClock())
    informed = market.inform(SomeOffers([offer(pool())], TransientError("away")))
    assert isinstance(informed, SomeOffers) and str(informed.missing) == "away"


def test_a_store_that_does_not_answer_leaves_the_drivers_estimates():
    class Away:
        url = "file:///away"

        def list(self, prefix: str) -> list:
            raise TransientError("the store does not answer")

    assert InformedMarket(Away(), WallClock()).inform([offer(pool())])[0].interruptions_per_hour == pytest.approx(0.06)


def test_evidence_names_history_family_advice_and_trace():
    offers = [offer(pool("us-east-1a"), capacity_advice="placement score 9 of 10"), offer(pool(model="on-demand"))]
    lives = [lived(pool("us-east-1a"), 0, 10), lived(pool("us-east-1b"), 0, 20)]
    trace = Trace(600.0, bytes([1] * 60 + [0] * 6), "us-east-1a_a10g_1")
    spot, on_demand = estimates(offers, lives, NOW, [trace])
    assert on_demand is None
    for words in ("own history: 1 in 10 h", "g5 in us-east-1: 1 in 20 h", "trace us-east-1a_a10g_1: 1 in 10 h"):
        assert words in spot.evidence
    assert spot.evidence.endswith("prior with placement score 9 of 10: 0.06/h")
