"""The black box: what a program says on the console is found there, whatever else is written to it."""

from __future__ import annotations

import os
from pathlib import Path

from holdfast.checkpoint.reporting import Console
from holdfast.supervision.watch import TRAINED


def test_a_step_is_found_behind_a_progress_bar(tmp_path: Path) -> None:
    path = tmp_path / "console"
    console = Console(path)
    with open(path, "ab", buffering=0) as program:
        for step in (1, 2, 3):
            program.write(f"\r{step}%|####".encode())  # no line end
            console.step(step, {"loss": 0.5})
    assert TRAINED.findall(path.read_text()) == ["1", "2", "3"]


def test_without_a_console_nothing_is_said(tmp_path: Path) -> None:
    for path in (None, tmp_path / "missing" / "console"):
        Console(path).step(1, {})
        Console(path).phase("commit", 1)
    assert os.listdir(tmp_path) == []
