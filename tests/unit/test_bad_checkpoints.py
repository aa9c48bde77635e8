"""States that can't be saved, checkpoints that don't fit, and damage anywhere: said by name, and nothing is lost by it."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from holdfast.checkpoint.commits import PIECE_BYTES, CheckpointId, Checkpoints
from holdfast.checkpoint.loading import StateContent
from holdfast.checkpoint.persister import Offer, Orders, Persister, Ranks
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.checkpoint.reader import read_metrics
from holdfast.checkpoint.reporting import Reporter, Surroundings
from holdfast.checkpoint.slots import Slot
from holdfast.checkpoint.snapshot import Snapshot, Snapshots
from holdfast.checkpoint.state import TrainingState, names_in
from holdfast.errors import ConfigError, DamagedCheckpointError
from holdfast.runtime import contract
from holdfast.storage import DirectoryStore
from tests.unit.started import Started, adamw, network, step, train

LONG = 30.0
NOBODY = Surroundings(
    store_url="", run_id="run", attempt=1, policy=CheckpointPolicy(), telemetry=None, notice=None, console=None
)


# -- what can't be saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Linear(3, 2, device="meta"), r"model\.weight is on the meta device"),
        (lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta")), r"model\.1\.weight is on the meta"),
        (lambda: nn.LazyLinear(2), r"model\.weight has no shape yet"),
    ],
)
def test_a_model_that_is_not_there_yet_is_refused_at_once(
    model: Callable[[], nn.Module], said: str, started: Started
) -> None:
    with pytest.raises(ConfigError, match=said):
        started.attempt(1, model=model())


class Strange:
    """Some library's scheduler."""

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": {"curve": [0.1, lambda step: step]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never saved")


def test_what_no_checkpoint_can_hold_is_named_before_the_first_step(started: Started) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.schedule\.curve\.1 is a builtins\.function"):
        started.attempt(1, scheduler=Strange())
    run = started.attempt(2, model=network())
    run.state["seen"] = {"files": [Path("a")]}
    with pytest.raises(ConfigError, match=r"user\.seen\.files\.0 is a pathlib\.PosixPath"):
        next(iter(run.steps(3)))


def test_it_is_named_too_when_it_comes_later(started: Started) -> None:
    model = network()
    run = started.attempt(1, model=model, every="2 steps")
    with pytest.raises(ConfigError, match=r"user\.lock is a _thread\.lock"):
        for number in run.steps(5):
            if number == 2:
                run.state["lock"] = threading.Lock()


def test_views_of_one_memory_that_show_other_numbers_stay_apart(started: Started) -> None:
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    run = started.attempt(1, model=network())
    run.state.update(
        plain=numbers, turned=numbers.conj(), negative=numbers.conj().imag, imaginary=numbers.imag, tail=numbers[1:]
    )
    for _ in run.steps(1):
        pass
    again = started.attempt(2, model=network())
    for name, value in run.state.items():
        assert torch.equal(again.state[name], value.resolve_conj().resolve_neg()), name


# -- what doesn't fit -------------------------------------------------------------------------------------------------


def test_a_state_that_grows_between_saves_is_saved_as_it_is(started: Started) -> None:
    model = network()
    optimizer = adamw(model)
    run = started.attempt(1, model=model, optimizer=optimizer, every="1 steps", max_to_keep=9)
    for number in run.steps(4):
        if number == 3:
            model.append(nn.Linear(2, 300))
            optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 0.5})
        step(model, optimizer)

    with pytest.raises(ConfigError, match=r"model does not fit the program's: the program lacks 3\.bias, 3\.weight$"):
        started.attempt(2, model=network(), optimizer=adamw(network()))
    grown = network()
    grown.append(nn.Linear(2, 300))
    other = torch.optim.AdamW([{"params": grown[:3].parameters()}, {"params": grown[3].parameters()}], lr=0.1)
    resumed = started.attempt(2, model=grown, optimizer=other)
    assert resumed.resumed_step == 4
    assert [group["lr"] for group in other.param_groups] == [0.01, 0.5]
    for name, value in model.state_dict().items():
        assert torch.equal(grown.state_dict()[name], value), name
    for old, new in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def without_bias() -> nn.Module:
    model = network()
    model[2].bias = None
    return model


def with_more() -> nn.Module:
    return network().append(nn.LayerNorm(2))


def of_integers() -> nn.Module:
    model = network()
    del model[0].bias
    model[0].register_buffer("bias", torch.zeros(8, dtype=torch.int32))
    return model


def tied() -> nn.Module:
    model = network()
    model[0].bias = nn.Parameter(torch.zeros(8))
    model.register_parameter("copy", model[0].bias)
    return model


def same(model: nn.Module) -> Any:
    return {"model": model, "optimizer": adamw(model)}


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (lambda: same(without_bias()), r"checkpoint's model does not fit the program's: the program lacks 2\.bias$"),
        (lambda: same(with_more()), r"the checkpoint lacks 3\.bias, 3\.weight$"),
        (
            lambda: same(network(9)),
            r"0\.weight has shape \[8, 6\] in the checkpoint and \[9, 6\] in the program; 0\.bias has shape \[8\] in the "
            r"checkpoint and \[9\] in the program; 2\.weight has shape \[2, 8\] in the checkpoint and \[2, 9\]",
        ),
        (lambda: same(of_integers()), r"0\.bias is F32 in the checkpoint and I32 in the program"),
        (lambda: {"model": network()}, r"the checkpoint holds \['model', 'optimizer'\], but .* given \['model'\]"),
        (
            lambda: (lambda model: {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})(
                network()
            ),
            r"optimizer is of another kind than the checkpoint's: SGD, and there it is AdamW; use the same, or another run id",
        ),
        (
            lambda: (lambda model: {"model": model, "optimizer": adamw(model[0])})(network()),
            r"optimizer has other parameters than the checkpoint's: the program lacks model\.2\.bias, model\.2\.weight",
        ),
    ],
)
def test_another_architecture_is_refused_with_what_differs(
    program: Callable[[], dict[str, Any]], said: str, started: Started
) -> None:
    model = network()
    optimizer = adamw(model)
    train(started.attempt(1, model=model, optimizer=optimizer), model, optimizer, 1)
    before = started.store.list("")
    with pytest.raises(ConfigError, match=said):
        started.attempt(2, **program())
    assert started.store.list("") == before


def test_two_tensors_of_the_checkpoint_don_t_become_one(started: Started) -> None:
    model = tied()
    model.copy = nn.Parameter(torch.ones(8))
    train(started.attempt(1, model=model), model, adamw(model), 1)
    with pytest.raises(ConfigError, match=r"copy and 0\.bias are one tensor in the program and two in the checkpoint"):
        started.attempt(2, model=tied())


def test_one_tensor_of_the_checkpoint_may_become_two(started: Started) -> None:
    model = tied()
    train(started.attempt(1, model=model), model, adamw(model), 1)
    apart = tied()
    apart.copy = nn.Parameter(torch.ones(8))
    started.attempt(2, model=apart)
    assert torch.equal(apart.copy, model[0].bias) and torch.equal(apart[0].bias, model[0].bias)


def test_another_precision_is_converted_and_said(started: Started, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = adamw(model)
    train(started.attempt(1, model=model, optimizer=optimizer), model, optimizer)
    half = network().to(torch.bfloat16)
    started.attempt(2, model=half, optimizer=adamw(half))
    assert torch.equal(half[0].weight, model[0].weight.to(torch.bfloat16))
    assert (
        "the checkpoint's model is converted: 0.weight is F32 in the checkpoint and BF16 in the program" in caplog.text
    )


def test_a_checkpoint_of_a_newer_version_is_refused_and_left_alone(started: Started) -> None:
    model = network()
    train(started.attempt(1, model=model), model, adamw(model))
    key = f"{contract.checkpoint_prefix('run')}0002-{9:012d}/manifest.json"
    started.store.put(key, b'{"format_version": 99, "objects": {}}')
    with pytest.raises(ConfigError, match=r"checkpoint 0002-000000000009 of run 'run' has format 99"):
        started.attempt(3, model=network())
    assert started.store.list(key)


# -- damage -----------------------------------------------------------------------------------------------------------


class State:
    """17 MB, so that an image has two pieces, of one process or of two ranks; all numbers are those of its step."""

    NAMES = ("model", "optimizer")

    def __init__(self) -> None:
        self.model = nn.ModuleDict({"large": nn.Linear(1200, 1200), "small": nn.Linear(3, 2)})
        self.optimizer = adamw(self.model)
        self.user: dict[str, Any] = {"text": "", "list": [], "own": torch.zeros(5)}

    def at(self, step: int) -> State:
        for parameter in self.model.parameters():
            parameter.data = torch.full_like(parameter, float(step))
            parameter.grad = torch.full_like(parameter, 1.0)
        self.optimizer.step()
        self.user |= {"text": f"step {step}", "list": [step, (step, None)], "own": torch.full((5,), step)}
        return self

    def training(self, rank: int, world_size: int) -> TrainingState:
        return TrainingState({"model": self.model, "optimizer": self.optimizer}, self.user, rank, world_size)

    def everything(self) -> list[Any]:
        """To compare; the same before and after a load."""
        tensors = [*self.model.state_dict().values(), self.user["own"]]
        tensors += [value for values in self.optimizer.state_dict()["state"].values() for value in values.values()]
        return [*(tensor.numpy().tobytes() for tensor in tensors), self.user["text"], self.user["list"]]


def save(store: DirectoryStore, step: int, world_size: int) -> None:
    """By the code of the persist process, a thread for every rank."""
    state = State().at(step)

    def save_one(rank: int) -> None:
        persister = Persister(
            store=store, run_id="run", attempt=1, reporter=Reporter(NOBODY), speed=1.0, tell=lambda message: None,
            orders=Orders(Ranks(rank=rank, world_size=world_size, token="token"), 9, "off", LONG),
        )  # fmt: skip

        def offer(snapshot: Snapshot) -> None:
            slot = Slot(os.dup(snapshot.slot.fileno()), snapshot.slot.capacity_bytes)
            persister.offer(Offer(snapshot.number, slot, snapshot.step, snapshot.began, 0.0))

        snapshots = Snapshots(state.training(rank, world_size), offer, lambda slots: None)
        snapshots.take(step, {"run": "run"})
        snapshots.close()
        persister.orphan()
        persister.work()

    threads = [threading.Thread(target=save_one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def resume(store: DirectoryStore) -> tuple[int, list[Any], list[str]]:
    """As `attach` does: the step, the state, and what was said of damage."""
    checkpoints, complaints, state = Checkpoints(store, "run"), [], State().at(0)

    def use(checkpoint: CheckpointId, manifest: dict[str, Any]) -> int:
        content = StateContent(checkpoints, checkpoint, manifest)
        tree, training = content.trees[0], state.training(0, content.world_size)
        names = list(dict.fromkeys(names_in([tree[part] for part in ("components", "user", "random")])))
        places = training.places(tree, {name: stored.spec for name, stored in content.tensors.items()})
        tensors = content.read(places, names)
        training.load(tree, tensors.__getitem__, manifest, content.world_size)
        return checkpoint.step

    step = checkpoints.newest_valid(use, lambda checkpoint, error: complaints.append(f"{checkpoint}: {error}"))
    return step, state.everything(), complaints


@pytest.fixture(scope="module", params=[1, 2], ids=["one-rank", "two-ranks"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(store with the steps 10 and 20, what each is)"""
    store = DirectoryStore(tmp_path_factory.mktemp("saved"))
    torch.manual_seed(1)
    for number in (10, 20):
        save(store, number, request.param)
    assert len(store.list("")) == 2 * (3 if request.param == 1 else 7)
    return store, {step: State().at(step).everything() for step in (10, 20)}


def flip(data: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def tear_out(data: bytearray, draw: random.Random) -> None:
    """A block is zeros, as after a power cut."""
    start = draw.randrange(len(data))
    data[start : start + 512] = bytes(len(data[start : start + 512]))


def append(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.randint(1, 5000))


def delete(data: bytearray, draw: random.Random) -> None:
    data.clear()


@pytest.mark.parametrize("damage", [flip, truncate, tear_out, append, delete], ids=lambda damage: damage.__name__)
def test_whatever_is_damaged_the_resume_is_exactly_one_of_the_two(saved: Any, damage: Any) -> None:
    """The newest where nothing is wrong that it needs, else the one before; and the damage is named."""
    store, states = saved
    newest = f"{contract.checkpoint_prefix('run')}0001-{20:012d}/"
    draw = random.Random(5)
    for key in [info.key for info in store.list(newest)]:
        name, whole = key.removeprefix(newest), store.get(key)
        for _ in range(1 if damage is delete else 3):
            data = bytearray(whole)
            damage(data, draw)
            store.delete(key) if damage is delete else store.put(key, bytes(data))
            try:
                step, state, complaints = resume(store)
            finally:
                store.put(key, whole)
            assert state == states[step], (name, step)
            if name.endswith(".part") or bytes(data) == whole or (damage is append and name.endswith(".safetensors")):
                assert (step, complaints) == (20, []), name
            elif name == "manifest.json" and not complaints:
                assert damage is delete or step == 20  # without a manifest it is none; or it says the same as before
            else:
                assert step == 10, name
                (said,) = complaints
                assert said.startswith(f"0001-{20:012d}: 0001-{20:012d}/{name}"), said
                if name.endswith(".safetensors") and damage in (flip, truncate):
                    assert "(piece " in said


def test_the_piece_that_is_named_is_the_damaged_one(saved: Any) -> None:
    store, _ = saved
    newest = f"{contract.checkpoint_prefix('run')}0001-{20:012d}/"
    for key in [info.key for info in store.list(newest) if info.size_bytes > PIECE_BYTES]:
        whole = store.get(key)
        for number in range(-(-len(whole) // PIECE_BYTES)):
            data = bytearray(whole)
            data[number * PIECE_BYTES + 5000] ^= 1
            store.put(key, bytes(data))
            with pytest.raises(DamagedCheckpointError, match=rf"bytes {number * PIECE_BYTES} to .* \(piece {number}\)"):
                checkpoints = Checkpoints(store, "run")
                checkpoints.verify(CheckpointId(1, 20), checkpoints.manifest(CheckpointId(1, 20)))
        store.put(key, whole)


# -- two processes, and a bad day of the store ------------------------------------------------------------------------


def test_what_a_killed_process_left_half_written_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield b"half"
        begun.set()
        go_on.wait(LONG)

    def killed_midway() -> Iterator[bytes]:
        yield b"half"
        os.kill(os.getpid(), signal.SIGKILL)

    killed = multiprocessing.get_context("fork").Process(target=lambda: store.put("killed", killed_midway()))
    killed.start()
    killed.join()
    writer = threading.Thread(target=lambda: store.put("alive", slowly()))
    writer.start()
    assert begun.wait(LONG)
    staged = {path.name.split(".")[0]: path for path in tmp_path.iterdir()}
    assert set(staged) == {"killed", "alive"}
    assert store.list("") == [] and all(path.exists() for path in staged.values())  # it might only be slow
    for path in staged.values():
        os.utime(path, (time.time() - 600, time.time() - 600))
    assert store.list("") == []
    assert not staged["killed"].exists() and staged["alive"].exists()
    go_on.set()
    writer.join()
    assert store.get("alive") == b"half"


def test_an_attempt_that_was_replaced_stops_and_changes_nothing(started: Started) -> None:
    old, new = network(), network()
    zombie = started.attempt(1, model=old, optimizer=adamw(old), every="1 steps")
    loop = iter(zombie.steps(100))
    next(loop), next(loop)
    assert zombie._committer.wait(1, LONG)
    optimizer = adamw(new)
    run = started.attempt(2, model=new, optimizer=optimizer)
    assert run.resumed_step == 1
    train(run, new, optimizer, 3)
    before = [info for info in started.store.list(contract.checkpoint_prefix("run"))]
    with pytest.raises(SystemExit) as left:
        for _ in loop:
            step(old, optimizer)
            time.sleep(0.05)
    assert left.value.code == contract.EXIT_PREEMPTED_UNCOMMITTED
    assert started.store.list(contract.checkpoint_prefix("run")) == before
    assert started.checkpoints.committed()[-1] == CheckpointId(2, 3)


def test_saves_to_a_disk_that_is_full_fail_by_name_and_succeed_when_it_has_room_again(started: Started) -> None:
    """No file of the persist process may become larger than a limit: to it that is the same as a full disk."""
    model = nn.Linear(6, 40_000)
    optimizer = adamw(model)
    run = started.attempt(1, model=model, optimizer=optimizer, every="1 steps")
    persisting = run._committer._process.pid
    resource.prlimit(persisting, resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    until, failures = time.monotonic() + LONG, []
    for number in run.steps(1_000_000):
        step(model, optimizer)
        if number >= 5 and not failures and (failures := started.events(1, "commit-failed")):
            assert started.checkpoints.committed() == []
            resource.prlimit(persisting, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if failures and started.checkpoints.committed():
            run.stop()
        assert time.monotonic() < until
        time.sleep(0.01)
    assert "state.safetensors: [Errno 27] File too large" in failures[0]["error"]
    newest = started.checkpoints.committed()[-1]
    assert newest.step == number and run._committer._process.pid == persisting
    started.checkpoints.verify(newest, started.checkpoints.manifest(newest))


def test_a_store_that_can_t_be_written_from_the_start_is_told_and_training_goes_on(started: Started) -> None:
    """It may be for a moment only: nothing is known that another try could not change."""
    started.store.root.write_text("in the way of the store's folder")
    model = network()
    optimizer = adamw(model)
    run = started.attempt(1, model=model, optimizer=optimizer, every="1 steps")
    for number in run.steps(1_000_000):
        step(model, optimizer)
        if number == 5:
            assert run._committer.committed_step <= 0
        if number >= 5 and started.events(1, "commit-failed") and started.store.root.is_file():
            started.store.root.unlink()
        if run._committer.committed_step > 0:
            run.stop()
        time.sleep(0.01)
    assert "Not a directory" in started.events(1, "commit-failed")[0]["error"]
    assert started.checkpoints.committed()[-1].step == number


def test_two_programs_of_one_attempt_damage_nothing_of_each_other_s(started: Started) -> None:
    """A program that was started twice by mistake. Of each step, the first to commit it wins."""
    models = [network(), network()]
    with torch.no_grad():
        models[1][0].weight.add_(1.0)
    optimizers = [adamw(model) for model in models]
    runs = [
        started.attempt(1, model=models[number], optimizer=optimizers[number], every="1 steps") for number in (0, 1)
    ]
    ends: list[dict[int, list[torch.Tensor]]] = [{}, {}]
    loops = [iter(run.steps(12)) for run in runs]
    for both in zip(*loops, strict=True):
        assert both[0] == both[1]
        for number in (0, 1):
            step(models[number], optimizers[number])
            ends[number][both[0]] = [value.clone() for value in models[number].state_dict().values()]
    there = started.checkpoints.committed()
    assert there[-1] == CheckpointId(1, 12) and len(there) >= 3
    for checkpoint in there:
        manifest = started.checkpoints.manifest(checkpoint)
        started.checkpoints.verify(checkpoint, manifest)
        held = StateContent(started.checkpoints, checkpoint, manifest).read({})
        values = [held[f"model.{name}"] for name in models[0].state_dict()]
        assert any(
            all(torch.equal(one, other) for one, other in zip(values, end[checkpoint.step], strict=True))
            for end in ends
        )


def limited_to_more(megabytes: int) -> Any:
    """Address space, from what is in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize() + megabytes * 2**20, resource.RLIM_INFINITY


def test_where_memory_is_short_one_snapshot_at_a_time_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    offered: list[Snapshot] = []
    training = TrainingState({}, {"weights": torch.zeros(100, 2**18)})
    slots: list[Slot] = []
    snapshots = Snapshots(training, offered.append, slots.extend)
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, limited_to_more(60))
    try:
        with pytest.raises(ConfigError, match=r"there are no 105 MB of shared memory .* with so little memory"):
            snapshots.take(1, {})
        resource.setrlimit(resource.RLIMIT_AS, limited_to_more(160))
        assert snapshots.take(2, {})
        assert len(slots) == 1 and "only one snapshot at a time" in caplog.text
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    snapshots.close()
    assert offered[0].slot.take() and offered[0].slot.number == offered[0].number


def test_a_file_of_the_user_s_that_is_called_like_a_manifest_makes_no_checkpoint(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put(f"{contract.checkpoint_prefix('run')}0001-{10:012d}/files/manifest.json", b"{}")
    assert Checkpoints(store, "run").committed() == []


def test_what_an_attempt_said_of_steps_that_were_never_committed_is_no_part_of_the_losses(tmp_path: Path) -> None:
    """Its machine was killed between the metrics and the manifest, and the next attempt stopped early."""
    store = DirectoryStore(tmp_path)
    for attempt, steps in ((1, (1, 2)), (1, (3, 4, 5)), (2, (3,))):
        lines = [json.dumps({"step": one, "attempt": attempt, "metrics": {"loss": attempt}}) for one in steps]
        name = f"{CheckpointId(attempt, steps[-1])}.jsonl"
        store.put(contract.metrics_prefix("run") + name, "\n".join(lines).encode())
    assert read_metrics(store, "run") == {1: {"loss": 1}, 2: {"loss": 1}, 3: {"loss": 2}}
