"""What the journal says of a gang's run: a fleet's rounds and members, and the formations that they trained in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from holdfast.ledger.fleet_state import FleetState, fold_fleet
from holdfast.ledger.journal import Entry


@dataclass(slots=True, kw_only=True)
class Formation:
    """One torchrun rendezvous, with members that do not change."""

    number: int
    members: list[str]
    host: str
    address: str
    port: int
    formed_at: datetime
    over_at: datetime | None = None
    gracious: bool = False
    why: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    """What its ranks last said of their steps and commits."""


@dataclass(slots=True, kw_only=True)
class GangFailure:
    """A program that failed though every member was there."""

    formation: int
    opening: int
    machine: str
    detail: str


@dataclass(slots=True)
class GangState(FleetState):
    formations: list[Formation] = field(default_factory=list)
    failures: list[GangFailure] = field(default_factory=list)

    @property
    def newest(self) -> Formation | None:
        return self.formations[-1] if self.formations else None

    @property
    def forming(self) -> bool:
        """Is no formation there, or only one that is over?"""
        return self.newest is None or self.newest.over_at is not None

    @property
    def trained(self) -> bool:
        """Have all members of the newest formation come to the program's end?"""
        return self.newest is not None and all(self.members[name].outcome == "finished" for name in self.newest.members)

    @property
    def failures_of_opening(self) -> list[GangFailure]:
        return [failure for failure in self.failures if failure.opening == self.opening]


def read_gang_state(run_id: str, entries: Sequence[Entry]) -> GangState:
    state = fold_fleet(GangState(run_id), entries)
    opening = 1
    for entry in entries:
        fields = entry.fields
        match entry.kind:
            case "reopened":
                opening += 1
            case "gang-formed":
                if state.formations:
                    state.formations[-1].report |= fields["left"]
                state.formations.append(
                    Formation(
                        number=fields["formation"],
                        members=fields["members"],
                        host=fields["host"],
                        address=fields["address"],
                        port=fields["port"],
                        formed_at=entry.at,
                    )
                )
            case "gang-over":
                over = state.formations[-1]
                over.over_at, over.gracious, over.why = entry.at, fields["gracious"], fields["why"]
                over.report = fields["report"]
            case "gang-failed":
                state.failures.append(
                    GangFailure(
                        formation=fields["formation"],
                        opening=opening,
                        machine=fields["machine"],
                        detail=fields["detail"],
                    )
                )
    return state
