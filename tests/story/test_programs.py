"""Any program can be run: with PyTorch or without, with our three lines or without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.drivers.local.config import Fate
from holdfast.model import TrainingJob, load_job
from holdfast.storage import DirectoryStore
from tests.chaos.runs import outcomes, summary_of, tiny_job
from tests.conftest import PROGRAMS

EXAMPLES = Path(__file__).parents[2] / "examples"


def log_of(store: DirectoryStore, run_id: str) -> str:
    keys = [info.key for info in store.list(f"runs/{run_id}/attempts/") if "/logs/" in info.key]
    return b"".join(store.get(key) for key in keys).decode()


def test_a_shell_script_that_writes_folders_goes_on_where_it_was(folder: Path, store: DirectoryStore) -> None:
    job = load_job(EXAMPLES / "counting.yaml").model_copy(update={"notice_poll_seconds": 0.1})
    fates = [Fate(after_seconds=2, notice=True), Fate(after_seconds=3, notice=False)]
    summary = summary_of(folder, job, fates, store, clock_speed=20.0)
    assert outcomes(summary)[-1][1] == "finished"
    assert summary["steps_total"] == 40
    log = log_of(store, "counting")
    assert "the numbers up to 40 add up to 820" in log


def test_arguments_and_environment_reach_a_command_as_they_were_given(folder: Path, store: DirectoryStore) -> None:
    arguments = ["a b", "$HOME", "it's", '"quoted"', "", "ümlaut", "; echo no"]
    job = TrainingJob(
        name="echo",
        command=[sys.executable, "-c", "import os, sys; print(sys.argv[1:], os.environ['GREETING'])"],
        args=arguments,
        env={"GREETING": "it's $HOME; `ls`"},
        code=str(PROGRAMS),
        max_run_hours=1,
    )
    summary_of(folder, job, [], store)
    assert f"{arguments!r} it's $HOME; `ls`" in log_of(store, "echo")


def test_a_program_that_never_checkpoints_is_noticed(folder: Path, store: DirectoryStore) -> None:
    job = tiny_job(folder, "careless", script="careless.py")
    summary = summary_of(folder, job, [], store)
    assert summary["state"] == "finished"
    assert any("committed no checkpoint" in warning for warning in summary["warnings"])


@pytest.mark.parametrize("name", ["digits.py", "gpt.py"])
def test_an_example_runs_without_holdfast_around_it(name: str, folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOLDFAST_")}
    command = [sys.executable, str(EXAMPLES / name), "--steps", "40"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "after 40 steps" in done.stdout
    assert list(folder.iterdir()) == []


def test_the_digits_are_read_well_on_spot_machines(folder: Path, store: DirectoryStore) -> None:
    job = load_job(EXAMPLES / "digits.yaml")
    summary = summary_of(folder, job, [Fate(at_step=700, notice=True)], store)
    assert outcomes(summary) == [("spot", "preempted"), ("spot", "finished")]
    log = log_of(store, "digits")
    accuracy = float(log.split("test accuracy ")[1].split()[0])
    assert accuracy > 0.96, log
