"""Estimates of interruptions: a prior that gives way to what was seen, and intervals that hold what they promise."""

from __future__ import annotations

import random

import pytest
from scipy import special, stats

from holdfast.market.interruptions import PRIOR_EVENTS, Observation, estimate, gamma_cdf, gamma_quantile


@pytest.mark.parametrize("shape", [0.3, 1.0, 2.0, 7.5, 40.0, 900.0])
@pytest.mark.parametrize("probability", [0.001, 0.05, 0.5, 0.95, 0.999])
def test_quantiles_are_scipy_s(shape, probability):
    found = gamma_quantile(probability, shape)
    assert found == pytest.approx(stats.gamma.ppf(probability, shape), rel=1e-7)
    assert gamma_cdf(found, shape) == pytest.approx(special.gammainc(shape, found), abs=1e-10)


def test_without_history_the_prior_is_the_estimate_and_its_interval_is_wide():
    found = estimate(0.06)
    assert found.per_hour == pytest.approx(0.06)
    assert found.low_per_hour < 0.02 and found.high_per_hour > 0.14
    assert found.evidence == "prior: 0.06/h"


def test_much_history_overrules_the_prior():
    found = estimate(0.06, [Observation(source="own history", events=200, hours=400)])
    assert found.per_hour == pytest.approx(0.5, rel=0.1)
    assert found.low_per_hour > 0.4 and found.high_per_hour < 0.6
    assert found.evidence == "own history: 200 in 400 h; prior: 0.06/h"


def test_hours_without_an_interruption_count_too():
    assert estimate(0.06, [Observation(source="own history", events=0, hours=100)]).per_hour == pytest.approx(
        2 / 133.3, rel=0.01
    )


def test_evidence_of_other_machines_counts_for_its_weight():
    near = estimate(0.06, [Observation(source="family", events=50, hours=100, weight=1.0)]).per_hour
    far = estimate(0.06, [Observation(source="family", events=50, hours=100, weight=0.1)]).per_hour
    assert 0.06 < far < near < 0.5


def test_ninety_percent_intervals_hold_the_truth_ninety_times_of_a_hundred():
    draw, prior, held, rounds = random.Random(1), 0.06, 0, 2000
    for _ in range(rounds):
        rate = draw.gammavariate(PRIOR_EVENTS, prior / PRIOR_EVENTS)
        hours = draw.uniform(1, 200)
        events, at = 0, draw.expovariate(rate)
        while at < hours:
            events, at = events + 1, at + draw.expovariate(rate)
        found = estimate(prior, [Observation(source="own", events=events, hours=hours)])
        held += found.low_per_hour <= rate <= found.high_per_hour
    assert 0.88 <= held / rounds <= 0.92
