"""What somebody sees who watches a run in a terminal."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from flows.display import LiveDisplay, PlainDisplay
from holdfast.supervision.updates import Update

FIELDS = {
    "step": 1250,
    "total_steps": 50000,
    "metrics": {"train_loss": 2.34567, "accuracy": 0.5},
    "phase": "training",
    "machine": "i-7a2d3174714f77d2e",
    "pool": "local-2b/n2-standard-2/on-demand",
    "usd": 12.3456,
}
SHOWN = [
    "step 1250/50000",
    "train_loss 2.346",
    "attempt 12",
    "i-7a2d3174…",
    "training",
    "$12.3456",
    "local-2b/n2-standard-2/on-demand",
]


def progress(**changes: Any) -> Update:
    at = datetime(2026, 11, 1, tzinfo=UTC)
    return Update(kind="progress", at=at, attempt=12, text="step 1250", fields={**FIELDS, **changes})


def shown(*updates: Update) -> list[str]:
    """The lines that a terminal of 120 columns was sent, without its control sequences."""
    screen = io.StringIO()
    with LiveDisplay("digits-20261101-120000", Console(file=screen, width=120, force_terminal=True)) as display:
        for update in updates:
            display(update)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").split("\n")


def test_the_live_line_shows_step_loss_attempt_machine_state_dollars_and_pool_in_120_columns() -> None:
    lines = shown(progress())
    assert lines[0] == "run digits-20261101-120000"
    assert any(all(part in line for part in SHOWN) for line in lines), lines
    assert max(map(len, lines)) <= 120


def test_when_there_is_no_room_the_pool_is_cut_and_the_dollars_stay() -> None:
    lines = shown(progress(pool="us-central1-a/" + "n" * 80 + "/on-demand"))
    assert any("$12.3456" in line and "…" in line for line in lines), lines
    assert max(map(len, lines)) <= 120


def test_while_saves_fail_the_line_says_since_when_nothing_is_durable() -> None:
    lines = shown(progress(not_durable_step=1240, committed_step=900))
    assert any("training  not durable since step 900  $12.3456" in line for line in lines), lines


def test_a_pipe_gets_the_same_line(capsys: pytest.CaptureFixture[str]) -> None:
    PlainDisplay()(progress())
    line = capsys.readouterr().out
    assert all(part in line for part in SHOWN)


def test_before_there_is_a_machine_none_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    PlainDisplay()(progress(machine="", pool=None, usd=None))
    assert capsys.readouterr().out.rstrip().endswith("attempt 12  training  $0.0000")
