"""The background thread: the newest snapshot is what becomes durable, and a failing store harms nothing that is."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.committer import Committer, Snapshot
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.checkpoint.reader import STATE, list_checkpoints, read_metrics
from holdfast.checkpoint.reporting import Reporter, Surroundings
from holdfast.checkpoint.tensors import decode
from holdfast.clock import WallClock
from holdfast.runtime.contract import lease_key, metrics_prefix
from holdfast.storage import DirectoryStore, ObjectStore
from tests.unit.failing_store import FailingStore, unreachable

LONG = 20.0


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


class Telemetry:
    """What the committer tells, read back."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "telemetry.jsonl"
        around = Surroundings(
            store_url="",
            run_id="run",
            attempt=1,
            policy=CheckpointPolicy(),
            telemetry=self.path,
            notice=None,
            console=None,
        )
        self.reporter = Reporter(around)

    def events(self, kind: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [record for record in records if record["kind"] == kind]

    def told(self, kind: str) -> list[dict[str, Any]]:
        """As `events`, but waits for the first: it is told just after the commit."""
        give_up_at = time.monotonic() + LONG
        while not (found := self.events(kind)):
            assert time.monotonic() < give_up_at, f"no {kind} was told"
            time.sleep(0.005)
        return found


@pytest.fixture
def telemetry(tmp_path: Path) -> Telemetry:
    return Telemetry(tmp_path)


def committer(store: ObjectStore, telemetry: Telemetry, attempt: int = 1, keep: int = 3, parent=None) -> Committer:
    return Committer(store, "run", attempt, keep, telemetry.reporter, WallClock(), parent)


def snapshot(step: int, folder: Path | None = None) -> Snapshot:
    return Snapshot(
        step=step,
        tree={"user": step},
        tensors={"weights": torch.full((4,), float(step))},
        folder=folder,
        metadata={"step": step},
        seconds=0.25,
    )


class Gate:
    """Holds the call it is given to until it is opened, then lets the store fail or go on."""

    def __init__(self, fail: bool = False) -> None:
        self.reached, self.open, self.fail = threading.Event(), threading.Event(), fail

    def __call__(self, verb: str, key: str) -> None:
        self.reached.set()
        assert self.open.wait(LONG)
        if self.fail:
            unreachable(verb, key)


def committed(store: ObjectStore) -> list[CheckpointId]:
    return Checkpoints(store, "run").committed()


def test_what_was_offered_becomes_durable_to_the_bit(store: DirectoryStore, telemetry: Telemetry) -> None:
    made = committer(store, telemetry)
    made.offer(snapshot(10))
    assert made.wait(10, LONG)
    checkpoints, (checkpoint,) = Checkpoints(store, "run"), committed(store)
    state = decode(checkpoints.read(checkpoint, checkpoints.manifest(checkpoint), STATE))
    assert torch.equal(state["weights"], torch.full((4,), 10.0))
    event = telemetry.told("committed")[0]
    assert (event["step"], event["snapshot_seconds"], made.committed_step) == (10, 0.25, 10)
    assert event["bytes"] == sum(info.size_bytes for info in list_checkpoints(store, "run"))


def test_a_waiting_snapshot_is_dropped_for_a_newer_one(
    store: DirectoryStore, telemetry: Telemetry, tmp_path: Path
) -> None:
    """The first is being written; of the three that come meanwhile, only the newest is."""
    gate = Gate()
    made = committer(FailingStore(store, at=[3], fail=gate), telemetry)
    dropped = tmp_path / "copy"
    dropped.mkdir()
    made.offer(snapshot(10))
    assert gate.reached.wait(LONG)
    for later in (snapshot(20, dropped), snapshot(30), snapshot(40)):
        made.offer(later)
    gate.open.set()
    assert made.wait(40, LONG)
    assert committed(store) == [CheckpointId(1, 10), CheckpointId(1, 40)]
    assert not dropped.exists()  # its copy of the folder takes no room any more


def test_waiting_for_a_step_ends_when_the_window_does(store: DirectoryStore, telemetry: Telemetry) -> None:
    gate = Gate()
    made = committer(FailingStore(store, at=[3], fail=gate), telemetry)
    made.offer(snapshot(10))
    assert gate.reached.wait(LONG)
    assert not made.wait(10, 0.05)
    gate.open.set()
    assert made.wait(10, LONG)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_a_store_that_fails_at_any_call_is_asked_again_and_harms_no_earlier_checkpoint(
    store: DirectoryStore, telemetry: Telemetry, at: int
) -> None:
    """Six calls make a commit: two for who is fencing whom, metrics, two objects, manifest."""
    first = committer(store, telemetry)
    first.offer(snapshot(10))
    assert first.wait(10, LONG)
    gate = Gate(fail=True)
    made = committer(FailingStore(store, at=[at], fail=gate, half=True), telemetry, parent=CheckpointId(1, 10))
    made.add_metrics(20, {"loss": 0.5})
    made.offer(snapshot(20))
    assert gate.reached.wait(LONG)
    assert [info.problem for info in list_checkpoints(store, "run")] == [""]
    gate.open.set()
    assert made.wait(20, LONG)
    assert committed(store) == [CheckpointId(1, 10), CheckpointId(1, 20)]
    assert read_metrics(store, "run") == {20: {"loss": 0.5}}
    (failure,) = telemetry.events("commit-failed")
    assert failure["step"] == 20 and "the store does not answer" in failure["error"]


def test_after_a_failure_a_newer_snapshot_goes_first(store: DirectoryStore, telemetry: Telemetry) -> None:
    gate = Gate(fail=True)
    made = committer(FailingStore(store, at=[3], fail=gate), telemetry)
    made.offer(snapshot(10))
    assert gate.reached.wait(LONG)
    made.offer(snapshot(20))
    gate.open.set()
    assert made.wait(20, LONG)
    assert committed(store) == [CheckpointId(1, 20)]


def test_an_answer_lost_after_the_manifest_was_written_is_a_commit_all_the_same(
    store: DirectoryStore, telemetry: Telemetry
) -> None:
    class AnswerLost(FailingStore):
        def create(self, key: str, data: Any) -> None:
            store.create(key, data)
            super().create(key, data)

    made = committer(AnswerLost(store, at=[5], fail=unreachable), telemetry)
    made.offer(snapshot(10))
    assert made.wait(10, LONG)
    assert committed(store) == [CheckpointId(1, 10)]
    assert [event["step"] for event in telemetry.told("committed")] == [10]


def test_a_zombie_of_an_earlier_attempt_is_fenced(store: DirectoryStore, telemetry: Telemetry) -> None:
    made = committer(store, telemetry, attempt=1)
    made.offer(snapshot(10))
    assert made.wait(10, LONG)
    store.put(lease_key("run"), json.dumps({"attempt": 2}).encode())
    made.offer(snapshot(20))
    assert not made.wait(20, LONG)
    assert made.fenced
    assert committed(store) == [CheckpointId(1, 10)]


def test_only_the_newest_are_kept_and_each_names_its_parent(store: DirectoryStore, telemetry: Telemetry) -> None:
    made = committer(store, telemetry, attempt=2, keep=2, parent=CheckpointId(1, 10))
    for step in (20, 30, 40):
        made.offer(snapshot(step))
        assert made.wait(step, LONG)
    last = committer(store, telemetry, attempt=2, keep=2, parent=CheckpointId(2, 40))
    last.offer(snapshot(50))
    assert last.wait(50, LONG)
    infos = list_checkpoints(store, "run")
    assert [info.metadata["parent"] for info in infos[-2:]] == ["0002-000000000030", "0002-000000000040"]


def test_a_committed_step_has_its_metrics_and_a_later_one_s_are_not_lost(
    store: DirectoryStore, telemetry: Telemetry
) -> None:
    made = committer(store, telemetry)
    for step in range(1, 16):
        made.add_metrics(step, {"loss": 1 / step})
    made.offer(snapshot(10))
    assert made.wait(10, LONG)
    assert list(read_metrics(store, "run")) == list(range(1, 11))
    made.offer(snapshot(15))
    assert made.wait(15, LONG)
    assert read_metrics(store, "run") == {step: {"loss": 1 / step} for step in range(1, 16)}
    assert len(store.list(metrics_prefix("run"))) == 2


def test_files_of_the_user_s_folder_are_part_of_the_checkpoint(
    store: DirectoryStore, telemetry: Telemetry, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    (copy / "sub").mkdir(parents=True)
    (copy / "sub" / "vocabulary.txt").write_bytes(b"\x00words")
    made = committer(store, telemetry)
    made.offer(snapshot(10, copy))
    assert made.wait(10, LONG)
    checkpoints, checkpoint = Checkpoints(store, "run"), CheckpointId(1, 10)
    manifest = checkpoints.manifest(checkpoint)
    assert checkpoints.read(checkpoint, manifest, "files/sub/vocabulary.txt") == b"\x00words"
