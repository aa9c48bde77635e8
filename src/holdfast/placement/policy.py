"""Which pool next: plain values in, a plain value out. The simulator and the controller run this same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import takewhile
from typing import Literal

from holdfast.drivers.protocol import CapacityPool, Offer, ProvisioningModel
from holdfast.runtime.contract import Outcome

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 30.0, 600.0
"""When every pool has refused: the pause before asking them all again doubles from round to round."""
COOL_DOWN = timedelta(minutes=10)
"""A pool that refused or preempted us is asked after the others for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastAttempt:
    """What placement needs to know of an attempt that has ended."""

    pool: CapacityPool
    outcome: Outcome
    detail: str = ""
    ended_at: datetime
    made_progress: bool

    @property
    def provisioning_model(self) -> ProvisioningModel:
        return self.pool.provisioning_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Only what is knowable at `now`."""

    now: datetime
    offers: Sequence[Offer]
    attempts: Sequence[PastAttempt]
    provisioning: Literal["spot-then-on-demand", "spot", "on-demand"]
    failed_spot_attempts_to_fall_back: int
    max_attempts: int
    restart_seconds: float
    """From a machine's loss to the next new step."""
    save_seconds: float
    """What one checkpoint costs the training."""


@dataclass(frozen=True, slots=True)
class Launch:
    offer: Offer
    reason: str
    fell_back: bool = False
    """True when this launch is the step from spot to on-demand."""


@dataclass(frozen=True, slots=True)
class Wait:
    until: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


def decide(situation: Situation) -> Launch | Wait | GiveUp:
    """Spot in the order of dollars per useful hour; on-demand after so many failed spot attempts in a row."""
    if len(situation.attempts) >= situation.max_attempts:
        return GiveUp(f"{len(situation.attempts)} attempts were made, which is max_attempts; raise it to go on")
    model, why = _provisioning_model(situation)
    offers = _within_quota(model, situation)
    details = [attempt.detail for attempt in situation.attempts if attempt.outcome == "quota"]
    if not offers and details and model == "spot" and situation.provisioning == "spot-then-on-demand":
        model, why = "on-demand", "no spot pool is within the account's quota"
        offers = _within_quota(model, situation)
    if not offers:
        return GiveUp(f"no {model} pool " + (f"is left: {details[-1]}" if details else "fits the job's resources"))
    wait = _wait_after_a_round_of_refusals(situation, len(offers), model)
    if wait:
        return wait
    best = rank(offers, situation)[0]
    last = situation.attempts[-1] if situation.attempts else None
    fell_back = model == "on-demand" and last is not None and last.provisioning_model == "spot"
    price = f"${best.usd_per_hour:.3f}/h"
    return Launch(best, f"{why}; {best.pool.zone} at {price} is the best of {len(offers)} pools", fell_back)


def _within_quota(model: ProvisioningModel, situation: Situation) -> list[Offer]:
    """Asking again mends no quota: what was refused for it is left out for the rest of the run."""
    refused = {_quota_of(attempt.pool) for attempt in situation.attempts if attempt.outcome == "quota"}
    return [
        offer
        for offer in situation.offers
        if offer.pool.provisioning_model == model and _quota_of(offer.pool) not in refused
    ]


def _wait_after_a_round_of_refusals(situation: Situation, pools: int, model: ProvisioningModel) -> Wait | None:
    refusals = list(
        takewhile(
            lambda attempt: attempt.outcome == "no-capacity" and attempt.provisioning_model == model,
            reversed(situation.attempts),
        )
    )
    rounds, rest = divmod(len(refusals), pools)
    if not rounds or rest:
        return None
    until = refusals[0].ended_at + timedelta(seconds=min(FIRST_WAIT_SECONDS * 2 ** (rounds - 1), LONGEST_WAIT_SECONDS))
    return Wait(until, f"all {pools} {model} pools have refused") if situation.now < until else None


def failed_spot_attempts_in_a_row(attempts: Sequence[PastAttempt]) -> int:
    """Spot attempts at the end of the list that were refused, or taken before enough new progress."""
    count = 0
    for attempt in reversed(attempts):
        if attempt.provisioning_model != "spot" or attempt.made_progress:
            break
        count += attempt.outcome in ("no-capacity", "quota", "preempted", "lost")
    return count


def rank(offers: Sequence[Offer], situation: Situation) -> list[Offer]:
    """By expected dollars per useful hour; pools that failed lately come last, and the zone that failed just now too.

    Before the price counts whether the monitor has cooled a pool: too many machines were taken from it lately.

    From a zone that refused the way leads to the region's other zones first, then to the cloud's other regions, then to
    other clouds: the checkpoints are near, and it costs no egress. After a preemption, and for another provisioning model,
    the price decides.
    """
    hot = [
        attempt
        for attempt in situation.attempts
        if attempt.outcome in ("no-capacity", "quota", "preempted", "lost")
        and situation.now - attempt.ended_at < COOL_DOWN
    ]
    hot_pools = {attempt.pool for attempt in hot}
    last = hot[-1] if hot and hot[-1] is situation.attempts[-1] else None
    left = last.pool if last else None
    refused_by = last.pool if last and last.outcome in ("no-capacity", "quota") else None

    def order(offer: Offer) -> tuple[bool, bool, bool, int, float, str]:
        pool = offer.pool
        usd = usd_per_useful_hour(offer, situation.restart_seconds, situation.save_seconds)
        same_zone = left is not None and (pool.cloud, pool.zone) == (left.cloud, left.zone)
        return pool in hot_pools, same_zone, bool(offer.cooled), _distance(refused_by, pool), usd, str(pool)

    return sorted(offers, key=order)


def _distance(refused_by: CapacityPool | None, pool: CapacityPool) -> int:
    if refused_by is None or refused_by.provisioning_model != pool.provisioning_model:
        return 0
    if refused_by.cloud != pool.cloud:
        return 2
    return int(refused_by.region != pool.region)


def _quota_of(pool: CapacityPool) -> tuple[str, str, str, str]:
    """Quotas are a region's, by type and model (or by wider classes, which one more refusal each then shows)."""
    return pool.cloud, pool.region, pool.instance_type, pool.provisioning_model


def usd_per_useful_hour(offer: Offer, restart_seconds: float, save_seconds: float) -> float:
    """Price over the share of time that makes progress.

    With interruptions at rate r per second, each costs a restart and half a checkpoint interval, and the best interval
    sqrt(2 save / r) costs another save / interval: the overhead is r x restart + sqrt(2 x save x r).
    Source: Young, CACM 17(9), 1974.
    """
    rate = offer.interruptions_per_hour / 3600
    overhead = rate * restart_seconds + (2 * save_seconds * rate) ** 0.5
    return offer.usd_per_hour * (1 + overhead)


def _provisioning_model(situation: Situation) -> tuple[ProvisioningModel, str]:
    if situation.provisioning != "spot-then-on-demand":
        return situation.provisioning, f"the job asks for {situation.provisioning}"
    last = situation.attempts[-1] if situation.attempts else None
    if last and last.provisioning_model == "on-demand" and last.outcome != "moved":
        return "on-demand", "the run has fallen back to on-demand"
    failed = failed_spot_attempts_in_a_row(situation.attempts)
    if failed >= situation.failed_spot_attempts_to_fall_back:
        return "on-demand", f"{failed} spot attempts in a row failed"
    if failed:
        return "spot", f"{failed} of {situation.failed_spot_attempts_to_fall_back} spot attempts in a row failed"
    return "spot", "spot first"
