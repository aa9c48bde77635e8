"""A hard cap on dollars, machines and machine hours that every run of a budget shares."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import OverBudgetError
from holdfast.ledger.budget import Budget, BudgetLedger, Standing
from holdfast.ledger.journal import Journal
from holdfast.storage import DirectoryStore
from tests.unit.failing_store import FailingStore, Killed

NOW = datetime(2026, 11, 1, tzinfo=UTC)
TEN = Budget(name="team", max_usd=10.0, max_machines=3)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def test_what_is_reserved_counts_as_spent_until_it_is_settled(store: DirectoryStore) -> None:
    ledger = BudgetLedger(store, TEN)
    ledger.reserve("run-0001", 6.0, NOW)
    assert ledger.standing() == Standing(0.0, {"run-0001": 6.0})
    with pytest.raises(OverBudgetError, match=r"'team'.*\$4\.50.*of \$10\.00 \$0\.00 is spent and \$6\.00 reserved"):
        ledger.reserve("run-0002", 4.5, NOW)
    ledger.settle("run-0001", 1.25, NOW)
    ledger.reserve("run-0002", 4.5, NOW)
    assert ledger.standing() == Standing(1.25, {"run-0002": 4.5})
    assert ledger.standing().committed_usd == 5.75


def test_the_cap_may_be_reached_but_not_passed(store: DirectoryStore) -> None:
    ledger = BudgetLedger(store, TEN)
    for number in range(3):
        ledger.reserve(f"run-{number}", 3.3333, NOW)
    ledger.settle("run-0", 3.3333, NOW)
    with pytest.raises(OverBudgetError):
        ledger.reserve("run-3", 0.0002, NOW)
    ledger.reserve("run-3", 0.0001, NOW)
    assert ledger.standing().committed_usd == 10.0


def test_machines_are_capped_too(store: DirectoryStore) -> None:
    ledger = BudgetLedger(store, TEN)
    for number in range(3):
        ledger.reserve(f"run-{number}", 0.01, NOW)
    with pytest.raises(OverBudgetError, match="3 machines live, which is max_machines"):
        ledger.reserve("run-3", 0.01, NOW)
    ledger.settle("run-1", 0.01, NOW)
    ledger.reserve("run-3", 0.01, NOW)


def test_machine_hours_are_capped_over_all_runs(store: DirectoryStore) -> None:
    ledger = BudgetLedger(store, Budget(name="team", max_usd=1000, max_machines=9, max_machine_hours=10.0))
    ledger.reserve("train", 1.0, NOW, hours=4.0)
    ledger.reserve("fleet", 1.0, NOW, machines=3, hours=6.0)
    assert "of 10 0.00 are used and 10.00 reserved" in ledger.why_too_long(0.5)
    with pytest.raises(OverBudgetError, match=r"'team': 0\.50 machine hours .* raise max_machine_hours"):
        ledger.reserve("other", 1.0, NOW, hours=0.5)
    ledger.settle("fleet", 0.7, NOW, hours=2.5)
    assert ledger.why_too_long(3.5) == ""
    ledger.reserve("other", 1.0, NOW, hours=3.5)
    assert ledger.standing().committed_hours == 10.0
    with pytest.raises(OverBudgetError, match=r"of 10 2\.50 are used and 7\.50 reserved"):
        ledger.reserve("train", 1.0, NOW, hours=4.1)  # the same token for more: its own counts once
    ledger.reserve("train", 1.0, NOW, hours=4.0)


def test_without_a_cap_on_hours_they_are_counted_all_the_same(store: DirectoryStore) -> None:
    BudgetLedger(store, TEN).reserve("run-1", 1.0, NOW, hours=500.0)
    BudgetLedger(store, TEN).settle("run-1", 0.5, NOW, hours=2.0)
    capped = BudgetLedger(store, Budget(name="team", max_usd=10.0, max_machines=3, max_machine_hours=2.5))
    assert capped.why_too_long(0.5) == "" and capped.why_too_long(0.6) != ""


def test_reserving_and_settling_again_changes_nothing(store: DirectoryStore) -> None:
    ledger = BudgetLedger(store, TEN)
    for _ in range(2):
        ledger.reserve("run-1", 2.0, NOW)
    for usd in (0.5, 1.9):
        BudgetLedger(store, TEN).settle("run-1", usd, NOW)
    assert ledger.standing() == Standing(0.5, {})


def test_a_reservation_that_was_given_back_can_be_made_anew(store: DirectoryStore) -> None:
    ledger = BudgetLedger(store, TEN)
    ledger.reserve("run-1", 2.0, NOW)
    ledger.settle("run-1", 0.0, NOW)  # the run was closed before the attempt came into its journal
    ledger.reserve("run-1", 3.0, NOW)  # and is taken up again
    assert ledger.standing() == Standing(0.0, {"run-1": 3.0})


def test_settling_what_was_never_reserved_costs_nothing(store: DirectoryStore) -> None:
    BudgetLedger(store, TEN).settle("stranger", 5.0, NOW)
    assert BudgetLedger(store, TEN).standing() == Standing(0.0, {})


def test_another_budget_of_the_same_store_has_its_own_cap(store: DirectoryStore) -> None:
    BudgetLedger(store, TEN).reserve("run-1", 9.0, NOW)
    BudgetLedger(store, Budget(name="team-2", max_usd=10.0, max_machines=1)).reserve("run-2", 9.0, NOW)
    assert BudgetLedger(store, TEN).standing().committed_usd == 9.0


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_crash_at_any_call_leaves_the_reservation_made_or_not_made(store: DirectoryStore, at: int) -> None:
    """The same token, asked for again, ends in one reservation either way."""
    BudgetLedger(store, TEN).reserve("run-0", 1.0, NOW)
    with pytest.raises(Killed):
        BudgetLedger(FailingStore(store, at=[at]), TEN).reserve("run-1", 2.0, NOW)
    BudgetLedger(store, TEN).reserve("run-1", 2.0, NOW)
    assert BudgetLedger(store, TEN).standing() == Standing(0.0, {"run-0": 1.0, "run-1": 2.0})


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", "d", "e"]),
            st.floats(0.0, 6.0),
            st.integers(1, 3),
            st.floats(0.0, 8.0),
            st.floats(0.0, 1.0) | st.none(),
        ),
        max_size=15,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_runs_ask_for_and_use_no_cap_is_passed(
    asked: list[tuple[str, float, int, float, float | None]],
) -> None:
    """Each asks for dollars, machines and hours, or settles a part of what it had been given."""
    cap = Budget(name="team", max_usd=10.0, max_machines=5, max_machine_hours=12.0)
    with tempfile.TemporaryDirectory() as folder:
        ledger = BudgetLedger(DirectoryStore(Path(folder)), cap)
        for token, usd, machines, hours, used in asked:
            before = ledger.standing()
            if used is not None:
                given = before.reserved_usd.get(token, 0.0), before.reserved_hours.get(token, 0.0)
                ledger.settle(token, given[0] * used, NOW, hours=given[1] * used)
            else:
                with contextlib.suppress(OverBudgetError):
                    ledger.reserve(token, usd, NOW, machines=machines, hours=hours)
            now = ledger.standing()
            assert now.committed_usd <= cap.max_usd + 1e-6
            assert now.machines <= cap.max_machines
            assert now.committed_hours <= 12.0 + 1e-6


def test_the_caps_hold_with_processes_racing_for_the_last_dollar(store: DirectoryStore) -> None:
    program = """
import sys
from datetime import UTC, datetime
from holdfast.errors import OverBudgetError
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.storage import open_store
ledger = BudgetLedger(open_store(sys.argv[1]), Budget(name="team", max_usd=10.0, max_machines=1000))
sys.stdin.readline()
for number in range(10):
    try:
        ledger.reserve(f"{sys.argv[2]}-{number}", 0.7, datetime.now(UTC))
        print(number)
    except OverBudgetError:
        pass
"""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, store.url, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "wxyz"
    ]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    granted = sum(len(racer.communicate(timeout=60)[0].split()) for racer in racers)
    standing = BudgetLedger(store, TEN).standing()
    assert granted == len(standing.reserved_usd) == 14
    assert standing.committed_usd == 9.8


def test_threads_that_settle_one_machine_at_once_charge_it_once(store: DirectoryStore) -> None:
    BudgetLedger(store, TEN).reserve("run-1", 2.0, NOW)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: BudgetLedger(store, TEN).settle("run-1", 0.75, NOW), range(8)):
            pass
    assert BudgetLedger(store, TEN).standing() == Standing(0.75, {})
    kinds = [entry.kind for entry in Journal(store, "budgets/team/journal/").read()]
    assert kinds == ["reserved", "settled"]
