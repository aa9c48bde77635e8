"""Which pool next. Plain values in, a plain value out: every story here is a list of what has happened so far."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.placement.policy import (
    GiveUp,
    Launch,
    PastAttempt,
    Situation,
    Wait,
    decide,
    failed_spot_attempts_in_a_row,
    rank,
    usd_per_useful_hour,
)

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def offer(zone: str, model: str = "spot", usd: float = 0.4, kind: str = "g5", interruptions: float = 0.0) -> Offer:
    return Offer(
        pool=CapacityPool("local", zone[:-1], zone, kind, model),  # type: ignore[arg-type]
        usd_per_hour=usd,
        on_demand_usd_per_hour=1.0,
        vcpus=4,
        memory_gib=16,
        interruptions_per_hour=interruptions,
    )


OFFERS = [
    *(offer(zone, "spot", usd) for zone, usd in (("a", 0.40), ("b", 0.41), ("c", 0.42))),
    *(offer(zone, "on-demand", usd) for zone, usd in (("a", 1.00), ("b", 1.01), ("c", 1.02))),
]


def past(
    what: str, zone: str = "a", minutes_ago: float = 0, model: str = "spot", progress: bool = False
) -> PastAttempt:
    return PastAttempt(
        pool=CapacityPool("local", zone[:-1], zone, "g5", model),  # type: ignore[arg-type]
        outcome=what,  # type: ignore[arg-type]
        ended_at=NOW - minutes_ago * MINUTE,
        made_progress=progress,
    )


def situation(*attempts: PastAttempt, **changes: Any) -> Situation:
    given = {
        "now": NOW,
        "offers": OFFERS,
        "attempts": attempts,
        "provisioning": "spot-then-on-demand",
        "failed_spot_attempts_to_fall_back": 3,
        "max_attempts": 50,
        "restart_seconds": 120.0,
        "save_seconds": 1.0,
    }
    return Situation(**{**given, **changes})


def chosen(*attempts: PastAttempt, **changes: Any) -> str:
    """Zone and provisioning model of the next launch; '!' marks the step from spot to on-demand."""
    decision = decide(situation(*attempts, **changes))
    assert isinstance(decision, Launch)
    pool = decision.offer.pool
    return f"{pool.zone} {pool.provisioning_model}{'!' * decision.fell_back}"


def test_a_run_begins_on_the_cheapest_spot_pool() -> None:
    assert chosen() == "a spot"


def test_after_three_failed_spot_attempts_it_goes_on_demand_in_another_zone() -> None:
    story = [past("preempted", "a", 9), past("no-capacity", "b", 6), past("lost", "a", 3)]
    assert [chosen(*story[:length]) for length in range(4)] == ["a spot", "b spot", "c spot", "b on-demand!"]


def test_the_fallback_happens_once_and_lasts() -> None:
    failed = [past("preempted", zone, 30) for zone in "abc"]
    on_demand = past("program-failed", "b", 20, "on-demand", progress=True)
    assert chosen(*failed, on_demand) == "a on-demand"


def test_an_attempt_that_made_progress_begins_the_count_anew() -> None:
    story = [past("preempted"), past("preempted"), past("preempted", progress=True), past("preempted")]
    assert failed_spot_attempts_in_a_row(story) == 1
    assert chosen(*story).endswith(" spot")
    assert chosen(*story, past("no-capacity"), past("lost")).endswith(" on-demand!")


@pytest.mark.parametrize("outcome", ["no-capacity", "quota", "preempted", "lost"])
def test_what_the_cloud_did_counts_as_a_failed_spot_attempt(outcome: str) -> None:
    assert failed_spot_attempts_in_a_row([past(outcome)] * 3) == 3


@pytest.mark.parametrize("outcome", ["program-failed", "moved", "cancelled"])
def test_what_the_program_or_a_person_did_does_not_count(outcome: str) -> None:
    assert failed_spot_attempts_in_a_row([past("preempted"), past(outcome), past("preempted")]) == 2


def test_the_job_says_after_how_many_failures() -> None:
    assert chosen(past("lost"), failed_spot_attempts_to_fall_back=1).endswith(" on-demand!")
    assert chosen(*[past("lost")] * 4, failed_spot_attempts_to_fall_back=5).endswith(" spot")


def test_a_refused_pool_is_asked_after_the_others_for_ten_minutes() -> None:
    refused_then_progress = [past("no-capacity", "a", 9.9), past("preempted", "b", 0, progress=True)]
    assert chosen(*refused_then_progress) == "c spot"
    long_ago = [past("no-capacity", "a", 10), past("preempted", "b", 0, progress=True)]
    assert chosen(*long_ago) == "a spot"


def test_when_every_pool_has_refused_it_waits_and_longer_from_round_to_round() -> None:
    def waits(rounds: int) -> float:
        story = [past("no-capacity", zone) for _ in range(rounds) for zone in "abc"]
        decision = decide(situation(*story, provisioning="spot"))
        assert isinstance(decision, Wait) and "all 3 spot pools" in decision.reason
        return (decision.until - NOW).total_seconds()

    assert [waits(rounds) for rounds in (1, 2, 3, 10)] == [30, 60, 120, 600]
    later = [past("no-capacity", zone, minutes_ago=0.5) for zone in "abc"]
    assert isinstance(decide(situation(*later, provisioning="spot")), Launch)


def test_a_round_that_is_not_complete_waits_for_nothing() -> None:
    story = [past("no-capacity", "a"), past("preempted", "b"), past("no-capacity", "c"), past("no-capacity", "a")]
    assert isinstance(decide(situation(*story, provisioning="spot")), Launch)


def test_when_every_pool_is_hot_the_zone_that_failed_just_now_comes_last() -> None:
    story = [past("preempted", zone, 1, progress=True) for zone in "cba"]
    assert [offered.pool.zone for offered in rank(OFFERS[:3], situation(*story))] == ["b", "c", "a"]


def test_a_zone_without_spot_is_still_good_for_on_demand_but_after_the_others() -> None:
    story = [past("no-capacity", "a", 3), past("no-capacity", "b", 2), past("no-capacity", "c", 1)]
    assert chosen(*story) == "a on-demand!"
    assert [offered.pool.zone for offered in rank(OFFERS[3:], situation(*story))] == ["a", "b", "c"]


def test_a_run_that_was_moved_from_on_demand_tries_spot_again() -> None:
    story = [past("lost", zone, 30) for zone in "abc"]
    story += [past("moved", "b", 1, "on-demand")]
    assert chosen(*story) == "a spot"
    assert chosen(*story, past("lost", "a"), past("lost", "b")) == "c spot"
    assert chosen(*story, past("lost", "a"), past("lost", "b"), past("lost", "c")).endswith(" on-demand!")


def test_a_job_for_one_provisioning_model_gets_no_other() -> None:
    assert chosen(*[past("lost", "a")] * 10, provisioning="spot") == "b spot"
    assert chosen(provisioning="on-demand") == "a on-demand"


def test_it_gives_up_at_max_attempts_and_says_so() -> None:
    assert isinstance(decide(situation(*[past("lost")] * 4, max_attempts=5)), Launch)
    decision = decide(situation(*[past("lost")] * 5, max_attempts=5))
    assert isinstance(decision, GiveUp)
    assert "5 attempts were made, which is max_attempts; raise it" in decision.reason


def test_it_gives_up_when_nothing_of_the_model_fits() -> None:
    decision = decide(situation(offers=OFFERS[3:]))
    assert isinstance(decision, GiveUp) and "no spot pool fits" in decision.reason


def region(name: str, cloud: str = "aws", usd: float = 0.4, model: str = "spot") -> list[Offer]:
    return [
        Offer(
            pool=CapacityPool(cloud, name, f"{name}{zone}", "g5", model),  # type: ignore[arg-type]
            usd_per_hour=usd,
            on_demand_usd_per_hour=1.0,
            vcpus=4,
            memory_gib=16,
        )
        for zone in "ab"
    ]


EVERYWHERE = [*region("near", usd=0.5), *region("far", usd=0.3), *region("other", "gcp", usd=0.2)]


def refused_in(*pools: Offer, outcome: str = "no-capacity") -> list[PastAttempt]:
    return [
        PastAttempt(
            pool=one.pool,
            outcome=outcome,  # type: ignore[arg-type]
            ended_at=NOW,
            made_progress=False,
            detail=f"of {one.pool.region} no more",
        )
        for one in pools
    ]


def test_a_refusal_leads_to_the_next_zone_then_to_the_next_region_then_to_the_other_cloud() -> None:
    near, far, other = EVERYWHERE[:2], EVERYWHERE[2:4], EVERYWHERE[4:]
    told: list[str] = []
    story: list[PastAttempt] = refused_in(near[0])
    for _ in range(5):
        decision = decide(situation(*story, offers=EVERYWHERE, failed_spot_attempts_to_fall_back=9))
        assert isinstance(decision, Launch)
        told.append(decision.offer.pool.zone)
        story += refused_in(decision.offer)
    assert told == [near[1].pool.zone, *(o.pool.zone for o in far), *(o.pool.zone for o in other)]


def test_after_a_preemption_and_for_on_demand_the_price_decides() -> None:
    taken = refused_in(EVERYWHERE[0], outcome="preempted")
    decision = decide(situation(*taken, offers=EVERYWHERE))
    assert isinstance(decision, Launch) and decision.offer.pool.region == "other"
    on_demand = [*region("near", model="on-demand", usd=1.0), *region("far", model="on-demand", usd=0.7)]
    refused = refused_in(*EVERYWHERE[:2], EVERYWHERE[0])
    decision = decide(situation(*refused, offers=[*EVERYWHERE, *on_demand]))
    assert isinstance(decision, Launch) and decision.fell_back and decision.offer.pool.region == "far"


def test_a_cooled_down_pool_is_asked_again_later() -> None:
    story = refused_in(EVERYWHERE[4])
    later = situation(*story, offers=EVERYWHERE, now=NOW + timedelta(minutes=11))
    first, second, *_ = rank(EVERYWHERE, later)
    assert (first.pool.zone, second.pool.zone) == ("othera", "otherb")  # by price again


def test_a_region_s_quota_leads_to_another_region_and_the_refused_one_is_never_asked_again() -> None:
    story = refused_in(EVERYWHERE[0], outcome="quota")
    decision = decide(situation(*story, offers=EVERYWHERE))
    assert isinstance(decision, Launch) and decision.offer.pool.region == "far"
    hours_later = decide(situation(*story, offers=EVERYWHERE[:2], now=NOW + timedelta(hours=9), provisioning="spot"))
    assert isinstance(hours_later, GiveUp)


def test_a_spot_quota_leads_to_on_demand_where_the_job_allows_it_and_else_to_an_end_that_says_why() -> None:
    offers = [*region("near"), *region("near", model="on-demand", usd=1.0)]
    story = refused_in(offers[0], outcome="quota")
    decision = decide(situation(*story, offers=offers))
    assert isinstance(decision, Launch) and decision.fell_back
    assert decision.offer.pool.provisioning_model == "on-demand"
    end = decide(situation(*story, offers=offers, provisioning="spot"))
    assert isinstance(end, GiveUp) and "of near no more" in end.reason


def test_the_reason_says_what_was_counted_and_what_it_costs() -> None:
    decision = decide(situation(past("lost", "a"), past("lost", "b")))
    assert isinstance(decision, Launch)
    assert decision.reason == "2 of 3 spot attempts in a row failed; c at $0.420/h is the best of 3 pools"


def test_a_cheap_pool_that_dies_every_minute_is_no_bargain() -> None:
    restless, steady = offer("a", usd=0.40, interruptions=60.0), offer("b", usd=0.60, interruptions=0.01)
    assert [offered.pool.zone for offered in rank([restless, steady], situation())] == ["b", "a"]


def test_an_interruption_an_hour_with_2_minutes_to_restart_costs_a_thirtieth_and_the_saves() -> None:
    flaky = offer("a", usd=1.0, interruptions=1.0)
    assert usd_per_useful_hour(flaky, 120, 0) == pytest.approx(1 + 120 / 3600)
    assert usd_per_useful_hour(flaky, 0, 2) == pytest.approx(1 + (2 * 2 / 3600) ** 0.5)
    assert usd_per_useful_hour(offer("a", usd=1.0), 120, 2) == 1.0


outcomes = st.sampled_from(["no-capacity", "quota", "preempted", "lost", "program-failed", "moved", "cancelled"])
stories = st.lists(
    st.builds(
        past, outcomes, st.sampled_from("abc"), st.floats(0, 60), st.sampled_from(["spot", "on-demand"]), st.booleans()
    ),
    max_size=12,
)


@given(stories)
def test_whatever_has_happened_the_same_story_gives_the_same_decision(story: list[PastAttempt]) -> None:
    one, again = decide(situation(*story)), decide(situation(*story, offers=OFFERS[::-1]))
    assert one == again
    quotas = {attempt.provisioning_model for attempt in story if attempt.outcome == "quota"}
    if "on-demand" not in quotas:
        assert isinstance(one, Launch) and one.offer in OFFERS
    if isinstance(one, Launch):
        assert one.offer.pool.provisioning_model not in quotas
        if one.fell_back:
            assert story[-1].provisioning_model == "spot"
            assert failed_spot_attempts_in_a_row(story) >= 3 or "spot" in quotas
