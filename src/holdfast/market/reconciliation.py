"""The ledger against the provider's bill, run by run: what each says, by how much they differ, and why they may."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from holdfast.drivers.gcp.names import labels_of
from holdfast.ledger.billing import add_usd, round_usd
from holdfast.market.bills import RUN_TAG, Bill, BillLine
from holdfast.market.history import Life
from holdfast.runtime.contract import journal_prefix
from holdfast.storage import ObjectStore

SETTLED_HOURS = 48.0
"""After which both clouds say that usage is on the bill: AWS within 24 h mostly, GCP within a day, neither for certain."""
DAY = timedelta(days=1)
MUCH_TOO_LATE = timedelta(days=7)
"""No bill is so late."""

Verdict = Literal["agrees", "differs", "running", "not on the bill yet", "not on the bill", "unknown to the ledger"]
ALARMING: frozenset[str] = frozenset({"differs", "not on the bill", "unknown to the ledger"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What a difference may be, whichever is more."""

    usd: float = 0.05
    share: float = 0.05

    def allows(self, ledger_usd: float, bill_usd: float) -> bool:
        return abs(bill_usd - ledger_usd) <= max(self.usd, self.share * max(ledger_usd, bill_usd)) + 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of one run, in dollars of the period."""

    run: str
    verdict: Verdict
    ledger_usd: float
    bill_usd: float
    """Of machines, before credits and taxes: what the ledger counts."""
    difference_usd: float
    """Above zero: the bill says more."""
    other_usd: float
    """Disks, addresses and traffic, which the ledger does not count."""
    credits_usd: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    cloud: str
    source: str
    start: datetime
    end: datetime
    differences: tuple[Difference, ...]
    """The alarming first, then by how much they differ."""

    @property
    def alarming(self) -> list[Difference]:
        return [one for one in self.differences if one.verdict in ALARMING]

    @property
    def ledger_usd(self) -> float:
        return add_usd(one.ledger_usd for one in self.differences)

    @property
    def bill_usd(self) -> float:
        return add_usd(one.bill_usd for one in self.differences)

    @property
    def headline(self) -> str:
        bad = self.alarming
        said = (
            f"{self.start:%Y-%m-%d} to {self.end - DAY:%Y-%m-%d}, {self.cloud}: the ledger says ${self.ledger_usd:.2f}, "
            f"{self.source} ${self.bill_usd:.2f}, for {len(self.differences)} runs"
        )
        if not bad:
            return f"{said}; no difference is beyond the tolerance"
        worst = max(bad, key=lambda one: abs(one.difference_usd))
        return f"{said}; {len(bad)} need a look, the first {worst.run} (${worst.difference_usd:+.2f}, {worst.verdict})"


@dataclass(frozen=True, slots=True)
class Told:
    """What the ledger says of one run."""

    usd: float
    until: datetime
    """The end of the last second that is in it."""


def told_by_ledger(lives: Iterable[Life], cloud: str, start: datetime, end: datetime) -> dict[str, Told]:
    """What machines cost within the time, by run. A life across the edge counts by its share of seconds."""
    amounts: dict[str, list[float]] = defaultdict(list)
    until: dict[str, datetime] = {}
    for life in lives:
        if life.pool.cloud != cloud or life.launched_at is None:
            continue
        began, ended = max(start, life.launched_at), min(end, life.ended_at)
        seconds = (life.ended_at - life.launched_at).total_seconds()
        if ended > began or start <= life.launched_at == life.ended_at < end:
            share = (ended - began).total_seconds() / seconds if seconds > 0 else 1.0
            amounts[life.run].append(round_usd(life.usd * share))
            until[life.run] = max(ended, until.get(life.run, ended))
    return {run: Told(add_usd(of), until[run]) for run, of in amounts.items()}


@dataclass(frozen=True, slots=True)
class Known:
    """A run that the store has a journal of."""

    run: str
    over: bool


def known_runs(store: ObjectStore, tags: Iterable[str], cloud: str) -> dict[str, Known]:
    """By the tags that a bill has, what the store knows of them. Raises TransientError."""
    names = {tag: tag for tag in tags}
    if hashed := {tag for tag in names if cloud == "gcp" and tag.startswith("sha256-")}:
        every = {info.key.split("/")[1] for info in store.list("runs/") if info.key.endswith("/journal/000001.json")}
        names |= {tag: run for run in every if (tag := tag_on_bill(cloud, run)) in hashed}
    found = {}
    for tag, run in names.items():
        if entries := store.list(journal_prefix(run)):
            found[tag] = Known(run, json.loads(store.get(entries[-1].key))["kind"] == "closed")
    return found


def tag_on_bill(cloud: str, run: str) -> str:
    """A run's name as its machines' tag has it; on GCP a label, which not every name can be."""
    return labels_of("", {RUN_TAG: run})[RUN_TAG] if cloud == "gcp" else run


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciler:
    """What a bill is held against."""

    bill: Bill
    start: datetime
    end: datetime
    now: datetime
    tolerance: Tolerance = field(default_factory=Tolerance)

    def against(self, ledger: Mapping[str, Told], known: Mapping[str, Known]) -> Reconciliation:
        """`ledger`: by run; `known`: what the store knows, by tag."""
        lines = {line.tag: line for line in self.bill.lines}
        runs = {tag_on_bill(self.bill.cloud, run): run for run in ledger}
        found = []
        for tag in {*runs, *lines}:
            journal = known.get(tag)
            run = runs.get(tag) or (journal.run if journal else tag)
            line = lines.get(tag, BillLine(tag=tag))
            of_run = ledger.get(run, Told(0.0, self.start))
            told, billed = of_run.usd, round_usd(line.machines_usd)
            if run not in ledger and not journal:
                verdict, why = self._of_a_stranger(line)
            elif self.tolerance.allows(told, billed):
                verdict, why = "agrees", "rounding, and seconds at either end" if told != billed else ""
            elif journal and not journal.over:
                verdict, why = "running", "the run is not over: the ledger counts a machine when it has ended"
            else:
                verdict, why = self._of_a_difference(of_run, billed, tag in lines)
            found.append(
                Difference(
                    run=run,
                    verdict=verdict,
                    ledger_usd=told,
                    bill_usd=billed,
                    difference_usd=round_usd(billed - told),
                    other_usd=round_usd(line.other_usd),
                    credits_usd=round_usd(line.credits_usd),
                    why=why,
                )
            )
        found.sort(key=lambda one: (one.verdict not in ALARMING, -abs(one.difference_usd), one.run))
        return Reconciliation(
            cloud=self.bill.cloud, source=self.bill.source, start=self.start, end=self.end, differences=tuple(found)
        )

    def _of_a_stranger(self, line: BillLine) -> tuple[Verdict, str]:
        if self.tolerance.allows(0.0, line.machines_usd):
            return "agrees", "a few cents of a run that is in no journal"
        return "unknown to the ledger", (
            "neither journal nor history of this store knows it. A leaked machine: run `holdfast reap`, and look for "
            f"{RUN_TAG}={line.tag} in the console; or the run's folder was deleted"
        )

    def _of_a_difference(self, told: Told, billed: float, on_it: bool) -> tuple[Verdict, str]:
        reaches, aws, age = self.bill.reaches, self.bill.cloud == "aws", self.now - told.until
        if billed > told.usd:
            return "differs", (
                "the bill is higher: a machine that lived longer than the ledger knows (look for one that is still there), "
                "a price list that is older than the prices, or an image with a licence"
            )
        # What the bill reaches is known by this store's runs alone: of a quiet week it says nothing.
        if age < timedelta(hours=SETTLED_HOURS) or (age < MUCH_TOO_LATE and (reaches is None or reaches < told.until)):
            reached = f", and reaches {reaches:%Y-%m-%d %H:%M} UTC now" if reaches else ""
            return "not on the bill yet", f"the bill is up to {SETTLED_HOURS:.0f} h late{reached}"
        if not on_it:
            return "not on the bill", (
                "the tags were not active for cost allocation when its machines ran (that is not retroactive), or another "
                "account pays for them"
                if aws
                else "the export was off when its machines ran, or goes to another table"
            )
        return "differs", (
            f"the bill is lower: {'a savings plan' if aws else 'a commitment, or a negotiated price'}, a free tier, a "
            "machine that the cloud took back free of charge, or prices in the account's block that are too high"
        )


COLUMNS = ("run", "verdict", "ledger $", "bill $", "difference $", "other $", "credits $", "why")


def cells(found: Reconciliation) -> list[dict[str, Any]]:
    """The table for people, one mapping a run."""
    return [dict(zip(COLUMNS, dataclasses.astuple(one), strict=True)) for one in found.differences]


def to_markdown(found: Reconciliation) -> str:
    lines = [f"**{found.headline}**", "", f"| {' | '.join(COLUMNS)} |", "| --- | --- |" + " ---: |" * 5 + " --- |"]
    for one in found.differences:
        usd = (one.ledger_usd, one.bill_usd, one.difference_usd, one.other_usd, one.credits_usd)
        lines.append(f"| {one.run} | {one.verdict} | {' | '.join(f'{amount:.4f}' for amount in usd)} | {one.why} |")
    return "\n".join(lines)


def whole_days(now: datetime, days: int) -> tuple[datetime, datetime]:
    """Start and end of the last `days` days in UTC of which the bill should be complete."""
    end = (now.astimezone(UTC) - timedelta(hours=SETTLED_HOURS)).replace(hour=0, minute=0, second=0, microsecond=0)
    return end - timedelta(days=days), end
