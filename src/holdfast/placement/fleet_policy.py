"""Which machines a fleet asks for next, and where: plain values in, a plain value out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from holdfast.drivers.protocol import CapacityPool, Offer, ProvisioningModel
from holdfast.placement.policy import (
    FIRST_WAIT_SECONDS,
    LONGEST_WAIT_SECONDS,
    GiveUp,
    PastAttempt,
    Situation,
    Wait,
    rank,
    usd_per_useful_hour,
)
from holdfast.runtime.contract import Outcome

MOST_POOLS = 8
"""Of one provisioning model that one round may name."""
DEAREST_FACTOR = 2.0
"""A round names no pool that costs more than so many times its best: the cloud may take any of them."""
FAILED_ROUNDS_TO_FALL_BACK = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRound:
    """What placement needs to know of a round that was answered."""

    pools: Sequence[CapacityPool]
    spot: int
    """Asked for."""
    answered_at: datetime
    refusal: Outcome | None
    """`no-capacity`, `quota`: no machine came."""
    refused_pools: Sequence[CapacityPool]
    """Those that gave fewer machines than were asked of them."""
    taken: Sequence[tuple[CapacityPool, datetime]]
    """Members that were preempted or lost, and when."""
    finished: bool
    """Has any of its members done its work?"""

    @property
    def failed(self) -> bool:
        """Was spot refused or taken, and nothing finished?"""
        refused = any(pool.provisioning_model == "spot" for pool in self.refused_pools)
        taken = any(pool.provisioning_model == "spot" for pool, _ in self.taken)
        return (refused or taken) and not self.finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Paced:
    """What a deadline lets the places be that spot would have."""

    model: ProvisioningModel | None
    """None: they stay empty for now."""
    reason: str
    again_at: datetime
    """When to ask again at the latest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSituation:
    """Only what is knowable at `now`."""

    now: datetime
    offers: Sequence[Offer]
    rounds: Sequence[PastRound]
    machines: int
    """Wanted."""
    spot_share: float
    filled: Counter[ProvisioningModel]
    """Places that a living machine has, or one that has done its work."""
    replaced: int
    """Members that ended before their work was done."""
    max_replacements: int
    restart_seconds: float
    save_seconds: float
    paced: Paced | None = None
    """None: no hurry, and after some failed rounds in a row on-demand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRound:
    offers: tuple[Offer, ...]
    """All in one region."""
    spot: int
    on_demand: int
    reason: str
    fell_back: bool = False
    """True when this round is the step from spot to on-demand."""


def decide_round(situation: FleetSituation) -> LaunchRound | Wait | GiveUp | None:
    """What to ask for now; None when no place is empty."""
    spot, on_demand = missing(situation)
    if not spot + on_demand:
        return None
    refusals = sum(past.refusal is not None for past in situation.rounds)
    if situation.replaced + refusals > situation.max_replacements:
        return GiveUp(
            f"{situation.replaced} machines ended before their work was done and {refusals} rounds were refused, which is "
            f"more than max_replacements, {situation.max_replacements}; raise it to go on"
        )
    if spot and situation.paced:
        return _in_time(situation, situation.paced, spot, on_demand)
    failed = failed_rounds_in_a_row(situation.rounds)
    fell_back, why = False, f"{spot} spot and {on_demand} on-demand machines are missing"
    if spot and failed >= FAILED_ROUNDS_TO_FALL_BACK:
        fell_back = bool(situation.rounds) and situation.rounds[-1].spot > 0
        why = f"spot was refused or taken in {failed} rounds in a row: {spot + on_demand} on-demand machines instead"
        spot, on_demand = 0, spot + on_demand
    elif spot and not _within_quota(situation, "spot") and _within_quota(situation, "on-demand"):
        fell_back = bool(situation.rounds) and situation.rounds[-1].spot > 0
        why = f"no spot pool is within the account's quota: {spot + on_demand} on-demand machines instead"
        spot, on_demand = 0, spot + on_demand
    return _where(situation, spot, on_demand, why, fell_back)


def _in_time(situation: FleetSituation, paced: Paced, spot: int, on_demand: int) -> LaunchRound | Wait | GiveUp:
    model = paced.model
    if model == "spot" and not _within_quota(situation, "spot"):
        model = "on-demand"
    if model is None:
        if not on_demand:
            return Wait(paced.again_at, paced.reason)
        spot = 0
    if model == "on-demand":
        spot, on_demand = 0, spot + on_demand
    fell_back = model == "on-demand" and bool(situation.rounds) and situation.rounds[-1].spot > 0
    found = _where(situation, spot, on_demand, paced.reason, fell_back)
    return Wait(min(found.until, paced.again_at), found.reason) if isinstance(found, Wait) else found


def missing(situation: FleetSituation) -> tuple[int, int]:
    """Empty places, spot and on-demand. On-demand machines that stand in for spot leave no place of theirs empty."""
    wanted = round(situation.machines * situation.spot_share)
    empty = max(0, situation.machines - situation.filled.total())
    on_demand = min(empty, max(0, situation.machines - wanted - situation.filled["on-demand"]))
    return empty - on_demand, on_demand


def failed_rounds_in_a_row(rounds: Sequence[PastRound]) -> int:
    """At the end of the list; rounds that asked for no spot say nothing about it."""
    count = 0
    for past in reversed(rounds):
        if past.spot and not past.failed:
            break
        count += past.spot > 0
    return count


def _where(
    situation: FleetSituation, spot: int, on_demand: int, why: str, fell_back: bool
) -> LaunchRound | Wait | GiveUp:
    asked: dict[ProvisioningModel, int] = {"spot": spot, "on-demand": on_demand}
    choices: dict[ProvisioningModel, list[Offer]] = {}
    waits: list[Wait] = []
    for model in asked:
        if not asked[model]:
            continue
        if not (offers := _within_quota(situation, model)):
            details = "; quota was refused for the others" if _of_quota(situation) else ""
            return GiveUp(f"no {model} pool fits the job's resources{details}")
        fresh, until = _fresh(situation, offers)
        if until and situation.now < until:
            waits.append(Wait(until, f"all {len(offers)} {model} pools have refused"))
        else:
            choices[model] = rank(fresh, _as_of_one_machine(situation))
    if not choices:
        return min(waits, key=lambda wait: wait.until)
    offers, models = _of_one_region(choices)
    best = offers[0]
    return LaunchRound(
        offers=tuple(offer for model in models for offer in _the_best(offers, model, situation)),
        spot=spot if "spot" in models else 0,
        on_demand=on_demand if "on-demand" in models else 0,
        reason=f"{why}; {best.pool.region} has the best of {sum(map(len, choices.values()))} pools, {best.pool} at "
        f"${best.usd_per_hour:.3f}/h",
        fell_back=fell_back and "on-demand" in models,
    )


def _of_one_region(choices: dict[ProvisioningModel, list[Offer]]) -> tuple[list[Offer], list[ProvisioningModel]]:
    """The best region that has all the models; where none has, the first model's best, and the other comes later."""
    lead, *others = choices
    regions = list(dict.fromkeys((offer.pool.cloud, offer.pool.region) for offer in choices[lead]))

    def there(model: ProvisioningModel, region: tuple[str, str]) -> list[Offer]:
        return [offer for offer in choices[model] if (offer.pool.cloud, offer.pool.region) == region]

    for region in regions:
        if all(there(other, region) for other in others):
            return [offer for model in choices for offer in there(model, region)], list(choices)
    return there(lead, regions[0]), [lead]


def _the_best(offers: Sequence[Offer], model: ProvisioningModel, situation: FleetSituation) -> list[Offer]:
    of_model = [offer for offer in offers if offer.pool.provisioning_model == model]

    def usd(offer: Offer) -> float:
        return usd_per_useful_hour(offer, situation.restart_seconds, situation.save_seconds)

    return [offer for offer in of_model if usd(offer) <= DEAREST_FACTOR * usd(of_model[0])][:MOST_POOLS]


def _fresh(situation: FleetSituation, offers: Sequence[Offer]) -> tuple[list[Offer], datetime | None]:
    """The pools whose turn it is; and until when to wait, when all of them have just refused once more."""
    refused: Counter[CapacityPool] = Counter()
    last: datetime | None = None
    for past in reversed(situation.rounds):
        if not past.refused_pools:
            break
        refused.update(past.refused_pools)
        last = last or past.answered_at
    turns = min(refused[offer.pool] for offer in offers)
    fresh = [offer for offer in offers if refused[offer.pool] == turns]
    if not turns or len(fresh) < len(offers):
        return fresh, None
    assert last
    return fresh, last + timedelta(seconds=min(FIRST_WAIT_SECONDS * 2 ** (turns - 1), LONGEST_WAIT_SECONDS))


def _within_quota(situation: FleetSituation, model: ProvisioningModel) -> list[Offer]:
    refused = _of_quota(situation)
    return [offer for offer in situation.offers if offer.pool.provisioning_model == model and offer.pool not in refused]


def _of_quota(situation: FleetSituation) -> set[CapacityPool]:
    """Asking again mends no quota: what was refused for it is left out for the rest of the run."""
    return {pool for past in situation.rounds if past.refusal == "quota" for pool in past.pools}


def _as_of_one_machine(situation: FleetSituation) -> Situation:
    """For `rank`: what refused or was taken, as the attempts of a single machine."""
    attempts = [
        PastAttempt(pool=pool, outcome="no-capacity", ended_at=past.answered_at, made_progress=False)
        for past in situation.rounds
        for pool in past.refused_pools
    ]
    attempts += [
        PastAttempt(pool=pool, outcome="preempted", ended_at=at, made_progress=False)
        for past in situation.rounds
        for pool, at in past.taken
    ]
    return Situation(
        now=situation.now,
        offers=situation.offers,
        attempts=sorted(attempts, key=lambda attempt: attempt.ended_at),
        provisioning="spot-then-on-demand",
        failed_spot_attempts_to_fall_back=FAILED_ROUNDS_TO_FALL_BACK,
        max_attempts=situation.max_replacements,
        restart_seconds=situation.restart_seconds,
        save_seconds=situation.save_seconds,
    )
