"""What passes in a run besides training, read from its journal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from holdfast.ledger.journal import Entry
from holdfast.ledger.times import times_of

START = datetime(2026, 12, 1, tzinfo=UTC)
POOL = {"cloud": "local", "region": "r", "zone": "z", "instance_type": "t", "provisioning_model": "spot"}


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def told(seconds: float) -> str:
    return at(seconds).isoformat()


def reserved(number: int) -> dict[str, Any]:
    usd = {"usd_per_hour": 1.0, "on_demand_usd_per_hour": 3.0, "usd_reserved": 1.0}
    return {"attempt": number, "pool": POOL, "reason": "spot is to be had", **usd}


def ended(number: int, outcome: str, terminated: float | None, steps: int | None, **report: Any) -> dict[str, Any]:
    said = {"attempt": number, "outcome": outcome, "detail": "", "billed_seconds": 0, "usd": 0, "resumed_step": 0}
    return {
        **said,
        "terminated_at": None if terminated is None else told(terminated),
        "last_step": steps,
        "committed_step": steps,
        "report": report,
    }


def journal(*entries: tuple[float, str, dict[str, Any]]) -> list[Entry]:
    return [Entry(number, kind, at(seconds), fields) for number, (seconds, kind, fields) in enumerate(entries, 1)]


STARTED = (0.0, "run-started", {"job": {}, "fingerprint": "", "clock_speed": 1.0})


def test_times_between_steps_are_read_from_a_journal() -> None:
    marks = {"resumed": told(90), "first-step": told(112), "preempting": told(330)}
    notice = {"kind": "preemption", "reclaim_at": told(380)}
    entries = journal(
        STARTED,
        (4, "planned", {"restart_seconds": 150.0, "pool": "p", "reason": "r"}),
        (5, "reserved", reserved(1)),
        (9, "launched", {"attempt": 1, "machine": "m", "launched_at": told(8)}),
        (352, "ended", ended(1, "preempted", 350, 22, marks=marks, notice=notice, last_step_at=told(322))),
        (360, "planned", {"restart_seconds": 170.0, "pool": "", "reason": "waiting"}),
        (400, "reserved", reserved(2)),
        (412, "ended", ended(2, "no-capacity", None, None)),
        (415, "reserved", reserved(3)),
    )
    times = times_of([entries])
    assert times.begin == [8.0] and times.launch == [] and times.told_restart == [150.0, 170.0]
    assert times.boot == [94.0]  # 21 steps in 210 s after the first, which took 12 s longer than they
    assert times.stop == [28.0] and times.unused_notice == [30.0]
    assert times.detect == [10.0]  # until the decision to wait; the wait itself is not in it
    assert times.refusal == [15.0]
    assert times.mean("obey") == 0.0


def test_a_machine_told_of_its_end_before_its_first_step_and_one_that_is_asked_to_leave() -> None:
    notice = {"kind": "preemption", "reclaim_at": told(100)}
    marks = {"resumed": told(190), "first-step": told(201), "preempting": told(245)}
    entries = journal(
        STARTED,
        (5, "reserved", reserved(1)),
        (9, "launched", {"attempt": 1, "machine": "m", "launched_at": told(8)}),
        (61, "ended", ended(1, "preempted", 60, None, marks={}, notice=notice)),
        (70, "reserved", reserved(2)),
        (75, "launched", {"attempt": 2, "machine": "n", "launched_at": told(74)}),
        (230, "asked-to-end", {"attempt": 2, "outcome": "moved", "why": "back to spot"}),
        (256, "ended", ended(2, "moved", 250, 5, marks=marks, last_step_at=told(241))),
    )
    times = times_of([entries, entries])
    assert times.short_life == [52.0, 52.0] and times.unused_notice == []
    assert times.obey == [11.0, 11.0] and times.boot == pytest.approx([117.0, 117.0])
    assert times.launch == [4.0, 4.0] and times.means()["stop"] == 9.0
