"""A rehearsal answers whether a job survives preemption, before a cent is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.__main__ import main
from holdfast.model import TrainingJob, load_job
from tests.chaos.runs import light_job
from tests.conftest import PROGRAMS

EXAMPLES = Path(__file__).parents[2] / "examples"


def rehearse(folder: Path, job: TrainingJob, preemptions: int) -> tuple[int, dict[str, Any]]:
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    status = main(["rehearse", "job.yaml", "--preemptions", str(preemptions)])
    [verdict] = folder.glob(".holdfast/rehearsals/*/verdict.json")
    return status, json.loads(verdict.read_text())


def answers(verdict: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    return {finding["question"]: (finding["good"], finding["answer"]) for finding in verdict["findings"]}


def test_a_good_job_passes_and_the_verdict_comes_first(
    folder: Path, prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, verdict = rehearse(folder, light_job(folder, "good"), preemptions=3)
    assert (status, verdict["passed"]) == (0, True), verdict["markdown"]
    assert verdict["markdown"].startswith("# PASS: good survives preemption")
    assert verdict["markdown"] in capsys.readouterr().out
    found = answers(verdict)
    assert found["Was it preempted as asked?"] == (True, "3 of 3 preemptions happened")
    assert found["Are the losses the same, bit for bit?"] == (True, "100 steps compared")
    assert found["Is the final state the same, bit for bit?"][0]
    assert found["Is nothing lost when there is a notice?"][0]
    assert found["Does the flush fit GCP's 30 s?"][0] and found["Does the flush fit AWS's 120 s?"][0]
    assert "ms of training each" in found["What does a checkpoint cost?"][1]
    outcomes = [(attempt["outcome"], attempt["notice"]) for attempt in verdict["interrupted"]["attempts"]]
    assert outcomes == [("preempted", "preemption"), ("preempted", None), ("preempted", None), ("finished", None)]


def test_a_program_that_writes_folders_is_judged_too(folder: Path, prefect_api: str) -> None:
    status, verdict = rehearse(folder, load_job(EXAMPLES / "counting.yaml"), preemptions=3)
    assert (status, verdict["passed"]) == (0, True), verdict["markdown"]
    found = answers(verdict)
    assert found["Was it preempted as asked?"] == (True, "3 of 3 preemptions happened")
    assert found["Is the final state the same, bit for bit?"][0]
    assert "with notice 0 (in 1)" in found["Is nothing lost when there is a notice?"][1]
    assert found["Does the flush fit GCP's 30 s?"][0]
    outcomes = [(attempt["outcome"], attempt["notice"]) for attempt in verdict["interrupted"]["attempts"]]
    assert outcomes == [("preempted", "preemption"), ("preempted", None), ("preempted", None), ("finished", None)]
    assert all(attempt["last_step"] for attempt in verdict["interrupted"]["attempts"])


def test_a_job_that_forgets_part_of_its_state_fails_at_the_step_where_it_differs(
    folder: Path, prefect_api: str
) -> None:
    job = TrainingJob(
        name="forgetful", script="forgetful.py", args=["60"], code=str(PROGRAMS), checkpointing={"every": "10 steps"}
    )
    status, verdict = rehearse(folder, job, preemptions=1)
    assert (status, verdict["passed"]) == (1, False)
    good, answer = answers(verdict)["Are the losses the same, bit for bit?"]
    resumed = verdict["interrupted"]["attempts"][1]["first_step"]
    assert not good
    assert f"loss differs first at step {resumed}" in answer


def test_a_job_that_never_checkpoints_fails(folder: Path, prefect_api: str) -> None:
    job = TrainingJob(name="careless", script="careless.py", code=str(PROGRAMS))
    status, verdict = rehearse(folder, job, preemptions=1)
    assert status == 1
    assert verdict["markdown"].startswith("# FAIL: careless does not survive preemption")
    good, answer = answers(verdict)["Is nothing lost when there is a notice?"]
    assert not good and answer.startswith("unknown: the program tells no steps")


def test_a_job_that_fails_by_itself_fails_with_its_own_words(folder: Path, prefect_api: str) -> None:
    job = light_job(folder, "failing")
    status, verdict = rehearse(folder, job.model_copy(update={"env": {**job.env, "FAIL_AT": "5"}}), preemptions=1)
    assert status == 1
    assert "line 79 before the end" in verdict["findings"][0]["answer"]


def test_no_preemption_is_no_rehearsal(folder: Path, prefect_api: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "job.yaml").write_text(yaml.safe_dump(light_job(folder).model_dump(mode="json")))
    assert main(["rehearse", "job.yaml", "--preemptions", "0"]) == 2
    assert "preemptions is 0" in capsys.readouterr().err
