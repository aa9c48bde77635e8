"""A snapshot that is written while it is being copied: it becomes durable when it is whole, and else leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.checkpoint.commits import PIECE_BYTES, STATE, CheckpointId, Checkpoints
from holdfast.checkpoint.persister import Offer, Orders, Persister, Ranks
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.checkpoint.reporting import Reporter, Surroundings
from holdfast.checkpoint.slots import Slot
from holdfast.storage import DirectoryStore, ObjectStore, open_store
from tests.emulated.object_stores import ACCESS_KEY, SECRET_KEY, S3Emulator
from tests.unit.failing_store import FailingStore, unreachable

IMAGE_BYTES = 2 * PIECE_BYTES + 5000
LONG = 20.0


class Trainer:
    """Fills two slots by hand, as the training process does, beside a persister that reads along."""

    def __init__(self, store: ObjectStore, telemetry: Path) -> None:
        self.told: list[dict[str, Any]] = []
        self.telemetry = telemetry
        around = Surroundings(
            store_url="",
            run_id="run",
            attempt=1,
            policy=CheckpointPolicy(),
            telemetry=telemetry,
            notice=None,
            console=None,
        )
        self.slots = [Slot.make(IMAGE_BYTES, 4096) for _ in range(2)]
        self.theirs = [Slot(os.dup(slot.fileno()), slot.capacity_bytes) for slot in self.slots]
        self.persister = Persister(
            store=store,
            run_id="run",
            attempt=1,
            orders=Orders(Ranks(), 3, "off", 600.0),
            reporter=Reporter(around),
            speed=1.0,
            tell=self.told.append,
            reads_along=True,
        )
        self.thread = threading.Thread(target=self.persister.work, daemon=True)
        self.thread.start()

    def begin(self, number: int, place: int = 0) -> bytes:
        """The header of a snapshot is there, and it is announced. What its image is going to be."""
        slot = self.slots[place]
        assert slot.take()
        slot.begin(IMAGE_BYTES, json.dumps({"step": number, "tree": {}}).encode())
        self.persister.offer(self._offer(number, place, is_copied=False))
        return bytes([number]) * IMAGE_BYTES

    def copy(self, content: bytes, start: int, stop: int, place: int = 0) -> None:
        self.slots[place].image(IMAGE_BYTES)[start:stop] = content[start:stop]
        self.slots[place].copied_bytes = stop

    def save(self, number: int, place: int = 0, once_written: Callable[[], object] = lambda: None) -> bytes:
        """All of it; `once_written` is called before it is complete."""
        content = self.begin(number, place)
        self.copy(content, 0, IMAGE_BYTES, place)
        once_written()
        self.complete(number, place)
        self.offer(number, place)
        return content

    def complete(self, number: int, place: int = 0) -> None:
        self.slots[place].complete(number)
        self.slots[place].give_back()

    def offer(self, number: int, place: int = 0) -> None:
        self.persister.offer(self._offer(number, place, is_copied=True))

    def end(self) -> None:
        self.persister.orphan()
        self.thread.join(LONG)
        assert not self.thread.is_alive()
        for slot in [*self.slots, *self.theirs]:
            slot.close()

    def kinds(self) -> list[tuple[str, int]]:
        return [(message["kind"], message["number"]) for message in self.told]

    def events(self, kind: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in self.telemetry.read_text().splitlines()]
        return [record for record in records if record["kind"] == kind]

    def _offer(self, number: int, place: int, is_copied: bool) -> Offer:
        hold_seconds = 0.25 if is_copied else 0.0
        return Offer(
            number,
            self.theirs[place],
            step=number,
            began=time.monotonic(),
            hold_seconds=hold_seconds,
            is_copied=is_copied,
        )


def until(what: Callable[[], bool], why: str) -> None:
    give_up_at = time.monotonic() + LONG
    while not what():
        assert time.monotonic() < give_up_at, why
        time.sleep(0.002)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[Callable[[ObjectStore], Trainer]]:
    made: list[Trainer] = []

    def make(store: ObjectStore) -> Trainer:
        made.append(Trainer(store, tmp_path / "telemetry"))
        return made[-1]

    yield make
    for one in made:
        for slot in one.slots:
            slot.give_back()
        one.end()


def staged_bytes(store: DirectoryStore) -> int:
    """How much of an object is written that nobody can see yet."""
    sizes = []
    for path in store.root.rglob("*.staged"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sum(sizes)


def image_of(store: ObjectStore, step: int) -> bytes:
    checkpoints, checkpoint = Checkpoints(store, "run"), CheckpointId(1, step)
    return checkpoints.read(checkpoint, checkpoints.manifest(checkpoint), STATE)


def test_it_is_on_its_way_before_it_is_whole_and_durable_when_it_is(store: DirectoryStore, trainers: Any) -> None:
    trainer = trainers(store)
    content = trainer.begin(1)
    trainer.copy(content, 0, PIECE_BYTES + 1000)
    until(lambda: staged_bytes(store) == PIECE_BYTES, "the first piece was not written")
    time.sleep(0.05)
    assert staged_bytes(store) == PIECE_BYTES, "a piece was written that is not copied"
    assert trainer.told == []
    trainer.copy(content, PIECE_BYTES + 1000, IMAGE_BYTES)
    time.sleep(0.05)
    assert Checkpoints(store, "run").committed() == [], "it was committed while its slot was still being filled"
    trainer.complete(1)
    trainer.offer(1)
    until(lambda: ("committed", 1) in trainer.kinds(), "it was not committed")
    assert trainer.kinds() == [("begun", 1), ("committed", 1)]
    assert image_of(store, 1) == content
    assert trainer.events("committed")[0]["wall_stall_seconds"] == 0.25
    assert trainer.slots[0].take()


def test_one_that_comes_to_nothing_leaves_nothing_and_is_no_failure_of_the_store(
    store: DirectoryStore, trainers: Any
) -> None:
    trainer = trainers(store)
    content = trainer.begin(1)
    trainer.copy(content, 0, IMAGE_BYTES)
    until(lambda: staged_bytes(store) > 0, "nothing was written")
    trainer.slots[0].give_back()  # as after a torn copy, and as the kernel does when the training is killed
    until(lambda: staged_bytes(store) == 0, "what was written of it was left")
    content = trainer.save(2, place=1)
    until(lambda: ("committed", 2) in trainer.kinds(), "the next was not committed")
    assert Checkpoints(store, "run").committed() == [CheckpointId(1, 2)]
    assert image_of(store, 2) == content
    assert trainer.events("commit-failed") == []
    assert all("0001-000000000002" in info.key for info in store.list(""))


def test_an_upload_that_comes_to_nothing_leaves_no_part_in_the_bucket(trainers: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    with S3Emulator("announced") as s3:
        store = open_store(s3.url("announced"))
        trainer = trainers(store)
        content = trainer.begin(1)
        trainer.copy(content, 0, 2 * PIECE_BYTES)
        until(lambda: s3.unfinished_uploads("announced") == 1, "no upload was begun")
        trainer.slots[0].give_back()
        until(lambda: s3.unfinished_uploads("announced") == 0, "its parts were left")
        content = trainer.save(2, place=1)
        until(lambda: ("committed", 2) in trainer.kinds(), "the next was not committed")
        assert image_of(store, 2) == content
        assert Checkpoints(store, "run").committed() == [CheckpointId(1, 2)]


def test_a_slot_that_is_filled_anew_before_it_could_be_locked_is_given_up(store: DirectoryStore, trainers: Any) -> None:
    trainer = trainers(store)
    content = trainer.begin(1)
    trainer.copy(content, 0, PIECE_BYTES)
    until(lambda: staged_bytes(store) > 0, "nothing was written")
    slot = trainer.slots[0]
    slot.complete(1)  # and at once, with the lock in its hands, the training goes on to the next
    slot.begin(IMAGE_BYTES, json.dumps({"step": 2, "tree": {}}).encode())
    trainer.persister.offer(trainer._offer(2, 0, is_copied=False))
    content = bytes([2]) * IMAGE_BYTES
    trainer.copy(content, 0, IMAGE_BYTES)
    trainer.complete(2)
    trainer.offer(2)
    until(lambda: ("committed", 2) in trainer.kinds(), "the next was not committed")
    assert Checkpoints(store, "run").committed() == [CheckpointId(1, 2)]
    assert image_of(store, 2) == content


def test_what_the_training_completed_before_it_died_is_committed_though_nobody_offered_it(
    store: DirectoryStore, trainers: Any
) -> None:
    trainer = trainers(store)
    content = trainer.begin(1)
    trainer.copy(content, 0, IMAGE_BYTES)
    until(lambda: staged_bytes(store) > 0, "nothing was written")
    trainer.complete(1)
    trainer.persister.orphan()
    trainer.thread.join(LONG)
    assert image_of(store, 1) == content


def test_one_that_is_announced_takes_no_whole_one_s_place(store: DirectoryStore, trainers: Any) -> None:
    trainer = trainers(store)
    trainer.begin(1)  # holds the persister up
    until(lambda: trainer.persister._waiting is None, "it was not taken up")
    second = trainer.save(2, place=1)
    trainer.persister.offer(trainer._offer(3, 1, is_copied=False))
    trainer.slots[0].give_back()
    until(lambda: ("committed", 2) in trainer.kinds(), "the one that waited was lost")
    assert image_of(store, 2) == second


class SlowStore(FailingStore):
    """Takes one piece of a large object, and asks for the next when it may."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store)
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def put(self, key: str, data: Any) -> None:
        def pieces() -> Iterator[Any]:
            for piece in data:
                yield piece
                self.has_begun.set()
                assert self.may_go_on.wait(LONG)

        super().put(key, pieces() if key.endswith(STATE) else data)


@pytest.fixture
def slow(store: DirectoryStore) -> Iterator[SlowStore]:
    made = SlowStore(store)
    yield made
    made.may_go_on.set()


def test_its_slot_is_kept_from_the_training_while_the_store_is_slow(slow: SlowStore, trainers: Any) -> None:
    trainer = trainers(slow)
    content = trainer.save(1, once_written=lambda: slow.has_begun.wait(LONG))
    assert slow.has_begun.is_set() and trainer.kinds() == [("begun", 1)]
    assert not trainer.slots[0].take()
    slow.may_go_on.set()
    until(lambda: ("committed", 1) in trainer.kinds(), "it was not committed")
    assert image_of(slow, 1) == content


def test_slots_that_are_renewed_meanwhile_are_kept_until_what_is_in_them_is_durable(
    slow: SlowStore, trainers: Any
) -> None:
    trainer = trainers(slow)
    content = trainer.save(1, once_written=lambda: slow.has_begun.wait(LONG))
    trainer.persister.retire(trainer.theirs)
    assert [slot.closed for slot in trainer.theirs] == [False, True]
    slow.may_go_on.set()
    until(lambda: ("committed", 1) in trainer.kinds(), "it was not committed")
    assert image_of(slow, 1) == content
    until(lambda: trainer.theirs[0].closed, "its slot was not closed")
    assert trainer.thread.is_alive()


def test_one_that_is_tried_again_gives_way_to_none_that_is_only_announced(store: DirectoryStore, trainers: Any) -> None:
    trainer = trainers(FailingStore(store, at=[4], fail=unreachable))
    content = trainer.save(1)
    trainer.begin(2, place=1)
    until(lambda: ("failed", 1) in trainer.kinds(), "it did not fail")
    trainer.slots[1].give_back()  # the training dies in the copy
    trainer.persister.orphan()
    trainer.thread.join(LONG)
    assert image_of(store, 1) == content


def test_after_a_failure_of_the_store_it_is_written_again_from_its_slot(store: DirectoryStore, trainers: Any) -> None:
    failing = FailingStore(store, at=[4], fail=unreachable, half=True)  # those before ask for what is there
    trainer = trainers(failing)
    content = trainer.begin(1)
    trainer.copy(content, 0, IMAGE_BYTES)
    until(lambda: ("failed", 1) in trainer.kinds(), "it did not fail")
    assert failing.calls[3][1].endswith(STATE)
    trainer.complete(1)
    trainer.offer(1)
    until(lambda: ("committed", 1) in trainer.kinds(), "it was not committed")
    assert image_of(store, 1) == content


def test_what_is_committed_is_not_written_again_because_older_ones_could_not_be_removed(
    store: DirectoryStore, trainers: Any
) -> None:
    failing = FailingStore(store, at=[7], fail=unreachable)
    trainer = trainers(failing)
    content = trainer.save(1)
    until(lambda: len(failing.calls) >= 7, "nothing was asked for after the manifest")
    assert [verb for verb, _ in failing.calls[5:7]] == ["create", "list"]
    time.sleep(1.0)
    assert trainer.kinds() == [("begun", 1), ("committed", 1)]
    assert image_of(store, 1) == content


def test_one_whose_copy_ends_in_the_pause_after_a_failure_is_tried_at_once(
    store: DirectoryStore, trainers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slot is kept from the training from then on."""
    monkeypatch.setattr("holdfast.checkpoint.persister.FIRST_PAUSE_SECONDS", 2 * LONG)
    trainer = trainers(FailingStore(store, at=[4], fail=unreachable, half=True))
    content = trainer.begin(1)
    trainer.copy(content, 0, IMAGE_BYTES)
    until(lambda: ("failed", 1) in trainer.kinds(), "it did not fail")
    time.sleep(0.1)
    trainer.complete(1)
    trainer.offer(1)
    until(lambda: ("committed", 1) in trainer.kinds(), "it waited for the end of the pause")
    assert image_of(store, 1) == content


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_slot_that_a_child_of_the_dead_training_keeps_is_not_waited_for_longer_than_a_store(
    store: DirectoryStore, trainers: Any, monkeypatch: pytest.MonkeyPatch, is_announced: bool
) -> None:
    """A lock is given back when the last process ends that has the file: a data loader's worker has it as well."""
    monkeypatch.setattr("holdfast.checkpoint.persister.ORPHAN_SECONDS", 0.5)
    trainer = trainers(store)
    trainer.persister.reads_along = is_announced
    content = trainer.begin(1)
    if is_announced:
        trainer.copy(content, 0, PIECE_BYTES)
        until(lambda: staged_bytes(store) > 0, "nothing was written")
    else:
        trainer.offer(1)
    trainer.persister.orphan()
    trainer.thread.join(LONG)
    assert not trainer.thread.is_alive()
    assert Checkpoints(store, "run").committed() == []
