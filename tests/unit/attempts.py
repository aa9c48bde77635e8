"""Attempts of a run as a journal tells them, for the tests of what is counted from it."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

from holdfast.drivers.protocol import CapacityPool
from holdfast.ledger.journal import Entry

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
STARTED_FIELDS = {"job": {"name": "gpt"}, "fingerprint": "f", "clock_speed": 1.0}


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


class Told:
    """A journal in the making: each call is an entry."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._attempts = 0
        self.add("run-started", 0, **STARTED_FIELDS)

    def add(self, kind: str, seconds: float, **fields: Any) -> Told:
        self.entries.append(Entry(len(self.entries) + 1, kind, at(seconds), fields))
        return self

    def attempt(
        self,
        outcome: str | None,
        resumed: int | None = None,
        last: int | None = None,
        committed: int | None = None,
        *,
        seconds: float = 100.0,
        usd: float = 0.5,
        model: str = "spot",
        machine: bool = True,
        report: dict[str, Any] | None = None,
        began: float | None = None,
    ) -> Told:
        """One machine's life of `seconds`; outcome None: it is still under way."""
        self._attempts += 1
        began = 1000.0 * self._attempts if began is None else began
        pool = CapacityPool("local", "local-1", "local-1a", "g5.xlarge", model)  # type: ignore[arg-type]
        self.add(
            "reserved",
            began - 1,
            attempt=self._attempts,
            pool=dataclasses.asdict(pool),
            usd_per_hour=0.4,
            on_demand_usd_per_hour=1.0,
            interruptions_per_hour=0.1,
            usd_reserved=24.0,
            reason="spot first",
        )
        if machine:
            launched_at = at(began).isoformat()
            self.add("launched", began, attempt=self._attempts, machine=f"i-{self._attempts}", launched_at=launched_at)
        if outcome:
            self.add(
                "ended",
                began + seconds,
                attempt=self._attempts,
                outcome=outcome,
                detail="",
                terminated_at=at(began + seconds).isoformat() if machine else None,
                billed_seconds=seconds if machine else 0.0,
                usd=usd if machine else 0.0,
                resumed_step=resumed,
                last_step=last,
                committed_step=committed,
                report=report or {},
            )
        return self


def marks(**seconds: float) -> dict[str, Any]:
    """A report that says when things happened: marks(resumed=10, first_step=11)."""
    return {"marks": {kind.replace("_", "-"): at(when).isoformat() for kind, when in seconds.items()}}
