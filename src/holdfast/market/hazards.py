"""How likely a machine of some age is to be taken: young ones are, old ones are not. From the lives that runs have seen."""

from __future__ import annotations

from collections.abc import Iterable

from holdfast.drivers.protocol import CapacityPool
from holdfast.market.history import Life
from holdfast.market.interruptions import PRIOR_EVENTS

AGES_SECONDS = (0.0, 600.0, 3600.0, 5 * 3600.0)
"""Where the hazard may change; it is taken for constant in between, and from the last on."""


def hazards_by_age(lives: Iterable[Life], pool: CapacityPool, prior_per_hour: float) -> tuple[tuple[float, float], ...]:
    """(age in seconds, interruptions per hour from then on) of the pool's type in its region, by age.

    Each stretch of ages is estimated by itself, as in `market.interruptions`: what nobody has lived through keeps the
    prior. Empty where nothing was seen, or the prior says that nothing is ever taken.
    """
    ends = (*AGES_SECONDS[1:], float("inf"))
    hours, events = [0.0] * len(ends), [0.0] * len(ends)
    for life in lives:
        other = life.pool
        alike = (other.cloud, other.region, other.instance_type) == (pool.cloud, pool.region, pool.instance_type)
        if not alike or other.provisioning_model != "spot" or life.launched_at is None:
            continue
        lived = life.hours * 3600
        for place, (start, end) in enumerate(zip(AGES_SECONDS, ends, strict=True)):
            hours[place] += max(0.0, min(lived, end) - start) / 3600
            events[place] += life.preempted and start <= lived < end
    if prior_per_hour <= 0 or not any(hours):
        return ()
    rates = [
        (PRIOR_EVENTS + seen) / (PRIOR_EVENTS / prior_per_hour + lived)
        for seen, lived in zip(events, hours, strict=True)
    ]
    return tuple((age, round(rate, 6)) for age, rate in zip(AGES_SECONDS, rates, strict=True))
