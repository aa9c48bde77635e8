"""The commit protocol: a checkpoint exists when its manifest does, and then it is whole, whenever the machine died."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.folders import FolderCommitter
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.errors import AlreadyExistsError, ConfigError, DamagedCheckpointError, TransientError
from holdfast.runtime.contract import attempt_prefix, checkpoint_prefix, lease_key
from holdfast.storage import DirectoryStore, ObjectStore
from tests.unit.failing_store import FailingStore, Killed, unreachable

PREFIX = checkpoint_prefix("run")
SIX = [CheckpointId(1, step) for step in (10, 20, 30)] + [CheckpointId(2, step) for step in (20, 30, 40)]


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def content(checkpoint: CheckpointId) -> dict[str, bytes]:
    return {"weights": f"weights of {checkpoint}".encode() * 3, "files/optimizer": f"{checkpoint}".encode()}


def commit(store: ObjectStore, checkpoint: CheckpointId) -> int:
    return Checkpoints(store, "run").commit(
        checkpoint, {name: [data[:9], data[9:]] for name, data in content(checkpoint).items()}, {"kind": "state"}
    )


def lease(store: ObjectStore, attempt: int) -> None:
    """As the orchestrator writes it before it launches this attempt's machine."""
    store.put(lease_key("run"), json.dumps({"attempt": attempt}).encode())


def load(store: ObjectStore) -> tuple[CheckpointId | None, list[str]]:
    """The newest checkpoint that is whole, and the complaints about those that are not."""
    checkpoints, complaints = Checkpoints(store, "run"), []

    def use(checkpoint: CheckpointId, manifest: dict) -> CheckpointId:
        read = {name: checkpoints.read(checkpoint, manifest, name) for name in manifest["objects"]}
        assert read == content(checkpoint)
        return checkpoint

    loaded = checkpoints.newest_valid(use, lambda checkpoint, error: complaints.append(f"{checkpoint}: {error}"))
    return loaded, complaints


def assert_every_checkpoint_is_whole(store: ObjectStore) -> None:
    checkpoints = Checkpoints(store, "run")
    for checkpoint in checkpoints.committed():
        manifest = checkpoints.manifest(checkpoint)
        assert {name: checkpoints.read(checkpoint, manifest, name) for name in manifest["objects"]} == content(
            checkpoint
        )


# -- committing -------------------------------------------------------------------------------------------------------


def test_the_manifest_is_written_last_and_only_if_it_is_the_first(store: DirectoryStore) -> None:
    told = FailingStore(store)
    assert commit(told, CheckpointId(1, 10)) == sum(map(len, content(CheckpointId(1, 10)).values()))
    folder = f"{PREFIX}0001-000000000010"
    assert told.calls == [
        ("put", f"{folder}/weights"),
        ("put", f"{folder}/files/optimizer"),
        ("create", f"{folder}/manifest.json"),
    ]
    with pytest.raises(AlreadyExistsError):
        commit(store, CheckpointId(1, 10))


def test_a_manifest_says_size_and_checksum_of_every_object(store: DirectoryStore) -> None:
    Checkpoints(store, "run").commit(CheckpointId(1, 5), {"a": [b"ab", memoryview(b"c")]}, {"kind": "state", "step": 5})
    manifest = json.loads(store.get(f"{PREFIX}0001-000000000005/manifest.json"))
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["objects"] == {"a": {"size_bytes": 3, "sha256": sha256}}
    assert (manifest["kind"], manifest["step"], manifest["format_version"]) == ("state", 5, 2)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("half", [False, True])
def test_a_commit_cut_off_at_any_call_leaves_the_checkpoint_before(store: DirectoryStore, at: int, half: bool) -> None:
    commit(store, CheckpointId(1, 10))
    with pytest.raises(Killed):
        commit(FailingStore(store, at=[at], half=half), CheckpointId(1, 20))
    assert load(store) == (CheckpointId(1, 10), [])
    commit(store, CheckpointId(1, 20))  # and the same step may be committed after all
    assert load(store) == (CheckpointId(1, 20), [])


# -- order ------------------------------------------------------------------------------------------------------------


def test_a_later_attempt_s_checkpoint_is_newer_whatever_its_step(store: DirectoryStore) -> None:
    for checkpoint in (CheckpointId(2, 30), CheckpointId(1, 900), CheckpointId(2, 5), CheckpointId(10, 1)):
        commit(store, checkpoint)
    newest_first = [CheckpointId(10, 1), CheckpointId(2, 30), CheckpointId(2, 5), CheckpointId(1, 900)]
    assert Checkpoints(store, "run").committed() == newest_first[::-1]
    assert load(store)[0] == CheckpointId(10, 1)


@given(st.integers(1, 9999), st.integers(0, 10**12 - 1), st.integers(1, 9999), st.integers(0, 10**12 - 1))
def test_names_sort_as_checkpoints_do(attempt: int, step: int, other_attempt: int, other_step: int) -> None:
    one, other = CheckpointId(attempt, step), CheckpointId(other_attempt, other_step)
    assert (str(one) < str(other)) == (one < other)
    assert CheckpointId.parse(str(one)) == one


def test_another_run_s_checkpoints_are_not_ours(store: DirectoryStore) -> None:
    commit(store, CheckpointId(1, 10))
    assert Checkpoints(store, "ru").committed() == Checkpoints(store, "run-2").committed() == []


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda store, folder: store.delete(f"{folder}/weights"), "weights is missing"),
        (lambda store, folder: store.put(f"{folder}/weights", b"short"), "weights has 5 bytes, not 84"),
        (lambda store, folder: store.put(f"{folder}/files/optimizer", b"x" * 17), "has another SHA-256"),
        (lambda store, folder: store.put(f"{folder}/manifest.json", b""), "manifest.json can't be read"),
        (lambda store, folder: store.put(f"{folder}/manifest.json", b"[1]"), "manifest.json can't be read"),
        (lambda store, folder: store.put(f"{folder}/manifest.json", b"\xff{}"), "manifest.json can't be read"),
        (
            lambda store, folder: store.put(
                f"{folder}/manifest.json", b'{"format_version": 1, "objects": {"weights": {}}}'
            ),
            "manifest.json can't be read",
        ),
    ],
)
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(store: DirectoryStore, damage, said: str) -> None:
    commit(store, CheckpointId(1, 10))
    commit(store, CheckpointId(1, 20))
    damage(store, f"{PREFIX}0001-000000000020")
    loaded, complaints = load(store)
    assert loaded == CheckpointId(1, 10)
    assert len(complaints) == 1 and complaints[0].startswith("0001-000000000020") and said in complaints[0]


def test_a_flipped_bit_anywhere_in_a_manifest_ends_in_no_surprise(store: DirectoryStore) -> None:
    """Either it says the same as before, or the checkpoint is damaged and the one before is used."""
    commit(store, CheckpointId(1, 10))
    commit(store, CheckpointId(1, 20))
    key = f"{PREFIX}0001-000000000020/manifest.json"
    whole = store.get(key)
    seen = set()
    for place in range(len(whole)):
        store.put(key, whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        loaded, complaints = load(store)
        assert loaded == CheckpointId(1, 10 if complaints else 20), whole[place:]
        seen.add(loaded.step)
    assert seen == {10, 20}  # a flip in the name of the checksum itself takes nothing away


def test_when_no_checkpoint_is_whole_the_run_does_not_begin_at_zero(store: DirectoryStore) -> None:
    for checkpoint in SIX[:2]:
        commit(store, checkpoint)
        store.delete(f"{PREFIX}{checkpoint}/weights")
    with pytest.raises(ConfigError, match=r"'run' has 2 checkpoints and none is whole"):
        load(store)


def test_no_checkpoint_at_all_is_a_fresh_start(store: DirectoryStore) -> None:
    store.put(f"{PREFIX}0001-000000000010/weights", b"a commit that never came to its manifest")
    assert load(store) == (None, [])


def test_a_checkpoint_of_a_newer_holdfast_is_not_called_damaged(store: DirectoryStore) -> None:
    commit(store, CheckpointId(1, 10))
    store.put(f"{PREFIX}0001-000000000020/manifest.json", b'{"format_version": 3, "objects": {}}')
    with pytest.raises(ConfigError, match="has format 3"):
        load(store)


def test_a_store_that_does_not_answer_is_not_a_damaged_checkpoint(store: DirectoryStore) -> None:
    for checkpoint in SIX[:2]:
        commit(store, checkpoint)
    calls = FailingStore(store)
    load(calls)
    for at in range(1, len(calls.calls) + 1):
        with pytest.raises(TransientError):
            load(FailingStore(store, at=[at], fail=unreachable))


def test_a_checkpoint_pruned_while_it_was_looked_for_is_passed_over(store: DirectoryStore) -> None:
    for checkpoint in SIX[:2]:
        commit(store, checkpoint)

    def use(checkpoint: CheckpointId, manifest: dict) -> CheckpointId:
        if checkpoint == SIX[1] and store.list(f"{PREFIX}{SIX[1]}/"):
            for info in store.list(f"{PREFIX}{SIX[1]}/"):
                store.delete(info.key)
            raise DamagedCheckpointError("it is gone")
        return checkpoint

    assert Checkpoints(store, "run").newest_valid(use, lambda checkpoint, error: None) == SIX[0]


# -- retention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3, 6, 7])
def test_the_newest_are_kept_and_all_of_the_others_goes(store: DirectoryStore, keep: int) -> None:
    for checkpoint in SIX:
        commit(store, checkpoint)
    assert Checkpoints(store, "run").prune(2, keep) == SIX[:-keep]
    assert Checkpoints(store, "run").committed() == SIX[-keep:]
    assert len(store.list(PREFIX)) == 3 * min(keep, 6)
    assert_every_checkpoint_is_whole(store)


def test_what_interrupted_commits_of_earlier_attempts_left_goes_too(store: DirectoryStore) -> None:
    store.put(f"{PREFIX}0001-000000000040/weights", b"an earlier attempt's: its machine is gone")
    store.put(f"{PREFIX}0002-000000000050/weights", b"this attempt's: it may be under way")
    store.put(f"{PREFIX}0003-000000000050/weights", b"a later attempt's: it is none of our business")
    commit(store, CheckpointId(2, 40))
    Checkpoints(store, "run").prune(2, 3)
    names = {info.key.removeprefix(PREFIX).partition("/")[0] for info in store.list(PREFIX)}
    assert names == {"0002-000000000040", "0002-000000000050", "0003-000000000050"}


def test_retention_interrupted_at_any_call_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    interrupted = 0
    for at in range(1, 100):
        store = DirectoryStore(tmp_path / str(at))
        for checkpoint in SIX:
            commit(store, checkpoint)
        try:
            Checkpoints(FailingStore(store, at=[at]), "run").prune(2, 2)
        except Killed:
            interrupted += 1
            assert Checkpoints(store, "run").committed()[-2:] == SIX[-2:]
            assert_every_checkpoint_is_whole(store)
            Checkpoints(store, "run").prune(3, 2)  # the next attempt finishes it
        assert len(store.list(PREFIX)) == 2 * 3
        assert_every_checkpoint_is_whole(store)
        if interrupted < at:
            break
    assert interrupted >= 4 + 4 * 2  # four manifests and eight objects were deleted one by one


# -- fencing ----------------------------------------------------------------------------------------------------------


def test_a_zombie_of_an_earlier_attempt_learns_that_it_is_one(store: DirectoryStore) -> None:
    checkpoints = Checkpoints(store, "run")
    assert not checkpoints.superseded(1)
    lease(store, 1)
    assert not checkpoints.superseded(1)
    lease(store, 10)
    assert checkpoints.superseded(1) and checkpoints.superseded(9)
    assert not checkpoints.superseded(10)


def test_an_old_lease_written_late_does_not_call_a_zombie_back(store: DirectoryStore) -> None:
    commit(store, CheckpointId(2, 10))
    lease(store, 1)
    assert Checkpoints(store, "run").superseded(1)
    assert not Checkpoints(store, "run").superseded(2)


def test_asking_costs_the_same_however_much_a_run_has_said(store: DirectoryStore) -> None:
    lease(store, 1)
    commit(store, CheckpointId(1, 10))
    for number in range(50):
        store.put(f"{attempt_prefix('run', 1)}logs/{number:06d}.txt", b"x")
    told = FailingStore(store)
    assert not Checkpoints(told, "run").superseded(1)
    assert told.calls == [("get", lease_key("run")), ("list", PREFIX)]


def test_a_lease_that_cannot_be_read_is_asked_for_again(store: DirectoryStore) -> None:
    for content in (b"", b"[]"):
        store.put(lease_key("run"), content)
        with pytest.raises(TransientError, match="lease of run 'run'"):
            Checkpoints(store, "run").superseded(1)


def test_a_zombie_commits_no_folder_and_deletes_nothing(store: DirectoryStore, tmp_path: Path) -> None:
    (tmp_path / "30").mkdir()
    for checkpoint in SIX:
        commit(store, checkpoint)
    lease(store, 3)
    before = store.list("")
    with pytest.raises(ConfigError, match="attempt 2 was replaced by a later one"):
        FolderCommitter(store, "run", 2, CheckpointPolicy(max_to_keep=1)).commit(tmp_path / "30", 30)
    assert store.list("") == before
