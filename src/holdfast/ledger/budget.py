"""A hard cap on dollars and machines that every run of a budget shares. It holds by conditional writes alone."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Standing:
    spent_usd: float
    reserved_usd: dict[str, float]
    """By token, of machines that may live."""

    @property
    def committed_usd(self) -> float:
        return add_usd([self.spent_usd, *self.reserved_usd.values()])


class BudgetLedger:
    def __init__(self, store: ObjectStore, budget: Budget) -> None:
        self.name = budget.name
        self._journal = Journal(store, f"budgets/{budget.name}/journal/")
        self._budget = budget

    def standing(self) -> Standing:
        return _standing(self._journal.read())

    def reserve(self, token: str, usd: float, now: datetime) -> None:
        """Set `usd` aside for the machine of `token`; once, however often it is asked. Raises OverBudgetError."""

        def decide(entries: list[Entry]) -> tuple[str, datetime, dict[str, Any]] | None:
            standing = _standing(entries)
            if token in standing.reserved_usd:
                return None
            cap = self._budget
            if standing.committed_usd + usd > cap.max_usd + 1e-9:
                raise OverBudgetError(
                    f"budget {cap.name!r}: ${usd:.2f} is the worst case of the next machine, but of ${cap.max_usd:.2f} "
                    f"${standing.spent_usd:.2f} is spent and ${add_usd(standing.reserved_usd.values()):.2f} reserved; "
                    "raise max_usd, or lower the job's max_run_hours"
                )
            if len(standing.reserved_usd) >= cap.max_machines:
                raise OverBudgetError(
                    f"budget {cap.name!r}: {len(standing.reserved_usd)} machines live, which is max_machines; "
                    "wait for one to end, or raise it"
                )
            return "reserved", now, {"token": token, "usd": usd}

        self._journal.append_if(decide)

    def settle(self, token: str, usd: float, now: datetime) -> None:
        """Replace the reservation of `token` by what it cost; once, however often it is asked."""

        def decide(entries: list[Entry]) -> tuple[str, datetime, dict[str, Any]] | None:
            if token not in _standing(entries).reserved_usd:
                return None
            return "settled", now, {"token": token, "usd": usd}

        self._journal.append_if(decide)


def _standing(entries: list[Entry]) -> Standing:
    spent: list[float] = []
    reserved: dict[str, float] = {}
    for entry in entries:
        token, usd = entry.fields["token"], entry.fields["usd"]
        if entry.kind == "reserved":
            reserved[token] = usd
        elif reserved.pop(token, None) is not None:
            spent.append(usd)
    return Standing(add_usd(spent), reserved)
