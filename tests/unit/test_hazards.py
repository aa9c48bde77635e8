"""Hazards by age, from the lives that a store has seen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from holdfast.drivers.protocol import CapacityPool
from holdfast.market.hazards import hazards_by_age
from holdfast.market.history import Life

NOW = datetime(2026, 12, 1, tzinfo=UTC)
POOL = CapacityPool("aws", "us-east-1", "us-east-1a", "g5.xlarge", "spot")


def life(hours: float, outcome: str = "preempted", pool: CapacityPool = POOL) -> Life:
    return Life(
        run="r", token="1", pool=pool, launched_at=NOW - timedelta(hours=hours), ended_at=NOW, recorded_at=NOW,
        outcome=outcome,  # type: ignore[arg-type]
    )  # fmt: skip


def test_young_machines_that_are_taken_often_have_a_hazard_of_their_own() -> None:
    lives = [life(0.1)] * 30 + [life(10.0, "finished")] * 30
    rates = dict(hazards_by_age(lives, POOL, 0.05))
    assert rates[0.0] == pytest.approx((2 + 30) / (40 + 30 * 0.1 + 30 / 6), abs=1e-6)
    assert rates[0.0] > 10 * rates[5 * 3600.0]
    assert rates[5 * 3600.0] == pytest.approx(2 / (40 + 150), abs=1e-6)


def test_ages_that_nobody_has_lived_through_keep_the_prior_and_other_machines_say_nothing() -> None:
    other = CapacityPool("aws", "us-east-1", "us-east-1a", "p4d.24xlarge", "spot")
    on_demand = CapacityPool("aws", "us-east-1", "us-east-1a", "g5.xlarge", "on-demand")
    rates = dict(hazards_by_age([life(0.1), life(50.0, pool=other), life(50.0, pool=on_demand)], POOL, 0.05))
    assert rates[3600.0] == rates[5 * 3600.0] == 0.05
    assert hazards_by_age([life(50.0, pool=other)], POOL, 0.05) == ()
    assert hazards_by_age([life(1.0)], POOL, 0.0) == ()
