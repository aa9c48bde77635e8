"""What the journal says of a fleet's run, round by round and member by member.

Entries hold lists: two hundred machines that are launched at once are one object in the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from holdfast.drivers.protocol import CapacityPool, ProvisioningModel
from holdfast.ledger.billing import add_usd
from holdfast.ledger.journal import Entry
from holdfast.runtime.contract import Outcome

UNFINISHED: frozenset[str] = frozenset({"preempted", "lost", "program-failed"})
"""Outcomes of a member that another takes the place of."""
TAKEN: frozenset[str] = frozenset({"preempted", "lost"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedPool:
    pool: CapacityPool
    usd_per_hour: float
    on_demand_usd_per_hour: float


@dataclass(slots=True, kw_only=True)
class Member:
    """The life of one machine in the fleet."""

    machine: str
    round: int
    opening: int
    priced: PricedPool
    launched_at: datetime
    terminated_at: datetime | None = None
    detected_at: datetime | None = None
    outcome: Outcome | None = None
    detail: str = ""
    billed_seconds: float = 0.0
    usd: float = 0.0

    @property
    def pool(self) -> CapacityPool:
        return self.priced.pool

    @property
    def model(self) -> ProvisioningModel:
        return self.priced.pool.provisioning_model


@dataclass(slots=True, kw_only=True)
class Round:
    """One question to a cloud for machines."""

    number: int
    opening: int
    token: str
    pools: list[PricedPool]
    spot: int
    on_demand: int
    asked_at: datetime
    reason: str = ""
    answered_at: datetime | None = None
    refusal: Outcome | None = None
    """Why it brought no machine; None when it did, or while nobody knows."""
    detail: str = ""
    members: list[Member] = field(default_factory=list)

    @property
    def cloud(self) -> str:
        return self.pools[0].pool.cloud

    @property
    def region(self) -> str:
        return self.pools[0].pool.region

    @property
    def refused_pools(self) -> list[CapacityPool]:
        """Those that gave fewer machines than were asked of them."""
        if self.answered_at is None:
            return []
        got = {model: sum(member.model == model for member in self.members) for model in ("spot", "on-demand")}
        short = {"spot": got["spot"] < self.spot, "on-demand": got["on-demand"] < self.on_demand}
        return [priced.pool for priced in self.pools if short[priced.pool.provisioning_model]]

    def price_of(self, pool: CapacityPool) -> PricedPool:
        """Of a pool that was asked, or of one like it that the cloud chose instead."""
        alike = [
            priced
            for priced in self.pools
            if priced.pool.provisioning_model == pool.provisioning_model
            and priced.pool.instance_type == pool.instance_type
        ]
        for priced in alike:
            if priced.pool == pool:
                return priced
        dearest = max(alike or self.pools, key=lambda priced: priced.usd_per_hour)
        return PricedPool(
            pool=pool, usd_per_hour=dearest.usd_per_hour, on_demand_usd_per_hour=dearest.on_demand_usd_per_hour
        )


@dataclass(slots=True)
class FleetState:
    run_id: str
    job: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    store: str = ""
    started_at: datetime | None = None
    closed_at: datetime | None = None
    state: str = "new"
    """new, running, finished, failed, cancelled, over-budget."""
    detail: str = ""
    clock_speed: float = 1.0
    opening: int = 1
    """How often the run was begun: 1, and one more each time that it was taken up after its end."""
    reserved: dict[int, tuple[str, float]] = field(default_factory=dict)
    """By opening: name of the budget and the dollars that are set aside in it."""
    rounds: list[Round] = field(default_factory=list)
    members: dict[str, Member] = field(default_factory=dict)
    """By machine, in the order of their launches."""
    asked_to_end: tuple[Outcome, str] | None = None
    """Why the orchestrator asked every machine to end: outcome and words."""
    warnings: list[str] = field(default_factory=list)
    fallbacks: list[tuple[datetime, str]] = field(default_factory=list)
    recoveries: int = 0

    @property
    def open_round(self) -> Round | None:
        """The one that was asked for and whose answer is not known."""
        return self.rounds[-1] if self.rounds and self.rounds[-1].answered_at is None else None

    @property
    def living(self) -> list[Member]:
        return [member for member in self.members.values() if member.outcome is None]

    def ended(self, *outcomes: str) -> list[Member]:
        return [member for member in self.members.values() if member.outcome in outcomes]

    def unfinished(self, *outcomes: str) -> list[Member]:
        """Those of the present opening: what an earlier one has lost is forgiven."""
        return [member for member in self.ended(*outcomes) if member.opening == self.opening]

    @property
    def usd_total(self) -> float:
        return add_usd(member.usd for member in self.members.values())

    @property
    def billed_seconds(self) -> float:
        return sum(member.billed_seconds for member in self.members.values())

    def usd_of_opening(self, opening: int) -> float:
        return add_usd(member.usd for member in self.members.values() if member.opening == opening)

    def hours_of_opening(self, opening: int) -> float:
        """Machine hours that were billed."""
        return sum(member.billed_seconds for member in self.members.values() if member.opening == opening) / 3600


def read_fleet_state(run_id: str, entries: Iterable[Entry]) -> FleetState:
    """Fold the journal. The same entries give the same state, whoever asks and when."""
    return fold_fleet(FleetState(run_id), entries)


AnyFleetState = TypeVar("AnyFleetState", bound=FleetState)


def fold_fleet(state: AnyFleetState, entries: Iterable[Entry]) -> AnyFleetState:
    """`state` with what the entries say of a fleet."""
    for entry in entries:
        fields = entry.fields
        match entry.kind:
            case "run-started":
                state.job, state.fingerprint = fields["job"], fields["fingerprint"]
                state.started_at, state.state = entry.at, "running"
                state.clock_speed, state.store = fields["clock_speed"], fields["store"]
            case "taken-over":
                state.recoveries += 1
            case "reopened":
                state.state, state.closed_at, state.detail = "running", None, ""
                state.opening += 1
                state.asked_to_end = None
            case "fleet-reserved":
                state.reserved[state.opening] = (fields["budget"], fields["usd_reserved"])
            case "round-asked":
                state.rounds.append(_round(state, entry))
            case "members-launched":
                _launch(state, entry)
            case "round-refused":
                refused = state.rounds[-1]
                refused.answered_at, refused.refusal, refused.detail = entry.at, fields["outcome"], fields["detail"]
            case "members-ended":
                for ended in fields["members"]:
                    _end(state.members[ended["machine"]], ended, entry.at)
            case "fleet-asked-to-end":
                state.asked_to_end = (fields["outcome"], fields["why"])
            case "fallback":
                state.fallbacks.append((entry.at, fields["reason"]))
            case "warned":
                if fields["text"] not in state.warnings:
                    state.warnings.append(fields["text"])
            case "closed":
                state.state, state.closed_at, state.detail = fields["state"], entry.at, fields["detail"]
    return state


def _round(state: FleetState, entry: Entry) -> Round:
    fields = entry.fields
    return Round(
        number=fields["round"],
        opening=state.opening,
        token=fields["token"],
        pools=[
            PricedPool(
                pool=CapacityPool(**priced["pool"]),
                usd_per_hour=priced["usd_per_hour"],
                on_demand_usd_per_hour=priced["on_demand_usd_per_hour"],
            )
            for priced in fields["pools"]
        ],
        spot=fields["spot"],
        on_demand=fields["on_demand"],
        asked_at=entry.at,
        reason=fields["reason"],
    )


def _launch(state: FleetState, entry: Entry) -> None:
    asked = state.rounds[entry.fields["round"] - 1]
    asked.answered_at = asked.answered_at or entry.at
    for launched in entry.fields["members"]:
        pool = launched["pool"]
        priced = asked.pools[pool] if isinstance(pool, int) else asked.price_of(CapacityPool(**pool))
        member = Member(
            machine=launched["machine"],
            round=asked.number,
            opening=asked.opening,
            priced=priced,
            launched_at=datetime.fromisoformat(launched["launched_at"]),
        )
        state.members[member.machine] = member
        asked.members.append(member)


def _end(member: Member, ended: Mapping[str, Any], at: datetime) -> None:
    member.outcome, member.detail, member.detected_at = ended["outcome"], ended.get("detail", ""), at
    member.billed_seconds, member.usd = ended["billed_seconds"], ended["usd"]
    member.terminated_at = datetime.fromisoformat(ended["terminated_at"])
