"""What the UI shows of a run: a row for every attempt, an event for everything that happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.context import get_run_context

from flows.train import carry_out
from holdfast.drivers.local.config import Fate
from holdfast.model import Fallback
from holdfast.storage import DirectoryStore
from holdfast.supervision.opening import open_run
from tests.chaos.runs import cloud, light_job


def test_every_attempt_has_a_row_under_its_outcome(folder: Path, store: DirectoryStore) -> None:
    fates = [Fate(at_step=30, notice=True), Fate(refuse=True), Fate(after_seconds=0, notice=False), Fate(refuse=True)]
    run = open_run(light_job(folder, fallback=Fallback()), cloud(folder, fates), store, None, "light")
    flow_runs: list[Any] = []

    @flow(name="test-rows")
    def story() -> None:
        flow_runs.append(get_run_context().flow_run.id)  # type: ignore[union-attr]
        carry_out(run)

    story()
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=flow_runs))
        tasks = client.read_task_runs(flow_run_filter=wanted)
    rows = {task.name.partition(":")[0]: (task.name.split()[-1], task.state_name) for task in tasks if ":" in task.name}
    assert rows == {
        "attempt 1": ("spot", "Preempted"),
        "attempt 2": ("spot", "No-capacity"),
        "attempt 3": ("spot", "Preempted"),
        "attempt 4": ("spot", "No-capacity"),
        "attempt 5": ("on-demand", "Completed"),
    }
    assert [task.name for task in tasks if task.state_name == "RolledBack"] == []
