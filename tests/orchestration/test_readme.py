"""The README's chapter "Through Prefect" works when it is typed, in its order."""

from __future__ import annotations

from typing import Any

import pytest

from tests.orchestration.conftest import Platform, wait_until

pytestmark = pytest.mark.xdist_group("platform")  # one server and one worker for all of them


def test_what_the_readme_says_to_type_works_in_its_order(platform: Platform) -> None:
    _server, _worker, runs, schedule = platform.blocks
    status, output = platform.type(runs)
    assert status == 0, output
    assert output.count("Flow run finished successfully") == 5, output

    assert platform.summary("mine")["state"] == "finished"
    assert platform.summary("mine")["steps_total"] == 200
    assert [run["state_type"] for run in platform.runs("rehearse")] == ["COMPLETED"]
    its_subflow_trained(platform)
    its_event_trained(platform)
    every_attempt_has_its_row(platform, "mine")
    the_summary_is_published(platform, "mine")
    assert platform.ask("automations/filter", sort="NAME_ASC")[0]["name"] == "holdfast-crashed-runs"

    status, output = platform.type(schedule)
    assert status == 0, output
    assert "30 1 * * *" in output
    assert "0:10:00" in output or "600" in output, output


def its_subflow_trained(platform: Platform) -> None:
    [upstream] = platform.runs("prepare-then-train")
    tasks = platform.ask("task_runs/filter", flow_runs={"id": {"any_": [upstream["id"]]}})
    children = [run for run in platform.runs("train") if run["parent_task_run_id"] in {task["id"] for task in tasks}]
    assert [run["state_type"] for run in children] == ["COMPLETED"]


def its_event_trained(platform: Platform) -> None:
    def triggered() -> list[dict[str, Any]]:
        runs = [run for run in platform.runs("train") if str(run["parameters"].get("run_id")).startswith("digits-")]
        return [run for run in runs if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED")]

    [run] = wait_until(triggered, what="the run that the event triggers")
    assert run["state_type"] == "COMPLETED"
    assert platform.summary(run["parameters"]["run_id"])["state"] == "finished"


def every_attempt_has_its_row(platform: Platform, run_id: str) -> None:
    [run] = [run for run in platform.runs("train") if run["parameters"].get("run_id") == run_id]
    tasks = platform.ask("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
    rows = {task["name"]: task["state_name"] for task in tasks if task["name"].startswith("attempt ")}
    for attempt in platform.summary(run_id)["attempts"]:
        where = f"local {attempt['zone']} {attempt['instance_type']} {attempt['provisioning_model']}"
        outcome = "Completed" if attempt["outcome"] == "finished" else attempt["outcome"].capitalize()
        assert rows.pop(f"attempt {attempt['number']}: {where}") == outcome
    assert rows == {}


def the_summary_is_published(platform: Platform, run_id: str) -> None:
    artifacts = {artifact["key"]: artifact for artifact in platform.ask("artifacts/filter", sort="KEY_ASC")}
    usd = f"{platform.summary(run_id)['usd_total']:.4f}"
    assert usd in artifacts[f"cost-summary-{run_id}"]["data"]
    assert f"| **{usd}** |" in artifacts[f"cost-summary-{run_id}"]["data"]
    assert usd.rstrip("0") in artifacts[f"attempts-{run_id}"]["data"]
    assert artifacts[f"timeline-{run_id}"]["data"].startswith("data:image/png;base64,")
    assert artifacts[f"timeline-{run_id}"]["type"] == "image"


def test_a_schedule_starts_runs(platform: Platform) -> None:
    status, output = platform.type("prefect deployment schedule create 'reap-orphans/local' --interval 20")
    assert status == 0, output

    def scheduled() -> list[dict[str, Any]]:
        return [
            run for run in platform.runs("reap-orphans") if run["auto_scheduled"] and run["state_type"] == "COMPLETED"
        ]

    assert wait_until(scheduled, what="a scheduled run")
