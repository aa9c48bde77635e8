"""A hard cap on dollars, machines and machine hours that every run of a budget shares. It holds by conditional writes alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from holdfast.errors import OverBudgetError
from holdfast.ledger.billing import add_usd
from holdfast.ledger.journal import Entry, Journal
from holdfast.storage import ObjectStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    name: str
    max_usd: float
    """For all runs of this budget together: spent and reserved."""
    max_machines: int
    max_machine_hours: float | None = None
    """For all runs together, as `max_usd`; None: no cap."""


@dataclass(frozen=True, slots=True)
class Standing:
    spent_usd: float
    reserved_usd: dict[str, float]
    """By token, of machines that may live."""
    fleets: dict[str, int] = field(default_factory=dict)
    """By token, where it stands for more machines than one: how many."""
    spent_hours: float = 0.0
    """Machine hours."""
    reserved_hours: dict[str, float] = field(default_factory=dict)
    """By token."""

    @property
    def machines(self) -> int:
        return sum(self.fleets.get(token, 1) for token in self.reserved_usd)

    @property
    def committed_usd(self) -> float:
        return add_usd([self.spent_usd, *self.reserved_usd.values()])

    @property
    def committed_hours(self) -> float:
        return self.spent_hours + sum(self.reserved_hours.values())


class BudgetLedger:
    def __init__(self, store: ObjectStore, budget: Budget) -> None:
        self.name = budget.name
        self._journal = Journal(store, f"budgets/{budget.name}/journal/")
        self._budget = budget

    def standing(self) -> Standing:
        return _standing(self._journal.read())

    def why_too_long(self, hours: float) -> str:
        """Words when so many machine hours would pass the cap now; empty when they would not. Raises TransientError."""
        return _why_too_long(self._budget, self.standing(), hours)

    def reserve(self, token: str, usd: float, now: datetime, machines: int = 1, hours: float = 0.0) -> None:
        """Set `usd` and `hours` of machines aside for `token`; once, however often it is asked.

        A fleet may ask for more later: then this is what it has in all. Raises OverBudgetError.
        """

        def decide(entries: list[Entry]) -> tuple[str, datetime, dict[str, Any]] | None:
            standing = _standing(entries)
            had = standing.reserved_usd.get(token)
            had_hours = standing.reserved_hours.get(token, 0.0)
            had_machines = 0 if had is None else standing.fleets.get(token, 1)
            if had is not None and had >= usd and had_hours >= hours and had_machines >= machines:
                return None
            cap = self._budget
            of_others = standing.committed_usd - (had or 0.0)
            if of_others + usd > cap.max_usd + 1e-9:
                raise OverBudgetError(
                    f"budget {cap.name!r}: ${usd:.2f} is the worst case of the next "
                    f"{'machine' if machines == 1 else f'{machines} machines'}, but of ${cap.max_usd:.2f} "
                    f"${standing.spent_usd:.2f} is spent and ${add_usd(standing.reserved_usd.values()):.2f} reserved; "
                    "raise max_usd, or lower the job's max_run_hours"
                )
            if why := _why_too_long(cap, standing, hours, had_hours):
                raise OverBudgetError(why)
            if machines > had_machines and standing.machines - had_machines + machines > cap.max_machines:
                too_many = "which is max_machines" if machines == 1 else f"{machines} more would pass max_machines"
                raise OverBudgetError(
                    f"budget {cap.name!r}: {standing.machines} machines live, {too_many}"
                    f"{'' if machines == 1 else f', {cap.max_machines}'}; wait for one to end, or raise it"
                )
            machines_in_all = max(machines, had_machines)
            more = {"machines": machines_in_all} if machines_in_all != 1 else {}
            more |= {"hours": max(hours, had_hours)} if hours or had_hours else {}
            return "reserved", now, {"token": token, "usd": max(usd, had or 0.0), **more}

        self._journal.append_if(decide)

    def settle(self, token: str, usd: float, now: datetime, hours: float = 0.0) -> None:
        """Replace the reservation of `token` by what it cost and took; once, however often it is asked."""

        def decide(entries: list[Entry]) -> tuple[str, datetime, dict[str, Any]] | None:
            if token not in _standing(entries).reserved_usd:
                return None
            return "settled", now, {"token": token, "usd": usd} | ({"hours": hours} if hours else {})

        self._journal.append_if(decide)


def _why_too_long(cap: Budget, standing: Standing, hours: float, had: float = 0.0) -> str:
    if cap.max_machine_hours is None or standing.committed_hours - had + hours <= cap.max_machine_hours + 1e-6:
        return ""
    return (
        f"budget {cap.name!r}: {hours:.2f} machine hours are the worst case of what comes next, but of "
        f"{cap.max_machine_hours:g} {standing.spent_hours:.2f} are used and {sum(standing.reserved_hours.values()):.2f} "
        "reserved; raise max_machine_hours, or lower the job's max_run_hours"
    )


def _standing(entries: list[Entry]) -> Standing:
    spent: list[float] = []
    reserved: dict[str, float] = {}
    fleets: dict[str, int] = {}
    spent_hours: list[float] = []
    reserved_hours: dict[str, float] = {}
    for entry in entries:
        token, usd = entry.fields["token"], entry.fields["usd"]
        if entry.kind == "reserved":
            reserved[token] = usd
            if "machines" in entry.fields:
                fleets[token] = entry.fields["machines"]
            if "hours" in entry.fields:
                reserved_hours[token] = entry.fields["hours"]
        elif reserved.pop(token, None) is not None:
            fleets.pop(token, None)
            reserved_hours.pop(token, None)
            spent.append(usd)
            spent_hours.append(entry.fields.get("hours", 0.0))
    return Standing(add_usd(spent), reserved, fleets, sum(spent_hours), reserved_hours)
