"""When to save: as the job says, or at the spacing that loses least."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import holdfast
from holdfast.checkpoint.policy import CheckpointPolicy, auto_interval_seconds, checkpoint_interval_seconds
from holdfast.errors import ConfigError

HOUR = 3600.0


def lost_fraction(interval: float, save_seconds: float, mean_seconds: float) -> float:
    """Share of the time lost to saving and to redoing, by trying: 4000 lives of a machine."""
    draw, lost, lived = random.Random(1), 0.0, 0.0
    for _ in range(4000):
        life = draw.expovariate(1 / mean_seconds)
        whole, rest = divmod(life, interval + save_seconds)
        lost += whole * save_seconds + rest
        lived += life
    return lost / lived


def test_young_s_spacing_for_a_save_of_2_s_and_a_loss_every_4_hours_is_4_minutes() -> None:
    assert checkpoint_interval_seconds(2, 4 * HOUR) == 240


@pytest.mark.parametrize(("save_seconds", "mean_seconds"), [(2, 4 * HOUR), (5, HOUR), (0.5, 600)])
def test_half_or_double_young_s_spacing_loses_more(save_seconds: float, mean_seconds: float) -> None:
    best = checkpoint_interval_seconds(save_seconds, mean_seconds)
    at_best = lost_fraction(best, save_seconds, mean_seconds)
    assert at_best < lost_fraction(best / 2, save_seconds, mean_seconds)
    assert at_best < lost_fraction(best * 2, save_seconds, mean_seconds)


@pytest.mark.parametrize(("save_seconds", "mean_seconds"), [(0, HOUR), (-1, HOUR), (1, 0), (1, -HOUR)])
def test_a_save_or_a_life_of_no_length_is_refused(save_seconds: float, mean_seconds: float) -> None:
    with pytest.raises(ConfigError, match="above zero"):
        checkpoint_interval_seconds(save_seconds, mean_seconds)


@given(st.floats(0, 1e5), st.floats(1, 1e7))
def test_saving_takes_at_most_a_twentieth_of_the_time_and_half_an_hour_is_the_longest(
    save_seconds: float, mean_seconds: float
) -> None:
    interval = auto_interval_seconds(save_seconds, mean_seconds)
    assert interval > 0
    assert save_seconds <= 0.05 * interval * (1 + 1e-12)
    assert interval <= max(1800, 20 * save_seconds * (1 + 1e-12))


def test_every_10_steps_means_every_10_steps() -> None:
    policy = CheckpointPolicy(every_steps=10)
    assert [steps for steps in range(12) if policy.is_due(steps, 1e9, 1.0)] == [10, 11]


def test_every_30_seconds_means_every_30_seconds() -> None:
    policy = CheckpointPolicy(every_seconds=30)
    assert not policy.is_due(10**9, 29.9, 1.0)
    assert policy.is_due(1, 30, 1.0)


def test_auto_saves_first_after_10_steps_or_a_minute_to_learn_what_a_save_costs() -> None:
    policy = CheckpointPolicy()
    assert not policy.is_due(9, 59, None)
    assert policy.is_due(10, 0, None)
    assert policy.is_due(1, 60, None)


def test_auto_then_saves_at_young_s_spacing_for_the_pool_s_interruptions() -> None:
    risky, safe = (CheckpointPolicy(mean_seconds_between_preemptions=hours * HOUR) for hours in (1, 100))
    assert not risky.is_due(1, math.sqrt(2 * 2 * HOUR) - 1, 2.0)
    assert risky.is_due(1, math.sqrt(2 * 2 * HOUR) + 1, 2.0)
    assert not safe.is_due(1, math.sqrt(2 * 2 * HOUR) + 1, 2.0)
    assert CheckpointPolicy().is_due(1, 240, 2.0) and not CheckpointPolicy().is_due(1, 239, 2.0)


# Machines are taken soon or hardly at all, as on public traces: 0.9 per hour at first, 0.02 from the first hour on.
YOUNG_ONES_DIE = ((0.0, 0.9), (600.0, 0.5), (HOUR, 0.02))


def life_of(draw: random.Random) -> float:
    """Seconds that a machine of these hazards lives."""
    age = 0.0
    for (start, rate), end in zip(YOUNG_ONES_DIE, [600.0, HOUR, math.inf], strict=True):
        lived = draw.expovariate(rate / HOUR)
        if start + lived < end:
            return start + lived
        age = end
    return age


def cost_of(
    policy: CheckpointPolicy, save_seconds: float, noticed: float = 0.0, commit_seconds: float = math.inf
) -> float:
    """Share of machine time that saving takes or preemptions destroy, over 200 lives of at most a day."""
    draw, lost, lived = random.Random(3), 0.0, 0.0
    for _ in range(200):
        life = min(life_of(draw), 24 * HOUR)
        at = since = 0.0
        while at < life:
            at, since = at + 40.0, since + 40.0
            if policy.is_due(1, since, save_seconds, at, commit_seconds):
                lost, since, at = lost + save_seconds, 0.0, at + save_seconds
        lost += since if life < 24 * HOUR and draw.random() >= noticed else 0.0
        lived += life
    return lost / lived


def test_a_cadence_by_the_machine_s_age_loses_less_than_any_fixed_one() -> None:
    mean = 6 * HOUR  # about as long as these machines live
    by_age = CheckpointPolicy(mean_seconds_between_preemptions=mean, hazards=YOUNG_ONES_DIE)
    at_best = cost_of(by_age, 20.0)
    for fixed in (
        CheckpointPolicy(mean_seconds_between_preemptions=mean),
        CheckpointPolicy(every_seconds=120.0),
        CheckpointPolicy(every_seconds=400.0),
        CheckpointPolicy(every_seconds=900.0),
        CheckpointPolicy(every_seconds=1800.0),
    ):
        assert at_best < cost_of(fixed, 20.0)


def test_where_a_commit_fits_into_the_notice_fewer_are_worth_their_cost() -> None:
    bound = CheckpointPolicy(mean_seconds_between_preemptions=HOUR, notice_seconds=120.0)
    young = math.sqrt(2 * 2 * HOUR)
    assert bound.is_due(1, young + 1, 2.0, commit_seconds=121) and not bound.is_due(
        1, young + 1, 2.0, commit_seconds=119
    )
    assert bound.is_due(1, young * math.sqrt(10) + 1, 2.0, commit_seconds=119)
    noticed = CheckpointPolicy(hazards=YOUNG_ONES_DIE, notice_seconds=120.0)
    blind = CheckpointPolicy(hazards=YOUNG_ONES_DIE)
    assert cost_of(noticed, 20.0, 0.9, 60.0) < cost_of(blind, 20.0, 0.9, 60.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"every_steps": 0},
        {"every_steps": -1},
        {"every_seconds": 0.0},
        {"every_seconds": float("nan")},
        {"every_seconds": float("inf")},
        {"max_to_keep": 0},
        {"mean_seconds_between_preemptions": 0.0},
        {"every_steps": 1, "every_seconds": 1.0},
    ],
)
def test_a_policy_that_cannot_work_is_refused_by_name(fields: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        CheckpointPolicy(**fields)


@pytest.mark.parametrize(
    "policy",
    [
        CheckpointPolicy(),
        CheckpointPolicy(every_steps=7, max_to_keep=1),
        CheckpointPolicy(every_seconds=0.1, mean_seconds_between_preemptions=1234.5),
        CheckpointPolicy(hazards=YOUNG_ONES_DIE, notice_seconds=30.0),
    ],
)
def test_the_machine_gets_the_very_policy_it_was_given(policy: CheckpointPolicy) -> None:
    assert CheckpointPolicy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("every", ["0 steps", "1.5 steps", "0 s", "-1 s", "often", "", "1.2.3 s", ". s", "5"])
def test_attach_refuses_an_interval_that_means_nothing(every: str) -> None:
    with pytest.raises(ConfigError, match="attach"):
        holdfast.attach(every=every)


@pytest.mark.parametrize("every", ["auto", "100 steps", "1 step", "30 s", "0.5 seconds", "5 minutes"])
def test_attach_takes_every_interval_that_a_job_takes(every: str) -> None:
    holdfast.attach(every=every)
