"""A run goes on with another number of ranks, sharded or not: the same losses, every sample once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.reader import list_checkpoints, read_metrics
from holdfast.storage import DirectoryStore
from tests.conftest import PROGRAMS

REPOSITORY = PROGRAMS.parent.parent
SAMPLES, BATCH = 96, 12  # as in the program


def train(folder: Path, name: str, how: str, world: int, steps: int, attempt: int, **variables: str) -> int:
    """Ranks of one computer, started by torchrun, as a machine of the run would have them; the exit status."""
    return start(folder, name, world if how != "alone" else 0, attempt, ["worlds.py", how, str(steps)], **variables)[0]


def start(folder: Path, name: str, world: int, attempt: int, program: list[str], **variables: str) -> tuple[int, str]:
    """`world` 0: without torchrun. The exit status, and what was printed."""
    command = [str(PROGRAMS / program[0]), *program[1:]]
    if world:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *command]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY / 'src'}",
        "HOLDFAST_STORE": (folder / "store").as_uri(),
        "HOLDFAST_RUN": name,
        "HOLDFAST_ATTEMPT": str(attempt),
        "HOLDFAST_TELEMETRY": str(folder / f"telemetry-{name}-{attempt}.jsonl"),
        "SEEN": str(folder / f"seen-{name}-{attempt}"),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)
    if done.returncode:
        print(done.stdout, done.stderr)
    return done.returncode, done.stdout + done.stderr


def seen(folder: Path, name: str, last_step: dict[int, int]) -> Counter[tuple[int, int]]:
    """(epoch, sample) -> how often, of the steps that count: those of an attempt up to its last committed step."""
    found: Counter[tuple[int, int]] = Counter()
    for path in folder.glob(f"seen-{name}-*"):
        attempt = int(path.name.removeprefix(f"seen-{name}-").partition(".")[0])
        for line in path.read_text().splitlines():
            step, share = json.loads(line)
            if step <= last_step[attempt]:
                found.update(((step - 1) * BATCH // SAMPLES, sample) for sample in share)
    return found


def losses(store: DirectoryStore, name: str) -> list[float]:
    return [metrics["loss"] for _, metrics in sorted(read_metrics(store, name).items())]


WORLDS = [(4, 8), (2, 16), (1, 24), (3, 32)]


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("steady")
    assert train(folder, "steady", "alone", 1, 32, 1) == 0
    return losses(DirectoryStore(folder / "store"), "steady")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_four_two_one_and_three_ranks_train_as_one_world_would(how: str, folder: Path, steady: list[float]) -> None:
    store = DirectoryStore(folder / "store")
    for attempt, (world, steps) in enumerate(WORLDS, 1):
        assert train(folder, "run", how, world, steps, attempt) == 0
        info = list_checkpoints(store, "run")[-1]
        assert info.id == CheckpointId(attempt, steps) and len(info.metadata["ranks"]) == world
    assert losses(store, "run") == pytest.approx(steady, rel=1e-5)
    last = {attempt: steps for attempt, (_, steps) in enumerate(WORLDS, 1)}
    assert seen(folder, "run", last) == Counter((epoch, sample) for epoch in range(4) for sample in range(SAMPLES))


def test_what_shards_saved_one_process_loads_and_the_other_way_round(folder: Path, steady: list[float]) -> None:
    store = DirectoryStore(folder / "store")
    for attempt, (how, world, steps) in enumerate(
        [("fsdp", 2, 8), ("alone", 1, 16), ("fsdp", 3, 24), ("ddp", 2, 32)], 1
    ):
        assert train(folder, "run", how, world, steps, attempt) == 0
    assert losses(store, "run") == pytest.approx(steady, rel=1e-5)


def test_a_rank_that_dies_leaves_the_checkpoint_before(folder: Path, steady: list[float]) -> None:
    store = DirectoryStore(folder / "store")
    assert train(folder, "run", "fsdp", 2, 32, 1, DIE_AT="1 18") != 0
    newest = Checkpoints(store, "run").committed()[-1]
    assert newest.attempt == 1 and 0 < newest.step < 18
    for info in list_checkpoints(store, "run"):
        Checkpoints(store, "run").verify(info.id, info.metadata)
    assert train(folder, "run", "fsdp", 2, 32, 2) == 0
    assert losses(store, "run") == pytest.approx(steady, rel=1e-5)


def test_shards_that_are_evaluated_averaged_and_tied_go_on_in_any_world(folder: Path) -> None:
    """Three ranks share four rows of a tied weight: one has none of them."""
    for attempt, (world, steps) in enumerate([(3, 4), (3, 6), (2, 8), (0, 10)], 1):
        assert start(folder, "run", world, attempt, ["sharded.py", str(steps)], SEEN=str(folder / "run"))[0] == 0
    assert start(folder, "steady", 0, 1, ["sharded.py", "10"], SEEN=str(folder / "steady"))[0] == 0
    rows = [[float(one) for one in line.split()] for line in (folder / "run").read_text().splitlines()]
    assert [row[0] for row in rows] == [0, 4, 6, 8]
    steady = [float(one) for one in (folder / "steady").read_text().split()]
    assert rows[-1][1:] == pytest.approx(steady[1:], rel=1e-5)


def test_ranks_with_different_objects_are_told_so_before_anything_is_trained(folder: Path) -> None:
    status, said = start(folder, "run", 2, 1, ["stages.py"])
    assert status
    assert "than on rank 0: only rank 1 has model.second.bias [3], model.second.weight [3, 3]; only rank 0 has" in said
    assert not Checkpoints(DirectoryStore(folder / "store"), "run").committed()


def test_a_snapshot_that_comes_to_nothing_on_one_rank_is_taken_again_by_all(folder: Path) -> None:
    status, said = start(folder, "run", 2, 1, ["failing_rank.py", "400"])
    assert status == 0 and "snapshot failed step=" in said
    store = DirectoryStore(folder / "store")
    assert Checkpoints(store, "run").committed()[-1] == CheckpointId(1, 400)


def test_ranks_that_can_t_reach_each_other_are_told_what_to_do(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import holdfast; holdfast.attach()"],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY / "src"),
            "HOLDFAST_STORE": (folder / "store").as_uri(),
            "HOLDFAST_RUN": "run",
            "HOLDFAST_ATTEMPT": "1",
            "WORLD_SIZE": "2",
            "RANK": "0",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode and "call torch.distributed.init_process_group() before attach()" in done.stderr
