"""Programs that go on after a checkpoint: what fits comes back as it was, and what doesn't is said, never made to fit."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import psutil
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from holdfast.checkpoint.commits import CHECKSUM, CheckpointId
from holdfast.checkpoint.resumable_loader import ResumableLoader
from holdfast.checkpoint.sampling import ShuffledBatches
from holdfast.checkpoint.state import TrainingState
from holdfast.errors import ConfigError
from tests.conftest import PROGRAMS
from tests.unit.started import Started, adamw, network, train

# -- optimizers and schedulers ----------------------------------------------------------------------------------------

Make = Callable[[nn.Module], torch.optim.Optimizer]


def halves(model: Any, **second: float) -> list[dict[str, Any]]:
    return [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), **second}]


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (adamw, lambda model: torch.optim.Adam(model.parameters()), "another kind .*: Adam, and there it is AdamW"),
        (
            lambda model: torch.optim.Adam(model.parameters()),
            lambda model: torch.optim.Adamax(model.parameters()),
            "another kind .*: Adamax, and there it is Adam",
        ),
        (
            lambda model: torch.optim.SGD(halves(model, lr=0.2), lr=0.1),
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            r"in 1 groups, the checkpoint has them in 2.*model\.0\.bias, model\.0\.weight; model\.2\.bias",
        ),
        (
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            lambda model: torch.optim.SGD(halves(model, lr=0.2), lr=0.1),
            "in 2 groups, the checkpoint has them in 1",
        ),
        (
            lambda model: torch.optim.SGD(halves(model, lr=0.2), lr=0.1),
            lambda model: torch.optim.SGD(
                [{"params": [model[0].weight, model[2].weight]}, {"params": [model[0].bias, model[2].bias]}], lr=0.1
            ),
            "in 2 groups, the checkpoint has them in 2, or in others",
        ),
    ],
)
def test_an_optimizer_that_would_mean_something_else_by_its_state_is_refused(
    then: Make, now: Make, said: str, started: Started
) -> None:
    model = network()
    optimizer = then(model)
    train(started.attempt(1, model=model, optimizer=optimizer), model, optimizer, 2)
    other = network()
    with pytest.raises(ConfigError, match=said):
        started.attempt(2, model=other, optimizer=now(other))


def test_groups_in_another_order_keep_their_settings(started: Started) -> None:
    model = network()
    optimizer = torch.optim.SGD(halves(model, lr=0.2), lr=0.1)
    train(started.attempt(1, model=model, optimizer=optimizer), model, optimizer, 2)
    other = network()
    turned = torch.optim.SGD(halves(other)[::-1], lr=0.5)
    started.attempt(2, model=other, optimizer=turned)
    assert [group["lr"] for group in turned.param_groups] == [0.2, 0.1]


def test_another_scheduler_is_refused(started: Started) -> None:
    model = network()
    optimizer = adamw(model)
    scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    train(started.attempt(1, model=model, optimizer=optimizer, scheduler=scheduler), model, optimizer, 2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    with pytest.raises(
        ConfigError, match=r"scheduler is of another kind .*: CosineAnnealingLR, and there it is StepLR"
    ):
        started.attempt(2, model=model, optimizer=optimizer, scheduler=scheduler)


def test_the_global_batch_is_told_by_samplers_and_loaders_alone() -> None:
    """By it learning rates are scaled: ours tell the batch of all ranks, those of others that of one."""
    batches = ShuffledBatches(96, 12, rank=0, world_size=2)
    data = TensorDataset(torch.zeros(96))
    model = network()
    model.batch_size = 5
    for loader, size in (
        (batches, 12),
        (ResumableLoader(data, batches), 12),
        (StatefulDataLoader(data, batch_sampler=batches), 12),
        (StatefulDataLoader(data, batch_size=12), 24),
    ):
        assert TrainingState({"model": model, "loader": loader}, {}, 0, 2).batch_size() == size


# -- values -----------------------------------------------------------------------------------------------------------


def test_numpy_s_numbers_come_back_as_numbers_and_may_be_keys(started: Started) -> None:
    values = {
        "rate": numpy.float32(3.5),
        "on": numpy.bool_(True),
        "counts": {numpy.float64(0.5): 1},
        "empty": numpy.array(2.5),
    }
    run = started.attempt(1, model=network())
    run.state.update(values)
    for _ in run.steps(1):
        pass
    found = started.attempt(2, model=network()).state
    assert found == values
    assert [type(found[name]) for name in values] == [type(value) for value in values.values()]


def test_an_array_with_fields_is_refused_by_its_path(started: Started) -> None:
    run = started.attempt(1, model=network())
    run.state["pairs"] = numpy.zeros(3, dtype=[("left", "f4"), ("right", "i8")])
    with pytest.raises(ConfigError, match=r"user\.pairs is a NumPy array with fields"):
        next(iter(run.steps(1)))


def test_a_buffer_that_could_not_be_loaded_is_refused_before_it_is_saved(started: Started) -> None:
    model = network()
    model.register_buffer("scale", torch.ones(1).expand(5))
    with pytest.raises(ConfigError, match=r"model\.scale is an expanded tensor"):
        started.attempt(1, model=model)


def test_a_buffer_that_is_a_conjugate_is_filled_again(started: Started) -> None:
    def turned() -> nn.Module:
        model = network()
        model.register_buffer("phases", torch.tensor([1 + 2j, 3 - 4j]).conj())
        return model

    run = started.attempt(1, model=turned())
    for _ in run.steps(1):
        pass
    model = turned()
    model.phases.zero_()
    started.attempt(2, model=model)
    assert torch.equal(model.phases.resolve_conj(), torch.tensor([1 - 2j, 3 + 4j]))


@pytest.mark.parametrize(
    "changes",
    [
        {"objects": {"state.safetensors": {"size_bytes": 8, "blake3": "00"}}},
        {"objects": [1, 2]},
        {"format_version": "3.1"},
    ],
)
def test_a_newer_holdfast_s_checkpoint_is_left_alone_whatever_it_looks_like(
    changes: dict[str, Any], started: Started
) -> None:
    run = started.attempt(1, model=network())
    for _ in run.steps(1):
        pass
    key = next(info.key for info in started.store.list("") if info.key.endswith("manifest.json"))
    manifest = {**json.loads(started.store.get(key)), "format_version": 3, **changes}
    del manifest[CHECKSUM]
    manifest[CHECKSUM] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    started.store.put(key, json.dumps(manifest).encode())
    with pytest.raises(ConfigError, match=r"has format 3.*this Holdfast reads up to 2"):
        started.attempt(2, model=network())
    assert started.store.get(key)


def test_a_damaged_step_that_is_trained_again_in_the_same_attempt_is_written_anew(started: Started) -> None:
    """A gang's ranks are started again in one attempt, for example."""
    for steps in (2, 3):
        model = network()
        optimizer = adamw(model)
        train(started.attempt(1, model=model, optimizer=optimizer), model, optimizer, steps)
    end = {name: value.clone() for name, value in model.state_dict().items()}
    newest = f"runs/run/checkpoints/{CheckpointId(1, 3)}/"
    image = next(info.key for info in started.store.list(newest) if info.key.endswith(".safetensors"))
    data = bytearray(started.store.get(image))
    data[-1] ^= 1
    started.store.put(image, bytes(data))

    model = network()
    optimizer = adamw(model)
    run = started.attempt(1, model=model, optimizer=optimizer)
    assert run.resumed_step == 2
    train(run, model, optimizer, 3)
    started.checkpoints.verify(CheckpointId(1, 3), started.checkpoints.manifest(CheckpointId(1, 3)))
    assert all(torch.equal(end[name], value) for name, value in model.state_dict().items())


def test_what_contains_itself_is_refused_by_its_name(started: Started) -> None:
    run = started.attempt(1, model=network())
    run.state["me"] = run.state
    with pytest.raises(ConfigError, match="user contains itself"):
        next(iter(run.steps(1)))


def test_other_folders_beside_the_checkpoints_are_none(started: Started) -> None:
    for name in ("5", "1-2-3", "²-2"):
        started.store.put(f"runs/run/checkpoints/{name}/manifest.json", b"{}")
    model = network()
    optimizer = adamw(model)
    train(started.attempt(1, model=model, optimizer=optimizer), model, optimizer, 2)
    assert started.checkpoints.committed() == [CheckpointId(1, 2)]


# -- what is given to attach ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 100}, "every=100.*write '100 steps'"),
        ({"max_to_keep": 2.5}, "max_to_keep is 2.5; it must be a whole number"),
        ({"max_to_keep": "3"}, "max_to_keep is '3'; it must be a number above zero"),
        ({"directory": 3}, "directory=3.*must be the path of a folder"),
        ({"directory": __file__}, "that is a file; name the folder that it lies in"),
    ],
)
def test_what_attach_can_t_use_is_said_with_its_value(options: dict[str, Any], said: str, started: Started) -> None:
    with pytest.raises(ConfigError, match=said):
        started.attempt(1, model=network(), **options)


def test_what_the_loop_can_t_use_is_said_too(started: Started) -> None:
    run = started.attempt(1, model=network())
    with pytest.raises(ConfigError, match="total must be a whole number"):
        next(iter(run.steps(True)))
    with pytest.raises(ConfigError, match="it must be a dict"):
        run.state = None
    with pytest.raises(ConfigError, match="not a number"):
        run.report(loss=10**400)


# -- leaving the loop -------------------------------------------------------------------------------------------------


def slots_held() -> int:
    return sum("holdfast-snapshot" in os.readlink(one) for one in Path("/proc/self/fd").iterdir() if one.is_symlink())


def test_a_loop_that_is_left_frees_its_memory_and_finishes_what_it_has_begun(started: Started) -> None:
    def leave(number: int) -> None:
        model = network()
        optimizer = adamw(model)
        run = started.attempt(number, model=model, optimizer=optimizer, every="1 steps")
        for step in run.steps(9):
            optimizer.zero_grad()
            model(torch.ones(3, 6)).square().mean().backward()
            optimizer.step()
            if step == 4:
                break

    gc.collect()
    before, slots = set(psutil.Process().children()), slots_held()
    for number in range(1, 6):
        leave(number)
        gc.collect()
        assert slots_held() == slots
    _, alive = psutil.wait_procs(set(psutil.Process().children()) - before, timeout=30)
    assert not alive
    assert started.checkpoints.committed()[-1] == CheckpointId(1, 3)  # a step that was broken off is none


def test_a_file_of_the_program_s_does_not_stand_in_for_python_s_own(tmp_path: Path) -> None:
    """The persist process is started in the folder that the program runs in."""
    (tmp_path / "queue.py").write_text("raise SystemExit('not the queue you wanted')\n")
    program = tmp_path / "elsewhere" / "program.py"
    program.parent.mkdir()
    program.write_text("import holdfast\nrun = holdfast.attach()\nfor _ in run.steps(2):\n    run.state['a'] = 1\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROGRAMS.parent.parent / "src"),
        "HOLDFAST_STORE": (tmp_path / "store").as_uri(),
        "HOLDFAST_RUN": "run",
        "HOLDFAST_ATTEMPT": "1",
    }
    subprocess.run([sys.executable, str(program)], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert list((tmp_path / "store").rglob("manifest.json"))


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_behind_a_link_comes_back(started: Started, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    run = started.attempt(1, directory=link)
    for _ in run.steps(1):
        (link / "note").write_text("kept")
    (real / "note").write_text("lost")
    (real / "more").mkdir()
    started.attempt(2, directory=link)
    assert [(path.name, path.read_text()) for path in real.iterdir()] == [("note", "kept")] and link.is_symlink()


@pytest.mark.parametrize("name", ["a\nb", b"\xff.txt".decode("utf-8", "surrogateescape")])
def test_a_file_name_that_no_store_has_is_refused_at_once(name: str, started: Started, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / name).write_text("x")
    with pytest.raises(ConfigError, match=r"which no object of a store can be; rename it"):
        started.attempt(1, directory=tmp_path / "files")


def test_files_that_come_and_go_while_they_are_copied_stop_nothing(started: Started, tmp_path: Path) -> None:
    files, over = tmp_path / "files", threading.Event()
    files.mkdir()
    (files / "kept").write_text("kept")

    def come_and_go() -> None:
        while not over.is_set():
            (files / "log.tmp").write_text("x" * 1000)
            (files / "log.tmp").rename(files / "log")
            (files / "log").unlink()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in started.attempt(1, directory=files, every="1 steps").steps(200):
            pass
    finally:
        over.set()
        thread.join()
    assert started.checkpoints.committed()[-1] == CheckpointId(1, 200)


def test_files_that_can_t_be_copied_are_said_and_the_training_goes_on(started: Started, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "kept").write_text("kept")
    run = started.attempt(1, directory=files, every="5 steps")
    for step in run.steps(100):
        if step == 20:
            (files / "link").symlink_to(files / "kept")
        if step == 80:
            (files / "link").unlink()
    assert "is no plain file" in started.events(1, "commit-failed")[0]["error"]
    assert started.checkpoints.committed()[-1] == CheckpointId(1, 100)
