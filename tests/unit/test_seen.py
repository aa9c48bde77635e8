"""A store's history as a record of one pool, and what the policy makes of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from holdfast.drivers.protocol import CapacityPool
from holdfast.market.history import Life
from holdfast.market.seen import SEEN_FOR, TICK_SECONDS, seen_of
from holdfast.placement.fitted_hazards import FITTED
from holdfast.placement.hazards import Belief
from holdfast.placement.least_cost import LeastCost
from holdfast.placement.situation import UNSEEN, PoolView, Seen, Situation

POOL = CapacityPool("aws", "us-east-1", "us-east-1a", "g5.xlarge", "spot")
NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
HOUR = 3600.0


def life(ended_hours_ago: float, hours: float | None, outcome: str = "preempted", pool: CapacityPool = POOL) -> Life:
    """`hours`: None: it was refused."""
    ended_at = NOW - timedelta(hours=ended_hours_ago)
    return Life(
        run="before",
        token=f"{ended_hours_ago}",
        pool=pool,
        launched_at=None if hours is None else ended_at - timedelta(hours=hours),
        ended_at=ended_at,
        recorded_at=ended_at,
        outcome=outcome,  # type: ignore[arg-type]
    )


def stretches(seen: Seen) -> list[tuple[int, int]]:
    """What was seen, and for how many ticks."""
    found: list[tuple[int, int]] = []
    for state in seen.available:
        if found and found[-1][0] == state:
            found[-1] = (state, found[-1][1] + 1)
        else:
            found.append((state, 1))
    return found


def test_lives_become_a_record_of_what_there_was_and_of_where_nobody_looked() -> None:
    elsewhere = replace(POOL, zone="us-east-1b")
    lives = [
        life(5, 2),
        life(4.5, None, "no-capacity"),
        life(1, 1, "finished"),
        life(0.5, 1, "finished"),  # beside the other for half an hour
        life(3, 1, pool=elsewhere),
    ]
    seen = seen_of(lives, POOL, NOW)
    assert seen is not None and seen.gap_seconds == TICK_SECONDS == 60
    assert len(seen.available) == SEEN_FOR / timedelta(minutes=1)
    assert stretches(seen)[1:] == [
        (1, 120), (0, 1), (UNSEEN, 29), (0, 1), (UNSEEN, 149), (1, 90), (UNSEEN, 30),
    ]  # fmt: skip
    assert seen_of([life(5, 2, pool=elsewhere), life(24 * 8, 2)], POOL, NOW) is None


def test_what_reaches_into_the_week_or_ends_this_moment_is_seen() -> None:
    seen = seen_of([life(24 * 7 - 1, 5), life(0, 2)], POOL, NOW)
    assert seen is not None
    told = stretches(seen)
    assert told[0] == (1, 60) and told[1] == (0, 1) and told[-1] == (0, 1) and told[-2] == (1, 119)


def record(*parts: tuple[int, float]) -> Seen:
    return Seen(60.0, b"".join(bytes([state]) * round(hours * 60) for state, hours in parts))


SHAKY = [(1, 0.2), (0, 0.1), (1, 0.3), (0, 0.5), (1, 0.1), (0, 0.2)] * 3


def test_a_stretch_that_nobody_watched_is_of_any_age_but_the_market_is_remembered() -> None:
    watched = Belief.of_history(FITTED, record(*SHAKY, (1, 0.2)), 0.0, True)
    left = Belief.of_history(FITTED, record(*SHAKY, (1, 0.2), (UNSEEN, 5.0)), 0.0, True)
    stable = Belief.of_history(FITTED, record((1, 60.0), (UNSEEN, 5.0)), 0.0, True)
    assert watched and left and stable
    new = Belief(FITTED, True, 0.0)
    assert stable.changed_within(HOUR) < new.changed_within(HOUR) < left.changed_within(HOUR)
    assert left.changed_within(HOUR) < watched.changed_within(HOUR)  # which knows that the stretch is young
    hopeless = Belief.of_history(FITTED, record(*SHAKY, (1, 0.2), (UNSEEN, 5.0)), 0.0, False)
    assert left.available and hopeless and not hopeless.available
    assert Belief.of_history(FITTED, record((UNSEEN, 5.0)), 0.0, True) is None


def test_a_short_time_that_nobody_watched_changes_nothing() -> None:
    whole = Belief.of_history(FITTED, record((1, 10.0)), 0.0, True)
    gappy = Belief.of_history(FITTED, record((1, 4.0), (UNSEEN, 0.5), (1, 5.5)), 0.0, True)
    assert whole and gappy
    assert gappy.changed_within(HOUR) == pytest.approx(whole.changed_within(HOUR), rel=0.05)


def expected_spot_usd(*histories: Seen | None) -> float:
    pools = [PoolView(f"spot-{place}", True, 1.0) for place in range(len(histories))] + [PoolView("demand", False, 3.0)]
    situation = Situation(
        now_seconds=0.0, deadline_seconds=24 * HOUR, work_total_seconds=20 * HOUR, work_done_seconds=0.0,
        restart_seconds=600.0, pools=pools, history=histories,
    )  # fmt: skip
    decision = LeastCost(FITTED).decide(situation)
    assert decision.pool is not None and pools[decision.pool].spot
    return float(decision.reason.split("spot $")[1].split(",")[0])


def test_the_policy_expects_more_of_a_pool_that_has_lasted_than_of_a_shaky_one() -> None:
    stable, shaky = record((1, 60.0), (UNSEEN, 5.0)), record(*SHAKY, (1, 0.2), (UNSEEN, 5.0))
    assert expected_spot_usd(stable) < expected_spot_usd(None) < expected_spot_usd(shaky)


def test_of_several_pools_that_none_had_anything_is_seen_only_where_all_were_looked_at() -> None:
    shaky = record(*SHAKY, (1, 0.2))
    assert expected_spot_usd(shaky, None) < expected_spot_usd(shaky, shaky)
    assert expected_spot_usd(shaky, record((1, 60.0))) < expected_spot_usd(shaky, shaky)
