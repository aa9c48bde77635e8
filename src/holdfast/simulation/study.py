"""Hundreds of simulated runs of one job under every policy, on the same markets, and what they say together."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from holdfast.drivers.protocol import Offer
from holdfast.errors import ConfigError
from holdfast.ledger.billing import TERMS, BillingTerms
from holdfast.market.traces import Trace
from holdfast.placement.policies import Terms, check_name, policy_named
from holdfast.simulation.engine import SimulatedPool, Workload, omniscient_usd, simulate
from holdfast.simulation.fitted import FittedMarket
from holdfast.simulation.outcomes import Distribution, Outcome, dollars, sentence

HORIZON_OF_WORK = 4.0
"""Without a deadline, a trace must be so many times as long as the work, or is drawn on."""
ON_DEMAND = "on-demand"


class Markets(Protocol):
    """Where a run's market comes from."""

    name: str

    def draw(self, seconds: float, random_source: random.Random) -> tuple[list[Trace], float]:
        """Traces of the spot pools, one each, or one for all of them; and the instant of the run's start in them."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Runs begin at random instants of recorded traces. `together`: each is a pool's of its own, all at once."""

    traces: Sequence[Trace]
    together: bool = False

    @property
    def name(self) -> str:
        names = ", ".join(trace.name for trace in self.traces[:3]) + (", …" if len(self.traces) > 3 else "")
        return f"{'zones together' if self.together else 'recorded'}: {names}"

    def draw(self, seconds: float, random_source: random.Random) -> tuple[list[Trace], float]:
        chosen = list(self.traces) if self.together else [random_source.choice(self.traces)]
        latest = min(trace.seconds for trace in chosen) - seconds
        if latest < 0:
            raise ConfigError(
                f"trace: {chosen[0].name} lasts {chosen[0].seconds / 3600:.0f} h, but a run may last {seconds / 3600:.0f} h; "
                "name a longer one, or let a model be fitted to it (--fitted)"
            )
        return chosen, random_source.uniform(0, latest)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Every run meets a market of its own, drawn from a fitted one."""

    fitted: FittedMarket

    @property
    def name(self) -> str:
        return self.fitted.name

    def draw(self, seconds: float, random_source: random.Random) -> tuple[list[Trace], float]:
        return [self.fitted.draw(math.ceil(seconds / self.fitted.gap_seconds) + 1, random_source)], 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    job: str
    workload: Workload
    offers: Sequence[Offer]
    """Of spot and on-demand; with one trace a run, of each the best is used."""
    markets: Markets
    policies: Sequence[str]
    chosen: str
    """The policy that the job would run under."""
    runs: int = 500
    seed: int = 0
    tick_seconds: float = 600.0
    failed_spot_attempts_to_fall_back: int = 3
    provisioning: Any = "spot-then-on-demand"
    notes: Sequence[str] = field(default=())
    """What the reader should know of where the numbers come from."""

    @property
    def billing(self) -> BillingTerms:
        return TERMS[self.offers[0].pool.cloud]


@dataclass(frozen=True, slots=True)
class Study:
    question: Question
    distributions: Sequence[Distribution]
    bound_usd: float
    """Mean of the omniscient bound."""

    def of(self, policy: str) -> Distribution:
        return next(one for one in self.distributions if one.policy == policy)

    @property
    def sentence(self) -> str:
        return sentence(self.of(self.question.chosen), self.of(ON_DEMAND).mean("usd"))

    def to_json(self) -> dict[str, Any]:
        asked, workload = self.question, self.question.workload
        return {
            "job": asked.job,
            "sentence": self.sentence,
            "policy": asked.chosen,
            "market": asked.markets.name,
            "runs": asked.runs,
            "seed": asked.seed,
            "work_hours": round(workload.work_seconds / 3600, 4),
            "deadline_hours": None if math.isinf(workload.deadline_seconds) else workload.deadline_seconds / 3600,
            "restart_seconds": round(workload.boot_seconds + workload.stop_seconds, 1),
            "usd_per_hour": {str(offer.pool): offer.usd_per_hour for offer in asked.offers},
            "omniscient_usd": round(self.bound_usd, 4),
            "policies": {one.policy: one.to_json() for one in self.distributions},
            "notes": list(asked.notes),
        }

    def to_markdown(self) -> str:
        asked = self.question
        lines = [
            f"**{asked.job}: {self.sentence}.**",
            "",
            "| policy | mean $ | 5 % | median | 95 % | hours, median | 95 % | late | interruptions | lost h | on-demand h |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for one in sorted(self.distributions, key=lambda one: one.mean("usd")):
            said = one.to_json()
            mark = " (this job's)" if one.policy == asked.chosen else ""
            usd, hours = said["usd"], said["hours"]
            lines.append(
                f"| {one.policy}{mark} | {dollars(said['mean_usd'])} | {dollars(usd['5%'])} | {dollars(usd['50%'])} | "
                f"{dollars(usd['95%'])} | {hours['50%']:.1f} | {hours['95%']:.1f} | {one.late} | "
                f"{said['mean_interruptions']:.1f} | {said['mean_lost_hours']:.2f} | {said['mean_on_demand_hours']:.1f} |"
            )
        lines += [
            f"| *omniscient bound* | {dollars(self.bound_usd)} | | | | | | | | | |",
            "",
            f"- {asked.runs} runs of each, begun at the same instants of the same markets ({asked.markets.name})",
            *(f"- {note}" for note in asked.notes),
        ]
        return "\n".join(lines)


def study(question: Question) -> Iterator[int | Study]:
    """How many of the runs are done, now and then; at last the study."""
    for name in question.policies:
        check_name(name)
    policies = list(dict.fromkeys([*question.policies, question.chosen, ON_DEMAND]))
    outcomes: dict[str, list[Outcome]] = {name: [] for name in policies}
    horizon = _horizon_seconds(question.workload)
    bounds = 0.0
    for number in range(question.runs):
        draw = random.Random(f"{question.seed}-{number}")
        traces, start = question.markets.draw(horizon, draw)
        pools, offers = _pools(question.offers, traces)
        bounds += omniscient_usd(question.workload, pools, start)
        terms = Terms(
            offers=offers,
            provisioning=question.provisioning,
            failed_spot_attempts_to_fall_back=question.failed_spot_attempts_to_fall_back,
        )
        for name in policies:
            notices = random.Random(f"{question.seed}-{number}-notices")  # the same for every policy
            policy = policy_named(name, terms)
            outcomes[name].append(
                simulate(question.workload, pools, policy, question.tick_seconds, question.billing, start, notices)
            )
        if number % 10 == 9:
            yield number + 1
    yield Study(question, [Distribution(name, of) for name, of in outcomes.items()], bounds / question.runs)


def _horizon_seconds(workload: Workload) -> float:
    if math.isfinite(workload.deadline_seconds):
        return workload.deadline_seconds
    return HORIZON_OF_WORK * (workload.work_seconds + workload.boot_seconds)


def _pools(offers: Sequence[Offer], traces: Sequence[Trace]) -> tuple[list[SimulatedPool], list[Offer]]:
    """The cheapest spot offers take the traces, in order of their price; the cheapest on-demand offer is beside them."""
    spot = sorted((one for one in offers if one.pool.provisioning_model == "spot"), key=lambda one: one.usd_per_hour)
    on_demand = min(
        (one for one in offers if one.pool.provisioning_model == "on-demand"), key=lambda one: one.usd_per_hour
    )
    if not spot:
        return [SimulatedPool(str(on_demand.pool), False, on_demand.usd_per_hour)], [on_demand]
    chosen = [spot[min(place, len(spot) - 1)] for place in range(len(traces))]
    pools = [
        SimulatedPool(f"{offer.pool} as {trace.name}", True, offer.usd_per_hour, trace)
        for offer, trace in zip(chosen, traces, strict=True)
    ]
    kept = [*dict.fromkeys(chosen)]
    pools = pools[: len(kept)]  # more records than pools to buy from: the first ones
    return [*pools, SimulatedPool(str(on_demand.pool), False, on_demand.usd_per_hour)], [*kept, on_demand]


Progress = Callable[[int], None]


def carry_out(question: Question, progress: Progress = lambda runs: None) -> Study:
    for told in study(question):
        if isinstance(told, Study):
            return told
        progress(told)
    raise AssertionError("a study ends with itself")
