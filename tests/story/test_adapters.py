"""Loops of other libraries that are preempted end with the weights of the same program run by hand, to the bit.

TensorFlow is 1.3 GB and not among what tests install: its example is run where it is found.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers.local.config import Fate
from holdfast.model import Checkpointing, Fallback, TrainingJob
from holdfast.storage import DirectoryStore
from tests.chaos.runs import outcomes, summary_of
from tests.story.test_programs import EXAMPLES, log_of


def by_hand(folder: Path, job: TrainingJob) -> subprocess.Popen[str]:
    """The job's program without Holdfast around it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HOLDFAST_")}
    (folder / "by-hand").mkdir()
    command = [sys.executable, str(Path(job.code) / str(job.script)), *job.args]
    return subprocess.Popen(command, cwd=folder / "by-hand", env=environment, stdout=subprocess.PIPE, text=True)


def weights(output: str) -> str:
    [digest] = [line.split()[1] for line in output.splitlines() if line.startswith("weights ")]
    return digest


def adapter_job(library: str, *args: str, every: str = "4 steps") -> TrainingJob:
    return TrainingJob(
        name=library,
        script="train.py",
        args=list(args),
        code=str(EXAMPLES / "adapters" / library),
        checkpointing=Checkpointing(every=every),
        fallback=Fallback(after_failed_spot_attempts=100),
        notice_poll_seconds=0.05,
        max_run_hours=1,
    )


def assert_same_weights_as_by_hand(job: TrainingJob, kills: list[Fate], folder: Path, store: DirectoryStore) -> Any:
    """The summary of the job's run, in which every machine but the last was taken."""
    alone = by_hand(folder, job)
    summary = summary_of(folder, job, kills, store)
    output, _ = alone.communicate(timeout=120)
    assert outcomes(summary) == [("spot", "preempted")] * len(kills) + [("spot", "finished")]
    assert weights(log_of(store, job.name)) == weights(output)
    return summary


@pytest.mark.parametrize(
    ("library", "args", "steps", "kills"),
    [
        # 23 optimizer steps in each epoch: the last one has one batch instead of two.
        ("trainer", ["--epochs", "2", "--windows", "400"], 46, 5),
        ("lightning", ["--epochs", "3", "--batch", "33"], 69, 5),
        ("accelerate", ["--epochs", "3"], 72, 2),
    ],
)
def test_a_library_s_loop_that_is_preempted_ends_with_the_same_weights(
    library: str, args: list[str], steps: int, kills: int, folder: Path, store: DirectoryStore
) -> None:
    fates = [Fate(at_step=steps * number // (kills + 1), notice=number % 2 == 1) for number in range(1, kills + 1)]
    summary = assert_same_weights_as_by_hand(adapter_job(library, *args), fates, folder, store)
    assert summary["steps_total"] == steps
    assert all((lost := attempt["lost_steps"]) == 0 for attempt in summary["attempts"][::2]), lost
    assert all(0 < attempt["lost_steps"] <= 2 * 4 for attempt in summary["attempts"][1:kills:2])


@pytest.mark.parametrize("library", ["jax", *(["tensorflow"] if find_spec("tensorflow") else [])])
def test_a_program_that_writes_folders_ends_with_the_same_weights(
    library: str, folder: Path, store: DirectoryStore
) -> None:
    job = adapter_job(library, "--steps", "4000", "--every", "100")
    fates = [Fate(at_step=500, notice=False), Fate(at_step=1500, notice=True)]
    summary = assert_same_weights_as_by_hand(job, fates, folder, store)
    assert summary["steps_total"] == 4000
    assert summary["attempts"][1]["lost_steps"] == 0
