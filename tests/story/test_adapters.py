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
from holdfast.model import Checkpointing, Fallback, TrainingJob, load_job
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


def adapter_job(library: str, *args: str) -> TrainingJob:
    """The example's own job, shorter, and saved more often."""
    changes = {
        "args": list(args),
        "checkpointing": Checkpointing(every="10 steps"),
        "fallback": Fallback(after_failed_spot_attempts=100),
        "notice_poll_seconds": 0.05,
    }
    return load_job(EXAMPLES / "adapters" / library / "job.yaml").model_copy(update=changes)


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
        ("lightning", ["--epochs", "12", "--batch", "33"], 276, 5),
        ("accelerate", ["--epochs", "20"], 480, 2),
    ],
)
def test_a_library_s_loop_that_is_preempted_ends_with_the_same_weights(
    library: str, args: list[str], steps: int, kills: int, folder: Path, store: DirectoryStore
) -> None:
    # In the first half, with little notice: steps are short, and a machine must not be done before it is taken.
    kill_at = [steps * number // (2 * kills + 2) for number in range(1, kills + 1)]
    fates = [Fate(at_step=step, notice=number % 2 == 0, notice_seconds=0.5) for number, step in enumerate(kill_at)]
    summary = assert_same_weights_as_by_hand(adapter_job(library, *args), fates, folder, store)
    assert summary["steps_total"] == steps


@pytest.mark.parametrize("library", ["jax", *(["tensorflow"] if find_spec("tensorflow") else [])])
def test_a_program_that_writes_folders_ends_with_the_same_weights(
    library: str, folder: Path, store: DirectoryStore
) -> None:
    job = adapter_job(library, "--steps", "4000", "--every", "100")
    fates = [Fate(at_step=500, notice=False), Fate(at_step=1500, notice=True)]
    summary = assert_same_weights_as_by_hand(job, fates, folder, store)
    assert summary["steps_total"] == 4000
