"""Flow runs as a worker carries them out: refused, cancelled, crashed."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import psutil
import pytest

from tests.orchestration.conftest import Platform, wait_until

pytestmark = pytest.mark.xdist_group("platform")  # one server and one worker for all of them

GOOD = {"name": "good", "script": "digits.py", "code": "examples"}
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def run_id_of(platform: Platform, **parameters: Any) -> str:
    """A run of `train/local`, asked for as the UI does."""
    deployment = platform.ask("deployments/name/train/local")
    return platform.ask(f"deployments/{deployment['id']}/create_flow_run", parameters=parameters)["id"]


def ended(platform: Platform, flow_run: str) -> dict[str, Any]:
    run = wait_until(
        lambda: (found := platform.ask(f"flow_runs/{flow_run}"))["state_type"] in ENDED and found, what="the end"
    )
    return run["state"]


@pytest.mark.parametrize(
    "field, words",
    [
        ({"scirpt": "digits.py"}, ["'job'", "'scirpt' is not one of", "'script'"]),
        ({"max_run_hours": -1}, ["'job.max_run_hours'", "-1", "minimum of 0"]),
        ({"checkpointing": {"evry": "auto"}}, ["'job.checkpointing'", "'evry' is not one of", "'every'"]),
    ],
)
def test_a_bad_parameter_is_refused_in_the_terminal_where_it_was_typed(
    field: dict[str, Any], words: list[str], platform: Platform
) -> None:
    before = len(platform.runs("train"))
    status, output = platform.type(f"prefect deployment run 'train/local' -p job='{json.dumps(GOOD | field)}'")
    assert status == 1
    assert [word for word in words if word not in " ".join(output.split())] == [], output
    assert len(platform.runs("train")) == before


def test_what_only_the_flow_can_know_is_refused_in_its_state_before_anything_is_launched(platform: Platform) -> None:
    cases = [
        (GOOD | {"script": "digit.py"}, {}, ["script: 'digit.py' does not exist", "did you mean 'digits.py'?"]),
        (GOOD | {"checkpointing": {"every": "0 steps"}}, {}, ["checkpointing.every is '0 steps'", "above zero"]),
        (GOOD | {"resources": {"instance_types": ["g5.xlarg"]}}, {}, ["'g5.xlarg'", "did you mean 'g5.xlarge'?"]),
        (GOOD, {"account": "nobodys"}, ["account: no block is called 'nobodys'", "save one in the UI"]),
    ]
    asked = [(run_id_of(platform, job=job, **others), words) for job, others, words in cases]
    for flow_run, words in asked:
        state = ended(platform, flow_run)
        assert state["type"] == "FAILED"
        assert [word for word in words if word not in state["message"]] == [], state["message"]
        assert not (platform.folder / f".holdfast/runs/good-{flow_run[:8]}").exists()


def test_a_cancelled_flow_run_ends_its_machine_settles_and_publishes(platform: Platform) -> None:
    flow_run = run_id_of(platform, job=GOOD | {"name": "long", "args": ["--steps", "100000"]}, run_id="long")
    wait_until(lambda: platform.processes(), what="a machine")
    status, output = platform.type(f"prefect flow-run cancel {flow_run}")
    assert status == 0, output
    assert ended(platform, flow_run)["type"] == "CANCELLED"
    wait_until(lambda: not platform.processes(), 60, "no machine")
    wait_until(lambda: (platform.folder / ".holdfast/runs/long/summary.json").exists())
    assert platform.summary("long")["state"] == "cancelled"
    artifacts = {artifact["key"] for artifact in platform.ask("artifacts/filter", sort="KEY_ASC")}
    assert "cost-summary-long" in artifacts


def test_a_crashed_flow_run_is_taken_up_again_by_the_next_with_its_run_id(platform: Platform) -> None:
    job = GOOD | {"name": "crash", "args": ["--steps", "1500"]}
    flow_run = run_id_of(platform, job=job, run_id="crash")
    wait_until(lambda: platform.processes(), what="a machine")
    os.kill(process_of(flow_run), signal.SIGKILL)
    assert ended(platform, flow_run)["type"] == "CRASHED"
    assert ended(platform, run_id_of(platform, job=job, run_id="crash"))["type"] == "COMPLETED"
    summary = platform.summary("crash")
    assert summary["state"] == "finished"
    assert summary["orchestrator_recoveries"] == 1
    assert sum(bool(attempt["machine"]) for attempt in summary["attempts"]) == 1 + summary["interruptions"]


def process_of(flow_run: str) -> int:
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run
                and "holdfast.drivers" not in process.cmdline()
            ):
                return process.pid
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    raise AssertionError(f"no process carries out flow run {flow_run}")
