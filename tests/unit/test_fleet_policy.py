"""Which machines a fleet asks for next: plain values in, a plain value out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from datetime import timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.placement.fleet_policy import (
    MOST_POOLS,
    FleetSituation,
    LaunchRound,
    Paced,
    PastRound,
    decide_round,
    missing,
)
from holdfast.placement.policy import GiveUp, Wait
from tests.unit.test_placement import MINUTE, NOW


def offer(zone: str, model: str = "spot", usd: float = 0.4, kind: str = "g5", on_demand_usd: float = 1.0) -> Offer:
    return Offer(
        pool=CapacityPool("local", zone[:-1], zone, kind, model),  # type: ignore[arg-type]
        usd_per_hour=usd,
        on_demand_usd_per_hour=on_demand_usd,
        vcpus=4,
        memory_gib=16,
    )


ZONES = ("x-1a", "x-1b", "y-1a", "y-1b")
OFFERS = [
    *(offer(zone, "spot", 0.40 + 0.01 * number) for number, zone in enumerate(ZONES)),
    *(offer(zone, "on-demand", 1.0) for zone in ZONES),
]


def situation(**changes: Any) -> FleetSituation:
    fields: dict[str, Any] = {
        "now": NOW,
        "offers": OFFERS,
        "rounds": [],
        "machines": 10,
        "spot_share": 0.8,
        "filled": Counter(),
        "replaced": 0,
        "max_replacements": 100,
        "restart_seconds": 120.0,
        "save_seconds": 0.0,
    }
    return FleetSituation(**{**fields, **changes})


def past(
    region: str = "x-1",
    spot: int = 8,
    refused: tuple[str, ...] = (),
    refusal: str | None = None,
    taken: int = 0,
    finished: bool = False,
    minutes_ago: float = 0,
) -> PastRound:
    """`refused`: the models that gave less than was asked."""
    at = NOW - minutes_ago * MINUTE
    pools = [one.pool for one in OFFERS if one.pool.region == region]
    return PastRound(
        pools=pools,
        spot=spot,
        answered_at=at,
        refusal=refusal,  # type: ignore[arg-type]
        refused_pools=[pool for pool in pools if pool.provisioning_model in refused],
        taken=[(pools[0], at)] * taken,
        finished=finished,
    )


def launched(decision: object) -> tuple[str, int, int]:
    assert isinstance(decision, LaunchRound), decision
    assert len({(one.pool.cloud, one.pool.region) for one in decision.offers}) == 1
    models = {one.pool.provisioning_model for one in decision.offers}
    assert models == ({"spot"} if decision.spot else set()) | ({"on-demand"} if decision.on_demand else set())
    return decision.offers[0].pool.region, decision.spot, decision.on_demand


def test_a_fleet_begins_in_the_cheapest_region_with_both_models() -> None:
    assert launched(decide_round(situation())) == ("x-1", 8, 2)
    assert launched(decide_round(situation(spot_share=1.0))) == ("x-1", 10, 0)
    assert launched(decide_round(situation(spot_share=0.0))) == ("x-1", 0, 10)


def test_only_what_is_missing_is_asked_for_and_in_the_model_that_it_is_missing_of() -> None:
    assert decide_round(situation(filled=Counter({"spot": 8, "on-demand": 2}))) is None
    assert launched(decide_round(situation(filled=Counter({"spot": 5, "on-demand": 2}))))[1:] == (3, 0)
    assert launched(decide_round(situation(filled=Counter({"spot": 8, "on-demand": 1}))))[1:] == (0, 1)


def test_on_demand_machines_that_stand_in_for_spot_leave_no_place_empty() -> None:
    assert missing(situation(filled=Counter({"spot": 4, "on-demand": 6}))) == (0, 0)
    assert missing(situation(filled=Counter({"spot": 4, "on-demand": 5}))) == (1, 0)


def test_a_refusal_leads_to_the_next_region_then_to_a_wait_that_doubles() -> None:
    both = ("spot", "on-demand")
    first = past("x-1", refused=both, refusal="no-capacity")
    second = past("y-1", refused=both, refusal="no-capacity")
    assert launched(decide_round(situation(rounds=[first])))[0] == "y-1"
    waited = decide_round(situation(rounds=[first, second]))
    assert isinstance(waited, Wait) and waited.until == NOW + timedelta(seconds=30)
    # Two sweeps: the second time, on-demand has been asked as often, and the wait is longer.
    more = [
        past("x-1", spot=0, refused=both, refusal="no-capacity"),
        past("y-1", spot=0, refused=both, refusal="quota"),
    ]
    again = decide_round(situation(rounds=[first, second, *more[:1]], now=NOW + MINUTE))
    assert launched(again)[0] == "y-1"


def test_after_three_failed_rounds_in_a_row_what_is_missing_is_on_demand() -> None:
    filled = Counter({"spot": 7, "on-demand": 2})
    two = situation(filled=filled, rounds=[past(taken=1, minutes_ago=20), past(taken=1, minutes_ago=15)])
    assert launched(decide_round(two))[1:] == (1, 0)
    rounds = [*two.rounds, past(taken=1, minutes_ago=12)]
    third = decide_round(situation(filled=filled, rounds=rounds))
    assert launched(third)[1:] == (0, 1) and third.fell_back  # type: ignore[union-attr]
    once_more = decide_round(situation(filled=filled, rounds=[*rounds, past(spot=0)]))
    assert launched(once_more)[1:] == (0, 1) and not once_more.fell_back  # type: ignore[union-attr]


def test_a_round_of_which_something_finished_has_not_failed() -> None:
    rounds = [past(taken=1), past(taken=1, finished=True), past(taken=1), past(taken=1)]
    assert launched(decide_round(situation(filled=Counter({"spot": 7, "on-demand": 2}), rounds=rounds)))[1:] == (1, 0)


def test_quota_that_was_refused_is_not_asked_again() -> None:
    refused = [past(region, refusal="quota", minutes_ago=60) for region in ("x-1", "y-1")]
    assert launched(decide_round(situation(rounds=refused[:1])))[0] == "y-1"
    assert isinstance(decide_round(situation(rounds=refused)), GiveUp)
    spot_alone = [
        dataclasses.replace(one, pools=[pool for pool in one.pools if pool.provisioning_model == "spot"])
        for one in refused
    ]
    instead = decide_round(situation(rounds=spot_alone))
    assert launched(instead)[1:] == (0, 10) and instead.fell_back  # type: ignore[union-attr]


def test_more_replacements_than_the_job_allows_end_the_run() -> None:
    given = {"max_replacements": 3, "filled": Counter({"spot": 7, "on-demand": 2})}
    assert isinstance(decide_round(situation(replaced=3, **given)), LaunchRound)
    refused = past(refused=("spot",), refusal="no-capacity")
    gave_up = decide_round(situation(replaced=3, rounds=[refused], **given))
    assert isinstance(gave_up, GiveUp) and "more than max_replacements, 3" in gave_up.reason


def test_no_pool_that_costs_more_than_twice_the_best_is_named_and_never_too_many() -> None:
    dear = [offer("x-1a", "spot", 0.9, "dear"), *(offer("x-1a", "spot", 0.5, f"kind-{n}") for n in range(20))]
    decision = decide_round(situation(offers=[*OFFERS, *dear], spot_share=1.0))
    assert isinstance(decision, LaunchRound) and len(decision.offers) == MOST_POOLS
    assert all(one.usd_per_hour <= 0.8 for one in decision.offers)


@given(
    machines=st.integers(1, 1000),
    share=st.floats(0, 1),
    spot=st.integers(0, 1000),
    on_demand=st.integers(0, 1000),
)
def test_what_is_asked_for_fills_the_fleet_exactly_and_keeps_the_share(
    machines: int, share: float, spot: int, on_demand: int
) -> None:
    filled = Counter({"spot": spot, "on-demand": on_demand})
    asked = missing(situation(machines=machines, spot_share=share, filled=filled))
    assert min(asked) >= 0 and sum(asked) == max(0, machines - spot - on_demand)
    if not spot + on_demand:
        assert asked[0] == round(machines * share)
        # What a driver makes of the share that it is sent is the same number of spot machines.
        assert round(sum(asked) * (asked[0] / sum(asked))) == asked[0]


def paced(model: str | None) -> Paced:
    return Paced(model=model, reason="slack 3 h", again_at=NOW + 10 * MINUTE)  # type: ignore[arg-type]


def test_with_a_deadline_its_policy_says_what_the_places_of_spot_are() -> None:
    tired = [past(taken=1, minutes_ago=30 - number) for number in range(5)]
    as_spot = decide_round(situation(rounds=tired, paced=paced("spot")))
    assert isinstance(as_spot, LaunchRound) and (as_spot.spot, as_spot.on_demand) == (
        8,
        2,
    )  # no fallback after three rounds
    assert as_spot.reason.startswith("slack 3 h; ") and not as_spot.fell_back
    instead = decide_round(situation(rounds=tired, paced=paced("on-demand")))
    assert isinstance(instead, LaunchRound) and (instead.spot, instead.on_demand) == (0, 10) and instead.fell_back
    base = decide_round(situation(rounds=tired, paced=paced(None)))
    assert isinstance(base, LaunchRound) and (base.spot, base.on_demand) == (0, 2)  # spot's places wait


def test_with_a_deadline_no_wait_is_longer_than_until_its_policy_is_asked_again() -> None:
    waits = decide_round(situation(spot_share=1.0, paced=paced(None)))
    assert waits == Wait(NOW + 10 * MINUTE, "slack 3 h")
    everywhere = [past(region, refused=("spot",)) for region in ("x-1", "y-1") for _ in range(20)]
    refused = decide_round(situation(spot_share=1.0, rounds=everywhere, paced=paced("spot")))
    assert isinstance(refused, Wait) and refused.until <= NOW + 10 * MINUTE


def test_a_deadline_knows_no_quota() -> None:
    rounds = [past(region, refusal="quota") for region in ("x-1", "y-1")]
    spot_is_refused = [
        dataclasses.replace(one, pools=[pool for pool in one.pools if pool.provisioning_model == "spot"])
        for one in rounds
    ]
    decision = decide_round(situation(spot_share=1.0, rounds=spot_is_refused, paced=paced("spot")))
    assert isinstance(decision, LaunchRound) and (decision.spot, decision.on_demand) == (0, 10)
