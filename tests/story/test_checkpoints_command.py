"""`holdfast checkpoints`: looked at, verified, compared, pruned, and carried to and from programs of plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flows.__main__ import main
from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.folders import FolderCommitter
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.checkpoint.reader import read_metrics
from holdfast.errors import ConfigError
from holdfast.ledger.journal import Journal
from holdfast.model import TrainingJob
from holdfast.runtime.contract import journal_prefix
from holdfast.storage import DirectoryStore
from holdfast.supervision.opening import refuse_what_others_left
from holdfast.supervision.ownership import Ownership
from tests.conftest import PROGRAMS
from tests.emulated.object_stores import ACCESS_KEY, SECRET_KEY, S3Emulator

REPOSITORY = PROGRAMS.parent.parent


def program(name: str, *arguments: str, ranks: int = 1, **variables: str) -> str:
    command = [str(PROGRAMS / name), *arguments]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def attached(folder: Path, run: str, steps: int, **variables: str) -> str:
    return program(
        "attached.py", str(steps), HOLDFAST_STORE=(folder / "store").as_uri(), HOLDFAST_RUN=run,
        HOLDFAST_ATTEMPT="1", **variables,
    )  # fmt: skip


def plain(first: int, last: int, begin: Path | str = "-", end: Path | str = "-", ranks: int = 1) -> dict[int, float]:
    printed = program("plain.py", str(first), str(last), str(begin), str(end), ranks=ranks)
    return {step: loss for step, loss in map(json.loads, printed.splitlines())}


def losses(folder: Path, run: str) -> dict[int, float]:
    return {step: one["loss"] for step, one in read_metrics(DirectoryStore(folder / "store"), run).items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose store has a run `steady` of 8 steps, with its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    attached(folder, "steady", 8, PAUSE="0.1")  # time to make every second step durable
    return folder


@pytest.fixture(scope="module")
def steady() -> dict[int, float]:
    """What plain torch, uninterrupted, comes to."""
    return plain(1, 8)


@pytest.fixture
def command(folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `holdfast checkpoints ...` on a copy of the trained store; (exit status, output and errors)."""
    subprocess.run(["cp", "-r", trained / "store", folder / "store"], check=True)

    def run(*arguments: object) -> tuple[int, str]:
        status = main(["checkpoints", *map(str, arguments), "--store", str(folder / "store")])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def steps_of(folder: Path, run: str) -> list[int]:
    """Of its checkpoints, oldest first."""
    return [one.step for one in Checkpoints(DirectoryStore(folder / "store"), run).committed()]


def newest(folder: Path) -> tuple[CheckpointId, Path]:
    checkpoint = Checkpoints(DirectoryStore(folder / "store"), "steady").committed()[-1]
    return checkpoint, folder / "store" / "runs/steady/checkpoints" / str(checkpoint)


def flip(path: Path, at: int) -> None:
    body = bytearray(path.read_bytes())
    body[at] ^= 1
    path.write_bytes(body)


def test_a_run_is_found_listed_and_shown(command, folder: Path) -> None:
    status, said = command("list")
    assert status == 0 and "steady" in said and "0001-000000000008" in said
    status, said = command("list", "steady")
    assert status == 0 and said.count("all there") == len(
        Checkpoints(DirectoryStore(folder / "store"), "steady").committed()
    )
    status, said = command("show", "steady")
    assert status == 0
    for words in ("valid", "8 of 8, attempt 1", "parent", "learning rates", "model", "optimizer", "state.safetensors"):
        assert words in said


def test_a_flipped_bit_is_found_by_show_and_verify_and_named(command, folder: Path) -> None:
    checkpoint, path = newest(folder)
    flip(next(path.rglob("state.safetensors")), -5)
    status, said = command("verify", "steady", "all")
    assert status == 1 and said.count("damaged") == 1 and "state.safetensors" in said and "CRC-32" in said
    status, said = command("show", "steady", checkpoint)
    assert status == 1 and "damaged" in said and "piece 0" in said
    next(path.rglob("state.safetensors")).unlink()
    status, said = command("list", "steady")
    assert status == 1 and "state.safetensors is missing" in said
    (path / "manifest.json").write_text("{")
    assert command("show", "steady")[0] == command("verify", "steady")[0] == command("list", "steady")[0] == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["show", "stedy"], "did you mean 'steady'?"),
        (["verify", "steady", "0003-000000000008"], "has no checkpoint 0003-000000000008; it has 0001-"),
        (["show", "steady", "last"], "write 'newest', a step, or an id such as 0001-"),
        (["diff", "steady", "2"], "write diff RUN A B"),
        (["export", "steady", "--to", "x.safetensors", "--component", "net"], "no component 'net'; it has model, optimizer"),
        (["prune", "steady", "--keep", "0"], "at least one checkpoint must stay"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_one_line_with_a_remedy(command, arguments: list[str], words: str) -> None:
    status, said = command(*arguments)
    assert status == 2 and words in said and said.startswith("refused: ") and said.count("\n") == 1


def test_a_store_that_is_not_there_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "list", "--store", "./nowhere"]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_bucket_is_a_store_like_any_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    weights = {"weight": torch.arange(6.0).reshape(2, 3)}
    torch.save({"model": weights, "epoch": 3}, folder / "model.pt")
    with S3Emulator("checkpoints") as s3:
        store = ["--store", s3.url("checkpoints", "team/a")]
        assert main(["checkpoints", "import", "model.pt", "--run", "bucket", "--step", "3", *store]) == 0
        for verb in (["list"], ["show", "bucket"], ["verify", "bucket"], ["export", "bucket", "--to", "m.safetensors"]):
            assert main(["checkpoints", *verb, *store]) == 0, capsys.readouterr()
        assert torch.equal(load_file(folder / "m.safetensors")["weight"], weights["weight"])
        assert main(["checkpoints", "prune", "bucket", "--keep", "1", *store]) == 0
        assert main(["checkpoints", "list", "nobody", *store]) == 2


def test_a_store_is_named_by_its_block_too(
    command, folder: Path, store: DirectoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "store").rename(store.root)
    assert main(["checkpoints", "list", "--store", "local"]) == 0
    assert "steady" in capsys.readouterr().out
    assert main(["checkpoints", "list", "--store", "lokal"]) == 2
    assert "did you mean 'local'?" in capsys.readouterr().err


def test_two_checkpoints_are_compared_to_the_element(command, folder: Path) -> None:
    status, said = command("diff", "steady", 8, "newest")
    assert status == 0 and "the states are equal" in said
    first = steps_of(folder, "steady")[0]
    status, said = command("diff", f"steady@{first}", "steady@8")
    assert status == 1 and "592 of 592" in said and "scheduler.last_epoch" in said and "user.seen" in said


def test_pruning_leaves_the_newest_that_is_whole(command, folder: Path) -> None:
    ids = Checkpoints(DirectoryStore(folder / "store"), "steady").committed()
    assert len(ids) >= 3
    flip(next(newest(folder)[1].rglob("tree.json")), 10)
    status, said = command("prune", "steady", "--keep", 1, "--list")
    assert status == 0 and said.count("would delete") == len(ids) - 2
    assert command("prune", "steady", "--keep", 1)[0] == 0
    assert Checkpoints(DirectoryStore(folder / "store"), "steady").committed() == ids[-2:]
    flip(next((folder / "store/runs/steady/checkpoints" / str(ids[-2])).rglob("tree.json")), 10)
    status, said = command("prune", "steady", "--keep", 1)
    assert status == 2 and "none is whole: nothing is deleted" in said


def test_a_live_run_is_pruned_no_further_than_it_does_itself(command, folder: Path) -> None:
    store = DirectoryStore(folder / "store")
    Ownership(store, "steady").claim()
    job = TrainingJob.model_validate({"name": "gpt", "script": "train.py", "checkpointing": {"max_to_keep": 2}})
    Journal(store, journal_prefix("steady")).append("run-started", datetime.now(UTC), job=job.model_dump(mode="json"))
    status, said = command("prune", "steady", "--keep", 1)
    assert status == 2 and "being worked on" in said and "--keep 2 or more" in said
    assert command("prune", "steady", "--keep", 2)[0] == 0
    assert len(Checkpoints(store, "steady").committed()) == 2


def test_a_directory_checkpoint_is_shown_compared_and_exported_as_files(command, folder: Path) -> None:
    store, work = DirectoryStore(folder / "store"), folder / "work"
    committer = FolderCommitter(store, "files", 1, CheckpointPolicy())
    for step, text in ((1, "one"), (2, "two")):
        (work / "deep").mkdir(parents=True, exist_ok=True)
        (work / "deep/weights.txt").write_text(text)
        committer.commit(work, step)
    assert command("verify", "files", "all")[0] == 0
    status, said = command("show", "files")
    assert status == 0 and "files/deep/weights.txt" in said
    status, said = command("diff", "files", 1, 2)
    assert status == 1 and "files/deep/weights.txt" in said
    assert command("export", "files", 1, "--to", folder / "out")[0] == 0
    assert (folder / "out/deep/weights.txt").read_text() == "one"
    assert command("prune", "files", "--keep", 1)[0] == 0
    status, said = command("export", "files", "--to", folder / "out")
    assert status == 2 and "is there already" in said


def test_plain_torch_goes_on_from_an_exported_folder_to_the_bit(command, folder: Path) -> None:
    begin = steps_of(folder, "steady")[-2]
    assert command("export", "steady", begin, "--to", folder / "dcp", "--rename", "optimizer=optim")[0] == 0
    went_on = plain(begin + 1, 8, folder / "dcp")
    assert went_on == {step: loss for step, loss in losses(folder, "steady").items() if step > begin}


def test_a_folder_of_plain_torch_is_gone_on_with_to_the_bit(command, folder: Path, steady: dict[int, float]) -> None:
    assert plain(1, 4, end=folder / "dcp") == {step: steady[step] for step in range(1, 5)}
    status, said = command("import", folder / "dcp", "--run", "taken", "--step", 4, "--rename", "optim=optimizer")
    assert status == 0 and all(name in said for name in ("model", "optimizer", "scheduler"))
    refuse_what_others_left(
        DirectoryStore(folder / "store"), "taken"
    )  # an orchestrator takes it for its run's beginning
    assert "state {'step': 4}" in attached(folder, "taken", 8)
    assert losses(folder, "taken") == {step: steady[step] for step in range(5, 9)}
    status, said = command("import", folder / "dcp", "--run", "taken", "--step", 4)
    assert status == 2 and "checkpoints already" in said
    with pytest.raises(ConfigError, match="that no journal explains"):
        refuse_what_others_left(DirectoryStore(folder / "store"), "taken")


def test_what_two_ranks_sharded_goes_on_with_one_and_the_other_way_round(
    command, folder: Path, steady: dict[int, float]
) -> None:
    plain(1, 4, end=folder / "dcp", ranks=2)
    assert command("import", folder / "dcp", "--run", "taken", "--step", 4, "--rename", "optim=optimizer")[0] == 0
    attached(folder, "taken", 8)
    assert losses(folder, "taken") == pytest.approx({step: steady[step] for step in range(5, 9)}, rel=1e-5)
    begin = steps_of(folder, "taken")[-2]
    assert command("export", "taken", begin, "--to", folder / "back", "--rename", "optimizer=optim")[0] == 0
    rest = {step: loss for step, loss in steady.items() if step > begin}
    assert plain(begin + 1, 8, folder / "back", ranks=2) == pytest.approx(rest, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "s3://bucket/x.pt"), "an export is written to this computer"),
        (("--to", "model.bin"), "write .safetensors or .pt for a file"),
        (("--to", "taken/x.pt"), "can't be written"),
        (("--to", "dcp", "--rename", "nope=model"), "has no component nope"),
        (("--to", "dcp", "--rename", "optimizer=model"), "model would be two things of the export"),
        (("--to", "dcp", "--rename", "optimizer=holdfast"), "holdfast would be two things of the export"),
    ],
)
def test_an_export_that_can_t_be_is_refused_and_leaves_nothing(
    arguments: tuple[str, ...], said: str, command, folder: Path
) -> None:
    (folder / "taken").write_text("a file where a folder would have to be")
    before = sorted(folder.rglob("*"))
    status, told = command("export", "steady", "newest", *arguments)
    assert status == 2 and said in " ".join(told.split()) and "Traceback" not in told
    assert sorted(folder.rglob("*")) == before


def test_an_import_makes_no_two_components_one(command, folder: Path) -> None:
    assert command("export", "steady", "newest", "--to", folder / "all.pt")[0] == 0
    arguments = ("import", folder / "all.pt", "--run", "twice", "--step", 4, "--rename", "model=optimizer")
    status, told = command(*arguments)
    assert status == 2 and "optimizer would be two components" in told


def test_a_step_in_other_digits_is_no_step(command) -> None:
    status, told = command("show", "steady", "²")
    assert status == 2 and "write 'newest', a step, or an id" in " ".join(told.split())
