"""The persist process's work: the newest snapshot is what becomes durable, and a failing store harms nothing that is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.loading import StateContent
from holdfast.checkpoint.persister import Offer, Orders, Persister, Ranks
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.checkpoint.reader import list_checkpoints, read_metrics
from holdfast.checkpoint.reporting import Reporter, Surroundings
from holdfast.checkpoint.slots import Slot
from holdfast.checkpoint.snapshot import Snapshot, Snapshots
from holdfast.checkpoint.state import TrainingState
from holdfast.errors import AlreadyExistsError
from holdfast.runtime.contract import lease_key
from holdfast.storage import DirectoryStore, ObjectStore
from tests.unit.failing_store import FailingStore, unreachable

LONG = 20.0


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


class Telemetry:
    """What the persist process tells, read back."""

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


class Saving:
    """A state of four numbers that are its step, real snapshots of it in shared memory, and a persister in a thread."""

    def __init__(
        self,
        store: ObjectStore,
        telemetry: Telemetry,
        attempt: int = 1,
        keep: int = 3,
        parent: CheckpointId | None = None,
        budget_seconds: float = 600.0,
        slots: int = 2,
        compression: str = "auto",
        ranks: Ranks = Ranks(),  # noqa: B008
    ) -> None:
        self.user: dict[str, Any] = {"weights": torch.zeros(4)}
        self.told: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self.slots: list[Slot] = []
        self.snapshots = Snapshots(
            TrainingState({}, self.user, ranks.rank, ranks.world_size), self._offer, self._renew, slots
        )
        self.persister = Persister(
            store=store,
            run_id="run",
            attempt=attempt,
            orders=Orders(ranks, keep, compression, budget_seconds, parent),
            reporter=telemetry.reporter,
            speed=1.0,
            tell=self._hear,
        )
        self.thread = threading.Thread(target=self.persister.work, daemon=True)
        self.thread.start()

    def save(self, step: int, folder: Path | None = None, metrics: dict[int, float] | None = None) -> Snapshot | None:
        self.user["weights"].fill_(float(step))
        words = {"run": "run", "metrics": [[at, {"loss": loss}] for at, loss in (metrics or {}).items()]}
        return self.snapshots.take(step, words, folder)

    def wait(self, step: int, seconds: float = LONG) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.committed_step >= step or self.persister.fenced, seconds) and (
                self.committed_step >= step
            )

    @property
    def committed_step(self) -> int:
        return max((message["step"] for message in self.told if message["kind"] == "committed"), default=-1)

    def _renew(self, slots: list[Slot]) -> None:
        # As the persist process has them: the same memory, locks of its own.
        import os

        self.theirs = [Slot(os.dup(slot.fileno()), slot.capacity_bytes) for slot in slots]
        self.slots = slots

    def _offer(self, snapshot: Snapshot) -> None:
        slot = self.theirs[self.slots.index(snapshot.slot)]
        self.persister.offer(
            Offer(snapshot.number, slot, snapshot.step, snapshot.began, snapshot.hold_seconds, snapshot.folder)
        )

    def _hear(self, message: dict[str, Any]) -> None:
        with self.changed:
            self.told.append(message)
            self.changed.notify_all()


@pytest.fixture
def saving() -> Iterator[Any]:
    made: list[Saving] = []

    def make(*arguments: Any, **options: Any) -> Saving:
        made.append(Saving(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.persister.orphan()
        one.thread.join(LONG)


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


def content(store: ObjectStore, checkpoint: CheckpointId) -> dict[str, Any]:
    checkpoints = Checkpoints(store, "run")
    return StateContent(checkpoints, checkpoint, checkpoints.manifest(checkpoint)).read({})


def test_what_was_offered_becomes_durable_to_the_bit(store: DirectoryStore, telemetry: Telemetry, saving: Any) -> None:
    made = saving(store, telemetry)
    made.save(10)
    assert made.wait(10)
    (checkpoint,) = committed(store)
    assert torch.equal(content(store, checkpoint)["user.weights"], torch.full((4,), 10.0))
    event = telemetry.told("committed")[0]
    assert event["step"] == 10 and 0 < event["snapshot_seconds"] <= event["wall_durable_seconds"]
    assert event["bytes"] == sum(info.size_bytes for info in list_checkpoints(store, "run"))


def test_a_waiting_snapshot_is_dropped_for_a_newer_one(
    store: DirectoryStore, telemetry: Telemetry, tmp_path: Path, saving: Any
) -> None:
    """The first is being written; of the three that come meanwhile, only the newest is."""
    gate = Gate()
    made = saving(FailingStore(store, at=[3], fail=gate), telemetry)
    dropped = tmp_path / "copy"
    dropped.mkdir()
    made.save(10)
    assert gate.reached.wait(LONG)
    for step, folder in ((20, dropped), (30, None), (40, None)):
        assert made.save(step, folder)
    gate.open.set()
    assert made.wait(40)
    assert committed(store) == [CheckpointId(1, 10), CheckpointId(1, 40)]
    assert torch.equal(content(store, CheckpointId(1, 10))["user.weights"], torch.full((4,), 10.0))
    assert not dropped.exists()  # its copy of the folder takes no room any more


def test_with_one_slot_a_save_waits_for_the_one_before(
    store: DirectoryStore, telemetry: Telemetry, saving: Any
) -> None:
    gate = Gate()
    made = saving(FailingStore(store, at=[3], fail=gate), telemetry, slots=1)
    made.save(10)
    assert gate.reached.wait(LONG)
    assert made.save(20) is None
    gate.open.set()
    assert made.wait(10)
    while made.save(30) is None:  # it is told of before the slot is given back
        time.sleep(0.001)
    assert made.wait(30)


def test_waiting_for_a_step_ends_when_the_window_does(store: DirectoryStore, telemetry: Telemetry, saving: Any) -> None:
    gate = Gate()
    made = saving(FailingStore(store, at=[3], fail=gate), telemetry)
    made.save(10)
    assert not made.wait(10, 0.05)
    gate.open.set()
    assert made.wait(10)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7])
def test_a_store_that_fails_at_any_call_is_asked_again_and_harms_no_earlier_checkpoint(
    store: DirectoryStore, telemetry: Telemetry, at: int, saving: Any
) -> None:
    """Seven calls make a process's first commit: two for who is fencing whom, one for whether it is committed, metrics, two
    objects, manifest.
    """
    first = saving(store, telemetry)
    first.save(10)
    assert first.wait(10)
    gate = Gate(fail=True)
    made = saving(FailingStore(store, at=[at], fail=gate, half=True), telemetry, parent=CheckpointId(1, 10))
    made.save(20, metrics={20: 0.5})
    assert gate.reached.wait(LONG)
    assert [info.problem for info in list_checkpoints(store, "run")] == [""]
    gate.open.set()
    assert made.wait(20)
    assert committed(store) == [CheckpointId(1, 10), CheckpointId(1, 20)]
    assert read_metrics(store, "run") == {20: {"loss": 0.5}}
    (failure,) = telemetry.events("commit-failed")
    assert failure["step"] == 20 and "the store does not answer" in failure["error"]


def test_after_a_failure_a_newer_snapshot_goes_first(store: DirectoryStore, telemetry: Telemetry, saving: Any) -> None:
    gate = Gate(fail=True)
    made = saving(FailingStore(store, at=[3], fail=gate), telemetry)
    made.save(10)
    assert gate.reached.wait(LONG)
    made.save(20)
    gate.open.set()
    assert made.wait(20)
    assert committed(store) == [CheckpointId(1, 20)]


def test_an_answer_lost_after_the_manifest_was_written_is_a_commit_all_the_same(
    store: DirectoryStore, telemetry: Telemetry, saving: Any
) -> None:
    class AnswerLost(FailingStore):
        def create(self, key: str, data: Any) -> None:
            store.create(key, data)
            super().create(key, data)

    made = saving(AnswerLost(store, at=[6], fail=unreachable), telemetry)
    made.save(10)
    assert made.wait(10)
    assert committed(store) == [CheckpointId(1, 10)]
    assert [event["step"] for event in telemetry.told("committed")] == [10]


def test_a_manifest_that_is_gone_again_is_no_commit(store: DirectoryStore, telemetry: Telemetry, saving: Any) -> None:
    def taken(verb: str, key: str) -> None:
        raise AlreadyExistsError(key)

    made = saving(FailingStore(store, at=[6], fail=taken), telemetry)
    made.save(10)
    assert made.wait(10)
    assert [event["error"] for event in telemetry.events("commit-failed")] == [
        "0001-000000000010 was there, and is gone"
    ]
    assert committed(store) == [CheckpointId(1, 10)]


def test_a_save_that_is_not_durable_within_its_budget_is_told(
    store: DirectoryStore, telemetry: Telemetry, saving: Any
) -> None:
    gate = Gate()
    made = saving(FailingStore(store, at=[3], fail=gate), telemetry, budget_seconds=0.05)
    made.save(10)
    (late,) = telemetry.told("commit-late")
    assert late["step"] == 10 and late["seconds"] >= late["budget_seconds"] == 0.05
    gate.open.set()
    assert made.wait(10)


def test_a_zombie_of_an_earlier_attempt_is_fenced(store: DirectoryStore, telemetry: Telemetry, saving: Any) -> None:
    made = saving(store, telemetry, attempt=1)
    made.save(10)
    assert made.wait(10)
    store.put(lease_key("run"), json.dumps({"attempt": 2}).encode())
    made.save(20)
    assert not made.wait(20)
    assert made.persister.fenced
    assert committed(store) == [CheckpointId(1, 10)]


def test_only_the_newest_are_kept_and_each_names_its_parent(
    store: DirectoryStore, telemetry: Telemetry, saving: Any
) -> None:
    made = saving(store, telemetry, attempt=2, keep=2, parent=CheckpointId(1, 10))
    for step in (20, 30, 40, 50):
        made.save(step)
        assert made.wait(step)
    made.persister.orphan()
    made.thread.join(LONG)
    infos = list_checkpoints(store, "run")
    assert [info.metadata["parent"] for info in infos] == ["0002-000000000030", "0002-000000000040"]


def test_what_was_offered_before_the_training_died_becomes_durable(
    store: DirectoryStore, telemetry: Telemetry, saving: Any
) -> None:
    gate = Gate()
    made = saving(FailingStore(store, at=[3], fail=gate), telemetry)
    made.save(10)
    assert gate.reached.wait(LONG)
    made.save(20)
    made.persister.orphan()
    gate.open.set()
    made.thread.join(LONG)
    assert committed(store) == [CheckpointId(1, 10), CheckpointId(1, 20)]


def test_a_snapshot_that_was_never_completed_is_none(store: DirectoryStore, telemetry: Telemetry, saving: Any) -> None:
    """As when the training process is killed while it copies over the one that waits."""
    gate = Gate()
    made = saving(FailingStore(store, at=[3], fail=gate), telemetry)
    made.save(10)
    assert gate.reached.wait(LONG)
    waiting = made.save(20)
    assert waiting and waiting.slot.take()
    waiting.slot.clear()
    waiting.slot.give_back()
    made.persister.orphan()
    gate.open.set()
    made.thread.join(LONG)
    assert committed(store) == [CheckpointId(1, 10)]


def test_files_of_the_user_s_folder_are_part_of_the_checkpoint(
    store: DirectoryStore, telemetry: Telemetry, tmp_path: Path, saving: Any
) -> None:
    copy = tmp_path / "copy"
    (copy / "sub").mkdir(parents=True)
    (copy / "sub" / "vocabulary.txt").write_bytes(b"\x00words")
    made = saving(store, telemetry)
    made.save(10, copy)
    assert made.wait(10)
    checkpoints, checkpoint = Checkpoints(store, "run"), CheckpointId(1, 10)
    manifest = checkpoints.manifest(checkpoint)
    assert checkpoints.read(checkpoint, manifest, "files/sub/vocabulary.txt") == b"\x00words"


def test_the_files_that_another_start_committed_stay_as_they_are(
    store: DirectoryStore, telemetry: Telemetry, tmp_path: Path, saving: Any
) -> None:
    """They have the same names whoever saves them."""
    for content in ("first", "second"):
        (tmp_path / content).mkdir()
        (tmp_path / content / "vocabulary.txt").write_text(content)
    first = saving(store, telemetry, ranks=Ranks(token="first"))
    first.save(10, tmp_path / "first")
    assert first.wait(10)
    second = saving(store, telemetry, ranks=Ranks(token="second"))
    second.save(5)
    assert second.wait(5)
    second.save(10, tmp_path / "second")
    assert second.wait(10)
    checkpoints, checkpoint = Checkpoints(store, "run"), CheckpointId(1, 10)
    assert checkpoints.read(checkpoint, checkpoints.manifest(checkpoint), "files/vocabulary.txt") == b"first"


# -- the process ------------------------------------------------------------------------------------------------------


@contextmanager
def process(store: DirectoryStore, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from holdfast.checkpoint.committer import Committer

    for name, value in (("STORE", store.url), ("RUN", "run"), ("ATTEMPT", "1"), ("TELEMETRY", str(telemetry.path))):
        monkeypatch.setenv(f"HOLDFAST_{name}", value)
    made = Committer(1, Ranks(), CheckpointPolicy(), 600.0, telemetry.reporter, telemetry.path.with_name("persist.log"))
    made.begin(None)
    yield made
    made.close()
    made._process.wait(LONG)


def test_another_persist_process_takes_over_from_one_that_was_killed(
    store: DirectoryStore, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    user: dict[str, Any] = {"weights": torch.zeros(300_000)}
    with process(store, telemetry, monkeypatch) as committer:
        snapshots = Snapshots(TrainingState({}, user), committer.offer, committer.renew)
        committer.add_metrics(9, {"loss": 0.5})
        for step in (10, 20):
            committer._process.kill()
            user["weights"].fill_(step)
            snapshots.take(step, {"metrics": committer.metrics_until(step)})
            assert committer.wait(step, LONG)
            assert torch.equal(content(store, CheckpointId(1, step))["user.weights"], user["weights"])
        assert read_metrics(store, "run") == {9: {"loss": 0.5}}
        assert committer.metrics_until(20) == []
        assert not committer.busy


def test_the_persist_process_has_no_pytorch_in_it(
    store: DirectoryStore, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process(store, telemetry, monkeypatch) as committer:
        snapshots = Snapshots(TrainingState({}, {"weights": torch.zeros(8)}), committer.offer, committer.renew)
        snapshots.take(10, {"metrics": []})
        assert committer.wait(10, LONG)
        maps = Path(f"/proc/{committer._process.pid}/maps").read_text()
        assert "holdfast-snapshot" in maps and "torch" not in maps and "numpy" not in maps
        assert int(Path(f"/proc/{committer._process.pid}/stat").read_text().split()[18]) >= 10  # its niceness


def test_the_other_kind_of_lock_keeps_processes_apart_too(
    store: DirectoryStore, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where memory without a name can't be opened anew (macOS): the lock is the process's."""
    script = (
        "import sys, time\n"
        "from holdfast.checkpoint import slots\n"
        "slot = slots.Slot(int(sys.argv[1]), int(sys.argv[2]))\n"
        "print(slot.take(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    import fcntl
    import subprocess
    import sys

    monkeypatch.setattr("holdfast.checkpoint.slots.LINUX", False)
    monkeypatch.setattr("holdfast.checkpoint.slots.lock", fcntl.lockf)
    slot = Slot.make(4096, 4096)
    other = ["from holdfast.checkpoint import slots", "import fcntl", "slots.LINUX, slots.lock = False, fcntl.lockf"]
    command = [sys.executable, "-c", "\n".join([*other, script]), str(slot.fileno()), str(slot.capacity_bytes)]
    assert slot.take()
    with subprocess.Popen(
        command, pass_fds=[slot.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as second:
        assert second.stdout and second.stdout.readline() == "False\n"
        second.communicate()
    slot.give_back()
    with subprocess.Popen(
        command, pass_fds=[slot.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as third:
        assert third.stdout and third.stdout.readline() == "True\n"
        assert not slot.take()
        third.kill()
    assert slot.take()


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_the_process_before_committed_is_not_written_again(
    store: DirectoryStore, telemetry: Telemetry, saving: Any, world_size: int
) -> None:
    """It died before the training heard of the commit, which offers it again; this one knows nothing of the link, and might
    write it in another encoding.
    """
    all_ranks = [Ranks(rank=rank, world_size=world_size, token="t") for rank in range(world_size)]
    before = [saving(store, telemetry, ranks=ranks) for ranks in all_ranks]
    snapshots = [one.save(10) for one in before]
    assert all(one.wait(10) for one in before)
    told = len(telemetry.events("committed"))
    for one, ranks, snapshot in zip(before, all_ranks, snapshots, strict=True):
        watched = FailingStore(store)
        after = saving(watched, telemetry, ranks=ranks)
        slot = one.theirs[one.slots.index(snapshot.slot)]
        after.persister.offer(Offer(snapshot.number, slot, 10, snapshot.began, snapshot.hold_seconds))
        assert after.wait(10)
        assert {verb for verb, _ in watched.calls} <= {"get", "get_range", "list"}
        assert after.told[-1]["commit_seconds"] is None  # a look at the manifest is nothing to plan with
    assert telemetry.events("committed")[told]["bytes"] == telemetry.events("committed")[0]["bytes"]


def test_a_step_that_another_start_published_meanwhile_is_not_waited_for(
    store: DirectoryStore, telemetry: Telemetry, saving: Any
) -> None:
    """The other rank found it committed, and writes no part of it."""
    first = saving(store, telemetry, ranks=Ranks(rank=0, world_size=2, token="new"))
    first.save(1)
    with first.changed:
        assert first.changed.wait_for(lambda: any(one["kind"] == "part" for one in first.told), LONG)
    before = [saving(store, telemetry, ranks=Ranks(rank=rank, world_size=2, token="old")) for rank in range(2)]
    for one in before:
        one.save(1)
    assert first.wait(1)
    assert [one["tree"] for one in Checkpoints(store, "run").manifest(CheckpointId(1, 1))["ranks"]] == [
        "rank-00000-old.json",
        "rank-00001-old.json",
    ]


def test_a_snapshot_that_another_rank_gave_up_does_not_keep_the_next_ones_waiting(
    saving: Any, telemetry: Telemetry, tmp_path: Path
) -> None:
    """Ten minutes would be spent on parts that never come."""
    store = DirectoryStore(tmp_path / "store")
    first, second = (saving(store, telemetry, ranks=Ranks(rank=rank, world_size=2, token="t")) for rank in range(2))
    first.save(1)
    with first.changed:
        assert first.changed.wait_for(lambda: any(one["kind"] == "part" for one in first.told), LONG)
    first.save(2)
    second.save(2)
    assert first.wait(2) and second.wait(2)
    assert Checkpoints(store, "run").committed() == [CheckpointId(1, 2)]
    assert [event["step"] for event in telemetry.events("commit-failed")] == [1]


def test_a_rank_that_is_slow_is_waited_for_though_a_newer_snapshot_is_there(
    saving: Any, telemetry: Telemetry, tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path / "store")
    first, second = (saving(store, telemetry, ranks=Ranks(rank=rank, world_size=2, token="t")) for rank in range(2))
    first.save(1)
    with first.changed:
        assert first.changed.wait_for(lambda: any(one["kind"] == "part" for one in first.told), LONG)
    first.save(2)
    time.sleep(0.5)  # it looks at the parts again and again
    second.save(1)
    assert second.wait(1)
    second.save(2)
    assert first.wait(2) and second.wait(2)
    assert Checkpoints(store, "run").committed() == [CheckpointId(1, 1), CheckpointId(1, 2)]
    assert telemetry.path.read_text().count("commit-failed") == 0


def test_a_rank_whose_training_died_asks_now_and_then_whether_its_part_was_published(
    saving: Any, telemetry: Telemetry, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.checkpoint.persister.ORPHAN_SECONDS", 1.0)
    watched = FailingStore(store)
    rank = saving(watched, telemetry, ranks=Ranks(rank=1, world_size=2, token="t"))
    rank.save(1)
    with rank.changed:
        assert rank.changed.wait_for(lambda: any(one["kind"] == "part" for one in rank.told), LONG)
    rank.persister.orphan()
    rank.thread.join(LONG)
    assert not rank.thread.is_alive()
    assert 2 <= [verb for verb, _ in watched.calls].count("get_range") <= 20
