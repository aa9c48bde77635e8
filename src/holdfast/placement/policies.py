"""Policies by name. All have the same signature, see only a situation, and are asked again at every tick and change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from typing import Literal

from holdfast.drivers.protocol import Offer
from holdfast.errors import ConfigError
from holdfast.placement import policy as default
from holdfast.placement.fitted_hazards import FITTED
from holdfast.placement.least_cost import LeastCost
from holdfast.placement.situation import USED_UP, Decision, Policy, Situation, is_safe, on_demand_pool, spot_pool

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a policy is made from: the pools as offers, in the order of a situation's, and the job's own limits."""

    offers: Sequence[Offer]
    provisioning: Literal["spot-then-on-demand", "spot", "on-demand"] = "spot-then-on-demand"
    failed_spot_attempts_to_fall_back: int = 3
    max_attempts: int = 50
    save_seconds: float = 1.0


class OnDemand:
    asks_while_running = False

    def __init__(self, terms: Terms) -> None:
        pass

    def decide(self, situation: Situation) -> Decision:
        return Decision(on_demand_pool(situation), "on-demand is what the policy asks for")


class SpotThenOnDemand:
    """The default of jobs without a deadline, in `placement.policy`; with one, on-demand at the last safe instant too."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._index = {offer.pool: index for index, offer in enumerate(terms.offers)}
        self._in_hurry = False
        self.asks_while_running = True

    def decide(self, situation: Situation) -> Decision:
        self._in_hurry = self._in_hurry or not is_safe(situation, situation.current)
        if self._in_hurry:
            return Decision(on_demand_pool(situation), USED_UP)
        if situation.current is not None:
            self.asks_while_running = situation.deadline_seconds < math.inf
            return Decision(situation.current, "while it lasts")
        offers = self._terms.offers
        decided = default.decide(
            default.Situation(
                now=EPOCH + timedelta(seconds=situation.now_seconds),
                offers=offers,
                attempts=[
                    default.PastAttempt(
                        pool=offers[one.pool].pool,
                        outcome=one.outcome,  # type: ignore[arg-type]
                        ended_at=EPOCH + timedelta(seconds=one.ended_seconds),
                        made_progress=one.made_progress,
                    )
                    for one in situation.attempts
                ],
                provisioning=self._terms.provisioning,
                failed_spot_attempts_to_fall_back=self._terms.failed_spot_attempts_to_fall_back,
                max_attempts=self._terms.max_attempts,
                restart_seconds=situation.restart_seconds,
                save_seconds=self._terms.save_seconds,
            )
        )
        match decided:
            case default.Launch(offer=offer, reason=reason):
                return Decision(self._index[offer.pool], reason)
            case default.Wait(until=until, reason=reason):
                return Decision(None, reason, (until - EPOCH).total_seconds())
            case default.GiveUp(reason=reason):
                return Decision(None, reason, math.inf)


class Greedy:
    """Spot whenever there is some, else wait; on-demand from the last instant that is safe, to the end."""

    asks_while_running = True

    def __init__(self, terms: Terms) -> None:
        self._committed = False

    def decide(self, situation: Situation) -> Decision:
        pool = spot_pool(situation)
        if self._committed or not is_safe(situation, pool):
            self._committed = True
            return Decision(on_demand_pool(situation), USED_UP)
        return Decision(pool, "spot is to be had" if pool is not None else "waiting for spot while there is slack")


class UniformProgress:
    """Progress in proportion to time; on-demand where it falls behind, with hysteresis of two restarts.

    Source: Wu et al., Can't Be Late, NSDI 2024, section 4.
    """

    asks_while_running = True

    def __init__(self, terms: Terms) -> None:
        pass

    def decide(self, situation: Situation) -> Decision:
        decision = self._in_proportion(situation)
        if is_safe(situation, decision.pool):
            return decision
        return Decision(on_demand_pool(situation), USED_UP)

    def _in_proportion(self, situation: Situation) -> Decision:
        pool = spot_pool(situation)
        current = situation.current
        expected = situation.now_seconds * situation.work_total_seconds / situation.deadline_seconds
        ahead = situation.work_done_seconds - expected
        if current is not None and not situation.pools[current].spot:
            if ahead < 2 * situation.restart_seconds:
                return Decision(current, "on-demand until progress is ahead of uniform")
            if pool is not None:
                return Decision(pool, "ahead of uniform progress, back to spot")
            return Decision(None, "ahead of uniform progress, waiting for spot")
        if pool is not None:
            return Decision(pool, "spot is to be had")
        if ahead < 0:
            return Decision(on_demand_pool(situation), "behind uniform progress and no spot")
        return Decision(None, "ahead of uniform progress, waiting for spot")


def _least_cost(terms: Terms) -> Policy:
    if find_spec("numpy") is None:
        raise ConfigError("policy: least-cost needs numpy; pip install 'holdfast[flows]', or name another policy")
    return LeastCost(FITTED)


DEFAULT = "spot-then-on-demand"
POLICIES: dict[str, Callable[[Terms], Policy]] = {
    "on-demand": OnDemand,
    DEFAULT: SpotThenOnDemand,
    "greedy": Greedy,
    "uniform-progress": UniformProgress,
    "least-cost": _least_cost,
}
BEST = "least-cost"
"""For a deadline, unless the job names another."""


def check_name(name: str) -> None:
    """Raises ConfigError for a name that is no policy's."""
    if name not in POLICIES:
        raise ConfigError(f"policy: {name!r} is none; use one of {', '.join(sorted(POLICIES))}")


def policy_named(name: str, terms: Terms) -> Policy:
    """A new one, for one run. Raises ConfigError for a name that is none."""
    check_name(name)
    return POLICIES[name](terms)
