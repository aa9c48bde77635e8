"""How often a pool takes its machines back: what is believed beforehand, corrected by what was seen.

Interruptions are taken for a Poisson process whose rate has a Gamma distribution: Gamma(a, b) before, and after e
interruptions in h machine hours Gamma(a + e, b + h). Its mean is the estimate, its quantiles are the credible interval.
Evidence that is about other machines than these counts for less: its events and hours both, by its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PRIOR_EVENTS = 2.0
"""What the prior is worth: as much as having seen so many interruptions. Its 90 % interval spans a factor of 13."""
LEVEL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """Interruptions seen in so many machine hours, somewhere."""

    source: str
    """For people: own history, family history, trace."""
    events: float
    hours: float
    weight: float = 1.0
    """1: of this very pool; 0: says nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    per_hour: float
    low_per_hour: float
    high_per_hour: float
    """The interval holds the true rate with a probability of 90 %, if the prior is right."""
    evidence: str
    """In words, the weightiest first."""

    @property
    def per_day(self) -> float:
        return 24 * self.per_hour


def estimate(prior_per_hour: float, observations: Sequence[Observation] = (), prior_words: str = "prior") -> Estimate:
    """Raises ValueError unless the prior is above zero: what is never interrupted needs no estimate."""
    if prior_per_hour <= 0:
        raise ValueError(f"prior_per_hour is {prior_per_hour}; it must be above zero")
    events = PRIOR_EVENTS + sum(one.weight * one.events for one in observations)
    hours = PRIOR_EVENTS / prior_per_hour + sum(one.weight * one.hours for one in observations)
    seen = sorted((one for one in observations if one.hours > 0), key=lambda one: -one.weight * one.hours)
    words = [f"{one.source}: {one.events:.3g} in {one.hours:.3g} h" for one in seen]
    tail = (1 - LEVEL) / 2
    return Estimate(
        per_hour=events / hours,
        low_per_hour=gamma_quantile(tail, events) / hours,
        high_per_hour=gamma_quantile(1 - tail, events) / hours,
        evidence="; ".join([*words, f"{prior_words}: {prior_per_hour:.3g}/h"]),
    )


def gamma_quantile(probability: float, shape: float) -> float:
    """Where Gamma(shape, 1) has `probability` below it; to about 1e-10, by bisection."""
    low, high = 0.0, max(1.0, shape)
    while gamma_cdf(high, shape) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if high - low <= 1e-11 * high:
            break
        low, high = (middle, high) if gamma_cdf(middle, shape) < probability else (low, middle)
    return (low + high) / 2


def gamma_cdf(x: float, shape: float) -> float:
    """The regularised lower incomplete gamma function P(shape, x).

    Source: Press et al., Numerical Recipes, 6.2: the series below shape + 1, the continued fraction above.
    """
    if x <= 0:
        return 0.0
    factor = math.exp(shape * math.log(x) - x - math.lgamma(shape))
    if x < shape + 1:
        term = total = 1 / shape
        number = shape
        while abs(term) > 1e-16 * abs(total):
            number += 1
            term *= x / number
            total += term
        return min(1.0, total * factor)
    tiny = 1e-300
    b = x + 1 - shape
    c, d = 1 / tiny, 1 / b
    value = d
    for step in range(1, 10_000):
        a = -step * (step - shape)
        b += 2
        d = a * d + b
        d = 1 / (d if abs(d) > tiny else tiny)
        c = b + a / c
        c = c if abs(c) > tiny else tiny
        value *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return max(0.0, 1 - factor * value)
