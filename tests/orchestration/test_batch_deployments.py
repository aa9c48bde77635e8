"""Batch inference as a worker carries it out, asked for in a terminal."""

from __future__ import annotations

import json

import pytest

from holdfast.model import BatchJob
from tests.orchestration.conftest import Platform

pytestmark = pytest.mark.xdist_group("platform")  # one server and one worker for all of them

LINES = {
    "name": "lines",
    "inputs": ["docs/*.md"],
    "input_format": "text",
    "function": "mapping:length",
    "code": "tests/programs/batch",
    "machines": 2,
    "max_run_hours": 1,
}


def test_the_deployments_bring_jobs_that_are_valid(platform: Platform) -> None:
    for name in ("local", "aws", "gcp"):
        deployment = platform.ask(f"deployments/name/batch-inference/{name}")
        assert BatchJob.model_validate(deployment["parameters"]["job"]).function == "embed:embed"


def test_a_deployment_run_works_through_the_pages_of_this_checkout(platform: Platform) -> None:
    asked = f"prefect deployment run 'batch-inference/local' -p job='{json.dumps(LINES)}' -p run_id=lines --watch"
    status, output = platform.type(asked)
    assert status == 0, output
    summary = platform.summary("lines")
    pages = sorted((platform.folder / "docs").glob("*.md"))
    assert summary["records_in"] == summary["records_out"] == sum(len(page.read_text().splitlines()) for page in pages)
    assert (summary["missing"], summary["duplicates"]) == (0, 0)
    run = platform.run_of(output)
    tasks = platform.ask("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
    rows = {task["name"].rpartition("-")[0] for task in tasks}
    assert {"plan_batches", "enqueue_batches", "audit_results"} <= rows
    artifacts = {artifact["key"]: artifact for artifact in platform.ask("artifacts/filter", sort="KEY_ASC")}
    assert "0 missing, 0 duplicates" in artifacts["cost-summary-lines"]["data"]
