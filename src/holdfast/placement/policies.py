"""Policies by name. All have the same signature, see only a situation, and are asked again at every tick and change."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.errors import ConfigError
from holdfast.placement.situation import Decision, Policy, Situation, must_leave_spot, on_demand_pool, spot_pool

FAILED_ATTEMPTS = 3
"""Of `spot-then-on-demand`, unless the job says otherwise."""


class OnDemand:
    def decide(self, situation: Situation) -> Decision:
        return Decision(on_demand_pool(situation), "on-demand is what the policy asks for")


class SpotThenOnDemand:
    """Spot until so many attempts in a row failed, then on-demand to the end; a deadline is kept all the same."""

    def __init__(self, failed_attempts: int = FAILED_ATTEMPTS) -> None:
        self._failed_attempts = failed_attempts
        self._fell_back = False

    def decide(self, situation: Situation) -> Decision:
        if not self._fell_back and situation.failed_spot_attempts >= self._failed_attempts:
            self._fell_back = True
        if self._fell_back:
            return Decision(on_demand_pool(situation), f"{self._failed_attempts} spot attempts in a row failed")
        if must_leave_spot(situation):
            return Decision(on_demand_pool(situation), "the slack is used up")
        pool = spot_pool(situation)
        return Decision(pool, "spot first" if pool is not None else "no spot pool has capacity")


class Greedy:
    """Spot whenever there is some, else wait; on-demand from the last instant that is safe, to the end."""

    def __init__(self) -> None:
        self._committed = False

    def decide(self, situation: Situation) -> Decision:
        if self._committed or must_leave_spot(situation):
            self._committed = True
            return Decision(on_demand_pool(situation), "the slack is used up")
        pool = spot_pool(situation)
        return Decision(pool, "spot is to be had" if pool is not None else "waiting for spot while there is slack")


class UniformProgress:
    """Progress in proportion to time; on-demand where it falls behind, with hysteresis of two restarts.

    Source: Wu et al., Can't Be Late, NSDI 2024, 4.
    """

    def decide(self, situation: Situation) -> Decision:
        if must_leave_spot(situation):
            return Decision(on_demand_pool(situation), "the slack is used up")
        pool = spot_pool(situation)
        current = situation.current
        expected = situation.now_seconds * situation.work_total_seconds / situation.deadline_seconds
        ahead = situation.work_done_seconds - expected
        if current is not None and not situation.pools[current].spot:
            if pool is not None and ahead >= 2 * situation.restart_seconds:
                return Decision(pool, "ahead of uniform progress, back to spot")
            if ahead < 2 * situation.restart_seconds:
                return Decision(current, "on-demand until progress is ahead of uniform")
            return Decision(None, "ahead of uniform progress, waiting for spot")
        if pool is not None:
            return Decision(pool, "spot is to be had")
        if ahead < 0:
            return Decision(on_demand_pool(situation), "behind uniform progress and no spot")
        return Decision(None, "ahead of uniform progress, waiting for spot")


POLICIES: dict[str, Callable[[], Policy]] = {
    "on-demand": OnDemand,
    "spot-then-on-demand": SpotThenOnDemand,
    "greedy": Greedy,
    "uniform-progress": UniformProgress,
}
BEST = "uniform-progress"
"""For a deadline, unless the job names another."""


def policy_named(name: str) -> Policy:
    """Raises ConfigError for a name that is none."""
    if name not in POLICIES:
        raise ConfigError(f"policy: {name!r} is none; use one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
