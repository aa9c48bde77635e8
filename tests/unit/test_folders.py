"""Checkpoints that are folders: committed as a whole, restored as a whole, and nowhere else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.folders import FolderCommitter, plain_files, replace_files
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.clock import WallClock
from holdfast.errors import ConfigError, DamagedCheckpointError
from holdfast.runtime import contract
from holdfast.runtime.contract import checkpoint_prefix
from holdfast.runtime.folders import LOOK_SECONDS, FolderCheckpoints
from holdfast.storage import DirectoryStore
from tests.unit.failing_store import FailingStore, unreachable


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def committer(store: Any, attempt: int = 1, keep: int = 3) -> FolderCommitter:
    return FolderCommitter(store, "run", attempt, CheckpointPolicy(max_to_keep=keep))


def folder(place: Path, **files: bytes) -> Path:
    for name, body in files.items():
        path = place / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return place


def content(place: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in plain_files(place)}


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "timed out"
        time.sleep(0.005)


# -- committing and restoring -----------------------------------------------------------------------------------------


def test_a_folder_comes_back_as_it_was(store: DirectoryStore, tmp_path: Path) -> None:
    made = folder(tmp_path / "made", weights=b"\0" * 5_000_000, sub__deep__config=b"{}", empty=b"")
    assert committer(store).commit(made, 40) == 5_000_002
    step, place = committer(store, attempt=2).restore(tmp_path / "machine") or (0, tmp_path)
    assert (step, place) == (40, tmp_path / "machine" / "40")
    assert content(place) == content(made)
    assert [path.name for path in (tmp_path / "machine").iterdir()] == ["40"]


@given(st.dictionaries(st.text("ab.é €%~", min_size=1, max_size=8), st.binary(max_size=50), max_size=5))
def test_files_of_any_name_come_back(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    base = tmp_path_factory.mktemp("any")
    files = {name: body for name, body in files.items() if name not in (".", "..")}
    (base / "made").mkdir()
    for name, body in files.items():
        (base / "made" / name).write_bytes(body)
    store = DirectoryStore(base / "store")
    committer(store).commit(base / "made", 1)
    restored = committer(store).restore(base / "machine")
    assert restored and content(restored[1]) == files


def test_a_restored_folder_holds_nothing_of_what_was_there_before(store: DirectoryStore, tmp_path: Path) -> None:
    committer(store).commit(folder(tmp_path / "made", weights=b"new"), 40)
    folder(tmp_path / "machine" / "40", weights=b"half", leftover=b"x")
    folder(tmp_path / "machine" / "40.restoring", leftover=b"x")
    restored = committer(store).restore(tmp_path / "machine")
    assert restored and content(restored[1]) == {"weights": b"new"}


def test_without_a_checkpoint_there_is_nothing_to_restore(store: DirectoryStore, tmp_path: Path) -> None:
    assert committer(store).restore(tmp_path / "machine") is None


def test_the_newest_whole_folder_is_restored_and_a_damaged_one_is_told(store: DirectoryStore, tmp_path: Path) -> None:
    for step in (10, 20):
        committer(store).commit(folder(tmp_path / str(step), weights=str(step).encode()), step)
    store.put(f"{checkpoint_prefix('run')}0001-000000000020/files/weights", b"XX")
    second = committer(store, attempt=2)
    restored = second.restore(tmp_path / "machine")
    assert restored and restored[0] == 10
    assert [name for name, _ in second.damaged] == ["0001-000000000020"]


@pytest.mark.parametrize("escape", ["../../outside", "/outside", "a/../../outside", "..", "sub/.."])
def test_a_checkpoint_that_would_write_outside_its_folder_is_refused(
    store: DirectoryStore, tmp_path: Path, escape: str
) -> None:
    committer(store).commit(folder(tmp_path / "10", weights=b"good"), 10)
    body = {"format_version": 1, "kind": "directory", "objects": {f"files/{escape}": {"size_bytes": 1, "sha256": ""}}}
    store.put(f"{checkpoint_prefix('run')}0001-000000000020/manifest.json", json.dumps(body).encode())
    second = committer(store)
    restored = second.restore(tmp_path / "machine")
    assert restored and restored[0] == 10
    assert "outside its folder" in second.damaged[0][1]
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "broken link", "pipe"])
def test_what_would_not_come_back_is_refused_when_it_is_committed(
    store: DirectoryStore, tmp_path: Path, kind: str
) -> None:
    made = folder(tmp_path / "made", weights=b"x")
    odd = made / "odd"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to({"link to a file": made / "weights", "link to a folder": tmp_path}.get(kind, "nowhere"))
    with pytest.raises(ConfigError, match=r"odd is no plain file"):
        committer(store).commit(made, 10)
    assert Checkpoints(store, "run").committed() == []


def test_another_kind_of_checkpoint_is_not_taken_for_a_folder(store: DirectoryStore, tmp_path: Path) -> None:
    Checkpoints(store, "run").commit(CheckpointId(1, 10), {"tree.json": [b"{}"]}, {"kind": "state"})
    assert committer(store).restore(tmp_path / "machine") is None


# -- on the machine ---------------------------------------------------------------------------------------------------


class OnTheMachine:
    """The agent's side: a folder that a program writes into, and what it tells."""

    def __init__(self, place: Path, store: Any, attempt: int = 1) -> None:
        self.place = place
        self.side = FolderCheckpoints(place, store, "run", attempt, CheckpointPolicy(), WallClock())
        self.environment = self.side.restore()
        self.told: list[dict[str, Any]] = []

    def write(self, step: int, **files: bytes) -> None:
        folder(self.place / f"{step}.tmp", **files).rename(self.place / str(step))

    def committed(self) -> list[int]:
        self.told += self.side.new_events()
        return [event["step"] for event in self.told if event["kind"] == "committed"]

    def failed(self) -> list[str]:
        self.told += self.side.new_events()
        return [event["error"] for event in self.told if event["kind"] == "commit-failed"]


def test_a_folder_that_is_renamed_into_place_is_committed_while_the_program_runs(
    store: DirectoryStore, tmp_path: Path
) -> None:
    machine = OnTheMachine(tmp_path / "one", store)
    assert contract.RESUME_DIRECTORY not in machine.environment
    machine.write(10, weights=b"ten")
    wait_until(lambda: machine.committed() == [10])
    machine.write(20, weights=b"twenty")
    folder(machine.place / "30.tmp", weights=b"half")
    wait_until(lambda: machine.committed() == [10, 20])
    machine.side.finish()
    assert sorted(path.name for path in machine.place.iterdir()) == ["20", "30.tmp"]  # older ones take no room

    later = OnTheMachine(tmp_path / "two", store, attempt=2)
    assert later.environment == {
        contract.CHECKPOINT_DIRECTORY: str(tmp_path / "two"),
        contract.RESUME_DIRECTORY: str(tmp_path / "two" / "20"),
        contract.RESUME_STEP: "20",
    }
    assert content(tmp_path / "two" / "20") == {"weights": b"twenty"}
    assert later.side.finish() == []  # what was restored is not committed again


def test_the_console_says_how_far_a_program_came_that_knows_nothing_of_us(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(contract.CONSOLE, str(tmp_path / "console"))
    machine = OnTheMachine(tmp_path / "one", store)
    machine.write(10, weights=b"ten")
    wait_until(lambda: machine.committed() == [10])
    machine.side.finish()
    OnTheMachine(tmp_path / "two", store, attempt=2).side.finish()
    said = [line for line in (tmp_path / "console").read_text().splitlines() if line]
    assert said == [
        "holdfast: step 10 {}",
        "holdfast: phase commit 10",
        "holdfast: phase committed 10",
        "holdfast: phase resumed 10",
    ]


def test_what_the_program_left_complete_is_committed_at_its_end(store: DirectoryStore, tmp_path: Path) -> None:
    machine = OnTheMachine(tmp_path / "one", store)
    machine.write(10, weights=b"ten")
    machine.told += machine.side.finish()
    assert machine.committed() == [10]


def test_a_damaged_folder_is_told_and_the_one_before_is_resumed_from(store: DirectoryStore, tmp_path: Path) -> None:
    for step in (10, 20):
        committer(store).commit(folder(tmp_path / str(step), weights=str(step).encode()), step)
    store.delete(f"{checkpoint_prefix('run')}0001-000000000020/files/weights")
    machine = OnTheMachine(tmp_path / "machine", store, attempt=2)
    (told,) = machine.side.finish()
    assert machine.environment[contract.RESUME_STEP] == "10"
    assert (told["kind"], told["checkpoint"]) == ("damaged", "0001-000000000020")
    assert "files/weights is missing" in told["error"]


def test_a_store_that_fails_is_asked_again_and_the_failure_told(store: DirectoryStore, tmp_path: Path) -> None:
    machine = OnTheMachine(tmp_path / "one", FailingStore(store, at=[4], fail=unreachable))
    machine.write(10, weights=b"ten")
    wait_until(lambda: machine.committed() == [10])
    assert len(machine.failed()) == 1 and "does not answer" in machine.failed()[0]
    machine.side.finish()


def test_a_folder_that_can_never_be_committed_is_told_once_and_the_next_may_be(
    store: DirectoryStore, tmp_path: Path
) -> None:
    machine = OnTheMachine(tmp_path / "one", store)
    (machine.place / "10.tmp").mkdir()
    (machine.place / "10.tmp" / "link").symlink_to("elsewhere")
    (machine.place / "10.tmp").rename(machine.place / "10")
    wait_until(machine.failed)
    machine.write(20, weights=b"twenty")
    wait_until(lambda: machine.committed() == [20])
    machine.side.finish()
    assert len(machine.failed()) == 1


def test_a_program_that_removes_its_checkpoint_folder_goes_on_committing(store: DirectoryStore, tmp_path: Path) -> None:
    machine = OnTheMachine(tmp_path / "one", store)
    machine.write(10, weights=b"ten")
    wait_until(lambda: machine.committed() == [10])
    shutil.rmtree(machine.place)
    looked_at = time.monotonic() + 2 * LOOK_SECONDS
    wait_until(lambda: time.monotonic() > looked_at)
    machine.write(20, weights=b"twenty")
    wait_until(lambda: machine.committed() == [10, 20])
    shutil.rmtree(machine.place)
    assert machine.side.finish() == []


def test_the_restored_state_s_folder_is_refused_outside_its_place_too(tmp_path: Path) -> None:

    for escape in ("../outside", "/outside"):
        with pytest.raises(DamagedCheckpointError):
            replace_files(tmp_path / "folder", {f"files/{escape}": b"x"})
    assert not list(tmp_path.rglob("outside"))
