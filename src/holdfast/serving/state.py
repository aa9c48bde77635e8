"""What the journal says of a serving run: a fleet's rounds and members, and which of them the load balancer had when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from holdfast.ledger.fleet_state import FleetState, Member, fold_fleet
from holdfast.ledger.journal import Entry
from holdfast.serving.balancer import Endpoint

THE_RUN_ENDS = "the run ends"


@dataclass(slots=True, kw_only=True)
class Service:
    """One stay of a machine in the load balancer."""

    endpoint: Endpoint
    since: datetime
    until: datetime | None = None
    why: str = ""
    """Why it was taken out."""


@dataclass(slots=True)
class ServeState(FleetState):
    services: dict[str, list[Service]] = field(default_factory=dict)
    """By machine, in the order of time."""
    retiring: dict[str, tuple[datetime, str]] = field(default_factory=dict)
    """Machines that we end ourselves once their requests are done: since when, and why."""
    leaves_off_at: datetime | None = None
    """When the run as a whole was asked to end: its replicas leave because of that, and for no other reason."""

    @property
    def registered(self) -> dict[str, Endpoint]:
        """Those that the load balancer sends requests to, as far as we have told it."""
        return {
            machine: stays[-1].endpoint for machine, stays in self.services.items() if stays and stays[-1].until is None
        }

    def endpoint_of(self, machine: str) -> Endpoint | None:
        stays = self.services.get(machine)
        return stays[-1].endpoint if stays else None

    def was_worth_its_start(self, member: Member, now: datetime) -> bool:
        """Has it served for at least as long as it took to begin?"""
        stays = self.services.get(member.machine)
        if not stays:
            return False
        served = sum((((stay.until or member.terminated_at or now) - stay.since) for stay in stays), timedelta(0))
        return served >= stays[0].since - member.launched_at


def read_serve_state(run_id: str, entries: Iterable[Entry]) -> ServeState:
    """Fold the journal. The same entries give the same state, whoever asks and when."""
    entries = list(entries)
    state = fold_fleet(ServeState(run_id), entries)
    for entry in entries:
        match entry.kind:
            case "replicas-registered":
                for fields in entry.fields["replicas"]:
                    endpoint = Endpoint(**fields)
                    state.services.setdefault(endpoint.machine, []).append(Service(endpoint=endpoint, since=entry.at))
            case "replicas-deregistered":
                for machine, why in entry.fields["replicas"].items():
                    stay = state.services[machine][-1]
                    stay.until, stay.why = entry.at, why
                    if why.startswith(THE_RUN_ENDS):
                        state.leaves_off_at = state.leaves_off_at or entry.at
            case "fleet-asked-to-end":
                state.leaves_off_at = state.leaves_off_at or entry.at
            case "reopened":
                state.leaves_off_at = None
            case "replica-retiring":
                state.retiring[entry.fields["machine"]] = (entry.at, entry.fields["why"])
    return state
