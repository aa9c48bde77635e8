"""What a gang's orchestrator writes, in which order, and what its successor mends."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from holdfast.checkpoint.commits import Checkpoints
from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.model import GangJob
from holdfast.placement.gang_policy import Dissolve, Form, Ready
from holdfast.runtime.contract import formation_key, lease_key, over_key
from holdfast.storage import DirectoryStore
from holdfast.supervision.gang_run import GangRun

READY = {name: Ready(member=name, address="10.0.0.1", port=40000, at=datetime(2026, 1, 1, tzinfo=UTC)) for name in "ab"}


def opened(folder: Path) -> GangRun:
    job = GangJob(name="together", script="ddp.py", machines=2)
    driver = LocalDriver(LocalCloudConfig(root=folder / "cloud"))
    return GangRun(job, driver, DirectoryStore(folder / "store"), None, "together")


def leased(run: GangRun) -> int:
    return json.loads(run.store.get(lease_key("together")))["attempt"]


def test_a_later_formation_fences_the_commits_of_an_earlier_one(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        checkpoints = Checkpoints(run.store, "together")
        run.form(Form(members=("a", "b"), host="a"), READY, {})
        assert leased(run) == 1 and not checkpoints.superseded(1)
        run.dissolve(Dissolve(gracious=False, why="b gone"), {})
        assert leased(run) == 1 and json.loads(run.store.get(over_key("together", 1)))["why"] == "b gone"
        run.form(Form(members=("a",), host="a"), READY, {"step": 7})
        assert leased(run) == 2 and checkpoints.superseded(1) and not checkpoints.superseded(2)
        assert [one.report for one in run.state.formations] == [{"step": 7}, {}]


def test_a_formation_that_is_in_the_journal_alone_is_told_by_the_successor(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        told = run.form(Form(members=("a", "b"), host="a"), READY, {})
        content = run.store.get(formation_key("together", 1))
        run.store.delete(formation_key("together", 1))  # as if it had died before it could say so
    with opened(tmp_path) as successor:
        successor.tell_newest()
        assert successor.store.get(formation_key("together", 1)) == content
        assert successor.state.newest == told and leased(successor) == 1


def test_a_program_that_fails_is_counted_once_per_formation(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.form(Form(members=("a", "b"), host="a"), READY, {})
        run.record_failure(READY["a"])
        run.record_failure(READY["b"])
        assert len(run.program_failures) == 1
