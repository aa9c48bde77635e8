"""What a difference between ledger and bill is called, and why it may be there."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from holdfast.drivers.protocol import CapacityPool
from holdfast.ledger.journal import Journal
from holdfast.market.bills import Bill, BillLine
from holdfast.market.history import Life
from holdfast.market.reconciliation import (
    Known,
    Reconciler,
    Reconciliation,
    Told,
    Tolerance,
    known_runs,
    tag_on_bill,
    to_markdown,
    told_by_ledger,
    whole_days,
)
from holdfast.runtime.contract import journal_prefix
from holdfast.storage import DirectoryStore

START, END = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 8, tzinfo=UTC)
LATER = END + timedelta(days=3)
OVER = {"r": Known("r", over=True)}


def bill(*lines: BillLine, cloud="aws", reaches: datetime | None = END) -> Bill:
    return Bill(cloud=cloud, source="the bill", lines=lines, reaches=reaches)


def held(ledger: dict[str, float], found: Bill, known: dict[str, Known] | None = None, now=LATER) -> Reconciliation:
    told = {run: Told(usd, END - timedelta(hours=1)) for run, usd in ledger.items()}
    return Reconciler(bill=found, start=START, end=END, now=now).against(told, OVER if known is None else known)


@pytest.mark.parametrize(
    ("ledger", "billed", "verdict", "alarming", "why"),
    [
        (10.0, 10.0, "agrees", False, ""),
        (10.0, 10.4, "agrees", False, "rounding"),
        (0.01, 0.05, "agrees", False, "rounding"),
        (10.0, 12.0, "differs", True, "lived longer than the ledger knows"),
        (10.0, 8.0, "differs", True, "savings plan"),
    ],
)
def test_a_difference_within_the_tolerance_agrees_and_one_beyond_it_is_explained(
    ledger, billed, verdict, alarming, why
):
    found = held({"r": ledger}, bill(BillLine(tag="r", machines_usd=billed)))
    assert (found.differences[0].verdict, bool(found.alarming)) == (verdict, alarming)
    assert why in found.differences[0].why
    assert found.differences[0].difference_usd == pytest.approx(billed - ledger)


def test_a_run_on_the_bill_that_no_journal_has_is_a_leak_and_comes_first():
    found = held({"r": 10.0}, bill(BillLine(tag="r", machines_usd=12.0), BillLine(tag="ghost", machines_usd=20.0)))
    assert [(one.run, one.verdict) for one in found.differences] == [
        ("ghost", "unknown to the ledger"),
        ("r", "differs"),
    ]
    assert "holdfast reap" in found.differences[0].why and "holdfast-run=ghost" in found.differences[0].why
    assert "the first ghost ($+20.00" in found.headline


def test_a_run_that_is_not_over_may_cost_more_than_the_ledger_has_counted_yet():
    found = held({}, bill(BillLine(tag="r", machines_usd=5.0)), {"r": Known("r", over=False)})
    assert found.differences[0].verdict == "running" and not found.alarming


@pytest.mark.parametrize(
    ("now", "reaches", "verdict"),
    [
        (END + timedelta(hours=10), END, "not on the bill yet"),
        (LATER, END - timedelta(days=2), "not on the bill yet"),
        (LATER, END, "not on the bill"),
        (END + timedelta(days=10), END - timedelta(days=2), "not on the bill"),
        (END + timedelta(days=10), None, "not on the bill"),
    ],
)
def test_what_the_bill_lacks_is_late_or_missing(now, reaches, verdict):
    found = held({"r": 3.0}, bill(reaches=reaches), now=now)
    assert found.differences[0].verdict == verdict
    assert bool(found.alarming) == (verdict == "not on the bill")


def test_disks_traffic_and_credits_are_shown_and_not_compared():
    found = held({"r": 10.0}, bill(BillLine(tag="r", machines_usd=10.0, other_usd=4.0, credits_usd=-9.0)))
    assert not found.alarming
    assert "| r | agrees | 10.0000 | 10.0000 | 0.0000 | 4.0000 | -9.0000 |" in to_markdown(found)


def test_a_run_whose_name_is_no_label_is_found_on_google_s_bill(tmp_path):
    store = DirectoryStore(tmp_path)
    Journal(store, journal_prefix("Night.3")).append("closed", START)
    Journal(store, journal_prefix("day-4")).append("reserved", START)
    tag = tag_on_bill("gcp", "Night.3")
    assert tag.startswith("sha256-") and tag_on_bill("aws", "Night.3") == "Night.3"
    known = known_runs(store, [tag, "day-4", "sha256-of-nobody"], "gcp")
    assert known == {tag: Known("Night.3", over=True), "day-4": Known("day-4", over=False)}
    found = held({"Night.3": 1.0}, bill(BillLine(tag=tag, machines_usd=1.0), cloud="gcp"), known)
    assert [(one.run, one.verdict) for one in found.differences] == [("Night.3", "agrees")]


def life(run: str, launched_at: datetime | None, hours: float, usd: float, cloud: str = "aws") -> Life:
    ended_at = (launched_at or START) + timedelta(hours=hours)
    pool = CapacityPool(cloud, "r", "z", "t", "spot")
    return Life(
        run=run,
        token="1",
        pool=pool,
        launched_at=launched_at,
        ended_at=ended_at,
        recorded_at=ended_at,
        outcome="finished",
        usd=usd,
    )


def test_a_machine_that_ran_across_the_edge_counts_by_its_hours():
    lives = [
        life("a", START - timedelta(hours=3), 4, 8.0),
        life("a", END - timedelta(hours=1), 4, 8.0),
        life("b", START, 5, 1.0),
        life("b", START, 5, 1.0, cloud="gcp"),
        life("c", None, 0, 0.0),
        life("d", END, 1, 1.0),
    ]
    assert told_by_ledger(lives, "aws", START, END) == {
        "a": Told(4.0, END),
        "b": Told(1.0, START + timedelta(hours=5)),
    }


def test_the_days_looked_at_are_whole_and_over_for_two_days():
    start, end = whole_days(datetime(2026, 11, 25, 3, 15, tzinfo=UTC), 14)
    assert (start, end) == (datetime(2026, 11, 9, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC))


def test_the_tolerance_is_the_larger_of_dollars_and_share():
    tolerance = Tolerance(usd=0.5, share=0.1)
    assert tolerance.allows(1.0, 1.5) and not tolerance.allows(1.0, 1.6)
    assert tolerance.allows(100.0, 110.0) and not tolerance.allows(100.0, 112.0)
