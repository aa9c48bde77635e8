"""`make demo` shows what it promises: this is the main job, as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.ledger.billing import add_usd
from tests.conftest import command_lines_with

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.timeout(400)
def test_the_demonstration_survives_its_market_and_hands_over_a_bill_that_adds_up(folder: Path) -> None:
    shutil.copytree(REPOSITORY / "examples", folder / "examples")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "HOLDFAST_"))}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HOME": str(folder)}
    command = [sys.executable, "-m", "flows", "demo", "--seed", "7"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr

    [path] = folder.glob(".holdfast/runs/*/summary.json")
    summary = json.loads(path.read_text())
    attempts = summary["attempts"]
    assert summary["state"] == "finished"
    assert summary["interruptions"] >= 3
    assert summary["refusals"] >= 1
    assert attempts[-1]["provisioning_model"] == "on-demand" and attempts[-1]["outcome"] == "finished"
    assert 0 < summary["lost_steps"] < 0.1 * summary["steps_total"]
    assert summary["usd_total"] == add_usd(attempt["usd"] for attempt in attempts)
    assert summary["lost_steps"] == sum(attempt["lost_steps"] for attempt in attempts)
    assert round(sum(attempt["billed_seconds"] for attempt in attempts), 3) == summary["billed_seconds"]

    for event in ("launched", "notice", "committed at step", "preempted", "resumed from step", "fallback", "refused"):
        assert event in done.stdout
    for place in (str(path.parent.relative_to(folder)), "timeline.png", "make ui", "20 times as fast as the wall's"):
        assert place in done.stdout
    assert (path.parent / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert done.stderr == ""
    assert command_lines_with(str(folder)) == []
