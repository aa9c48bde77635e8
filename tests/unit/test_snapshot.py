"""Snapshots that overlap the next step are of one moment all the same, whatever the program does meanwhile."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from holdfast.checkpoint.image import read_places
from holdfast.checkpoint.slots import Slot
from holdfast.checkpoint.snapshot import Snapshot, Snapshots
from holdfast.checkpoint.state import TrainingState, names_in
from holdfast.checkpoint.tensors import dtypes


class Training:
    """A model, its optimizer, and snapshots of both; `seen` is what the last complete snapshot holds."""

    def __init__(self, model: torch.nn.Module, optimizer: Any = None, user: dict[str, Any] | None = None) -> None:
        self.model = model
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)
        self.offered: list[Snapshot] = []
        self.renewed: list[list[Slot]] = []
        components = {"model": model, "optimizer": self.optimizer}
        self.snapshots = Snapshots(
            TrainingState(components, user or {}), self.offered.append, lambda slots: self.renewed.append(slots)
        )

    def gradients(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 8)).sum().backward()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()

    def live(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": value.clone() for name, value in self.model.state_dict().items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                found[f"optimizer.state.model.{names[id(parameter)]}.{key}"] = value.clone()
        return found

    def seen(self) -> dict[str, torch.Tensor]:
        self.snapshots.settle()  # its copy is over when the optimizer goes on, its offer may come a moment later
        slot = self.offered[-1].slot
        assert slot.take() and slot.number == self.offered[-1].number
        data = bytes(slot.image())
        slot.give_back()
        return {
            name: torch.frombuffer(bytearray(data[place.start : place.stop] or b"\0"), dtype=torch.uint8)[
                : place.stop - place.start
            ]
            .view(dtypes()[place.spec.dtype])
            .reshape(place.spec.shape)
            for name, place in read_places(data, len(data)).items()
            if not name.startswith("random.")
        }

    def words(self) -> dict[str, Any]:
        slot = self.offered[-1].slot
        slot.take(wait=True)
        try:
            return dict(json.loads(slot.words()))
        finally:
            slot.give_back()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def wide() -> torch.nn.Module:
    """Large enough that its copy is left to the thread."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 4096), torch.nn.BatchNorm1d(4096).eval(), torch.nn.Linear(4096, 64))


@pytest.fixture
def training() -> Iterator[Training]:
    made = Training(wide())
    made.step()
    yield made
    made.snapshots.close()


def test_the_optimizer_waits_for_the_copy_and_forward_and_backward_do_not(training: Training) -> None:
    expected = training.live()
    snapshot = training.snapshots.take(1, {})
    assert snapshot
    training.gradients()
    training.optimizer.step()
    assert not training.snapshots.in_progress
    assert same(training.seen(), expected) and not same(training.live(), expected)


@pytest.mark.parametrize("round", range(5))
def test_every_snapshot_of_a_run_is_of_its_own_moment(training: Training, round: int) -> None:
    for step in range(1, 20):
        expected = training.live()
        assert training.snapshots.take(step, {})
        training.step()
        assert same(training.seen(), expected), step


def test_buffers_change_in_forward_and_are_copied_at_once() -> None:
    made = Training(torch.nn.Sequential(torch.nn.Linear(8, 4096), torch.nn.BatchNorm1d(4096)))
    made.gradients = lambda: (made.optimizer.zero_grad(), made.model(torch.randn(4, 8)).sum().backward())  # type: ignore
    made.step()
    expected = made.live()
    made.snapshots.take(1, {})
    made.step()
    assert same(made.seen(), expected)
    assert not torch.equal(made.live()["model.1.running_mean"], expected["model.1.running_mean"])


def test_a_program_that_changes_parameters_itself_is_found_out_by_their_version(training: Training) -> None:
    """Or it came too late to change the copy, which is of its own moment then."""
    training.snapshots.take(1, {})
    training.step()  # nobody touched them: from now on only versions are looked at
    torn = 0
    for step in range(2, 40):
        expected, number = training.live(), len(training.offered)
        training.snapshots.take(step, {})
        with torch.no_grad():
            training.model[0].weight.mul_(0.9)
        training.step()
        if training.snapshots.failure is None:
            assert training.offered[-1].step == step and same(training.seen(), expected)
            continue
        assert "outside the optimizer's step" in str(training.snapshots.failure)
        assert len(training.offered) == number
        torn, training.snapshots.failure = torn + 1, None
    assert torn <= 1  # from then on the training is held up, and nothing can be torn


def test_and_by_a_comparison_where_versions_say_nothing(training: Training) -> None:
    training.snapshots.take(1, {})
    training.offered.clear()
    with training.snapshots._progress:
        training.snapshots._progress.wait_for(
            lambda: training.snapshots._current.done
        )  # the copy is over, and what comes now is not in it
    training.model[0].weight.data.mul_(0.9)
    training.step()
    assert training.snapshots.failure is not None and training.offered == []


def test_a_snapshot_that_failed_gives_its_slot_back(training: Training) -> None:
    for step in range(1, 6):
        training.snapshots._overlap, training.snapshots._proven = True, False
        assert training.snapshots.take(step, {})
        with torch.no_grad():
            training.model[0].weight.add_(1)
        training.snapshots.hold(training.optimizer)
        assert training.snapshots.failure is not None
        training.snapshots.failure = None
    assert training.offered == []


def test_any_optimizer_s_step_waits_for_the_copy(training: Training) -> None:
    """One that was never attached changes the same parameters."""
    other = torch.optim.SGD(training.model.parameters(), lr=1.0)
    expected = training.live()
    training.snapshots.take(1, {})
    training.gradients()
    other.step()
    assert same(training.seen(), expected)


class Partly(torch.nn.Module):
    """Only the head takes part until the body is asked for; both belong to the optimizer, and are too large to be copied
    at a stroke.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.with_body = torch.nn.Linear(8, 4096), False
        self.body = torch.nn.ModuleList(torch.nn.Linear(4096, 512) for _ in range(6))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.head(inputs)
        return hidden.sum() + (sum(layer(hidden).sum() for layer in self.body) if self.with_body else 0)


@pytest.fixture
def partly() -> Iterator[Training]:
    """With moments of everything, and a first snapshot that nothing has disturbed."""
    made = Training(Partly())
    made.model.with_body = True
    made.step()
    made.model.with_body = False
    made.snapshots.take(1, {})
    made.step()
    made.snapshots.poll()
    yield made
    made.snapshots.close()


def while_copying(training: Training, step: int, act: Callable[[], Any]) -> list[Any]:
    """A snapshot, and `act` at a moment when its thread has not copied anything; the pairs that it had still to copy
    after that.
    """
    with training.snapshots._progress:  # the thread needs it to begin
        assert training.snapshots.take(step, {})
        pairs = list(training.snapshots._late)
        act()
        return [pair for pair in pairs if not pair.copied]


def test_an_optimizer_waits_for_what_it_changes_and_for_nothing_else(partly: Training) -> None:
    expected = partly.live()
    left = while_copying(partly, 2, partly.step)
    head = {parameter.data_ptr() for parameter in partly.model.head.parameters()}
    assert left and head.isdisjoint(pair.storage for pair in left)
    for _ in range(3):
        partly.step()
    assert same(partly.seen(), expected) and partly.snapshots.failure is None
    assert not same(partly.live(), expected)


def test_what_gets_a_gradient_meanwhile_is_copied_first(partly: Training) -> None:
    expected = partly.live()

    def step() -> None:
        partly.step()
        partly.model.with_body = True
        partly.step()

    assert while_copying(partly, 2, step) == []
    assert same(partly.seen(), expected) and partly.snapshots.failure is None


def test_what_an_optimizer_has_waited_for_is_not_copied_again(training: Training) -> None:
    """It comes while the thread is copying that very thing: a first copy into new memory takes long."""
    training.snapshots.take(1, {})
    training.step()
    for number in range(2, 40):
        more = torch.nn.Linear(64, 64)
        training.model.append(more)
        training.optimizer.add_param_group({"params": list(more.parameters())})
        training.step()
        expected = training.live()
        training.snapshots.take(number, {})
        training.step()
        assert same(training.seen(), expected) and training.snapshots.failure is None, number
    assert len(training.renewed) > 4


def test_two_optimizers_wait_each_for_its_own(partly: Training) -> None:
    body = torch.optim.SGD(partly.model.body.parameters(), lr=1.0)
    expected = partly.live()

    def step() -> None:
        partly.step()
        partly.model.with_body = True
        partly.gradients()
        body.step()

    while_copying(partly, 2, step)
    assert same(partly.seen(), expected) and partly.snapshots.failure is None


class Decaying(torch.optim.SGD):
    """Of another library: its step changes parameters without a gradient too."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)


@pytest.mark.parametrize("kind", ["of another library", "a closure", "a hook of the user's", "a later hook of all"])
def test_optimizers_that_may_change_anything_wait_for_everything(partly: Training, kind: str) -> None:
    expected = partly.live()

    def closure() -> torch.Tensor:
        partly.model.with_body = True
        partly.optimizer.zero_grad()
        loss: torch.Tensor = partly.model(torch.ones(1, 8)).sum()
        loss.backward()
        return loss

    def step() -> None:
        if kind == "a closure":
            partly.optimizer.step(closure)
        elif kind == "of another library":
            Decaying(partly.model.parameters(), lr=1.0).step()
        else:
            add = register_optimizer_step_pre_hook if "of all" in kind else partly.optimizer.register_step_pre_hook
            added = add(lambda *_: closure() and None)
            partly.optimizer.step()
            added.remove()

    assert while_copying(partly, 2, step) == []
    assert same(partly.seen(), expected) and partly.snapshots.failure is None
    assert not torch.equal(partly.model.body[0].weight, expected["model.body.0.weight"])


@pytest.mark.parametrize("micro_steps", [0, 2])
def test_a_moving_average_after_the_step_is_waited_for_once_it_was_seen(micro_steps: int) -> None:
    """Written through `.data`, which no version counts, into parameters that the optimizer knows of."""
    made = Training(Partly())
    made.model.with_body = True
    made.step()
    made.model.with_body = False

    def step() -> None:
        made.step()
        for layer in made.model.body:
            layer.weight.data.mul_(0.9)

    for number in range(1, 5):
        expected = made.live()
        while_copying(made, number, step if not micro_steps else made.gradients)
        if micro_steps:  # the loop goes around, and no optimizer comes
            made.snapshots.settle()
            for _ in range(micro_steps):
                made.gradients()
                made.snapshots.poll()
            step()
        made.snapshots.poll()
        assert not made.snapshots._selective
        assert same(made.seen(), expected) and made.snapshots.failure is None
    made.snapshots.close()


@pytest.mark.parametrize("change", ["counted", "through .data"])
def test_one_that_begins_later_is_found_out(partly: Training, change: str) -> None:
    def act() -> None:
        partly.step()
        with torch.no_grad():
            for layer in partly.model.body:
                (layer.weight if change == "counted" else layer.weight.data).mul_(0.9)

    number = len(partly.offered)
    while_copying(partly, 2, act)
    partly.snapshots.settle()
    assert "outside the optimizer's step" in str(partly.snapshots.failure) and len(partly.offered) == number
    partly.snapshots.failure = None
    expected = partly.live()
    while_copying(partly, 3, act)
    assert same(partly.seen(), expected) and partly.snapshots.failure is None


def test_a_torn_snapshot_stays_torn_when_its_failure_was_told_before_its_copy_is_over(partly: Training) -> None:
    told = []

    def act() -> None:
        partly.gradients()
        with torch.no_grad():
            partly.model.head.weight.mul_(0.9)
        partly.optimizer.step()  # waits for the head, and sees that it was changed
        told.append(partly.snapshots.failure)
        partly.snapshots.failure = None

    number = len(partly.offered)
    assert while_copying(partly, 2, act) and told[0] is not None
    partly.snapshots.settle()
    assert len(partly.offered) == number


def test_a_failure_is_told_once(partly: Training) -> None:
    """Though more of the snapshot turns out to be torn later."""

    def act() -> None:
        with torch.no_grad():
            partly.model.head.weight.mul_(0.9)
            partly.model.body[-1].weight.mul_(0.9)
        partly.step()
        assert partly.snapshots.failure is not None
        partly.snapshots.failure = None

    while_copying(partly, 2, act)
    partly.snapshots.settle()
    assert partly.snapshots.failure is None


def test_a_copy_that_can_t_be_begun_leaves_no_one_waiting(partly: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            partly.snapshots.take(2, {})
    partly.step()
    expected = partly.live()
    assert partly.snapshots.take(3, {})
    partly.step()
    assert same(partly.seen(), expected) and partly.offered[-1].step == 3


class Listing(torch.optim.SGD):
    """Its state is no dict."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state.setdefault(parameter, [torch.zeros_like(parameter)])
                kept[0] += 1
                parameter -= kept[0]


def test_state_that_is_no_dict_is_copied_at_once() -> None:
    model = wide()
    made = Training(model, Listing(model.parameters(), lr=1.0))
    made.step()
    for number in range(1, 4):
        weight, kept = model[0].weight.clone(), made.optimizer.state[model[0].weight][0].clone()
        made.snapshots.take(number, {})
        made.step()
        seen = made.seen()
        assert torch.equal(seen["model.0.weight"], weight) and made.snapshots.failure is None
        assert any(torch.equal(value, kept) for name, value in seen.items() if name.startswith("optimizer."))
    made.snapshots.close()


def test_an_optimizer_of_sparse_parameters_steps_meanwhile(partly: Training) -> None:
    sparse = torch.nn.Parameter(torch.eye(3).to_sparse())
    sparse.grad = torch.eye(3).to_sparse()
    expected = partly.live()
    while_copying(partly, 2, torch.optim.SGD([sparse], lr=1.0).step)
    assert same(partly.seen(), expected) and partly.snapshots.failure is None


def test_what_lies_in_the_same_memory_is_waited_for_too() -> None:
    """All parameters are views of one flat tensor, as some libraries have it."""
    made = Training(Partly())
    flat = torch.zeros(sum(parameter.numel() for parameter in made.model.parameters()))
    place = 0
    for parameter in made.model.parameters():
        parameter.data = flat[place : place + parameter.numel()].view(parameter.shape).copy_(parameter.data)
        place += parameter.numel()
    made.model.with_body = True
    made.step()
    made.model.with_body = False
    made.snapshots.take(1, {})
    made.step()
    made.snapshots.poll()
    weights = {parameter.data_ptr() for parameter in made.model.body.parameters()}
    left = while_copying(made, 2, made.step)
    assert weights.isdisjoint(pair.source.data_ptr() for pair in left)
    made.snapshots.close()


def test_the_time_of_a_copy_is_known_though_nobody_waits_for_it(partly: Training) -> None:
    """A notice's plan needs it: then somebody does."""

    def act() -> None:
        partly.step()
        partly.snapshots._progress.wait(0.2)

    while_copying(partly, 2, act)
    partly.seen()
    last = partly.offered[-1]
    assert last.copy_seconds > last.hold_seconds > 0


def test_without_an_optimizer_the_training_is_held_up() -> None:
    weights = torch.zeros(100_000)
    offered: list[Snapshot] = []
    snapshots = Snapshots(TrainingState({}, {"weights": weights}), offered.append, lambda slots: None)
    snapshots.take(1, {})
    assert len(offered) == 1 and not snapshots.in_progress


def test_a_state_that_changes_its_shape_gets_other_slots(training: Training) -> None:
    training.snapshots.take(1, {})
    training.step()
    more = torch.nn.Linear(64, 2048)
    training.model.append(more)
    training.optimizer.add_param_group({"params": list(more.parameters())})
    training.step()
    expected = training.live()
    training.snapshots.take(2, {})
    training.step()
    assert same(training.seen(), expected)
    assert len(training.renewed) == 2 and all(slot.closed for slot in training.renewed[0])


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(64, 8), "head": torch.nn.Linear(8, 64, bias=False)})
    model["head"].weight = model["embed"].weight
    state = TrainingState({"model": model}, {"same": model["embed"].weight.detach()})
    collected = state.collect()
    assert [name for name in collected.leaves if not name.startswith("random")] == ["model.embed.weight", "user.same"]
    tree = collected.tree["components"]["model"]
    assert tree["embed.weight"] == tree["head.weight"] == {"$tensor": "model.embed.weight"}
    assert set(names_in(collected.tree["components"])) == {"model.embed.weight"}


def test_views_that_overlap_are_stored_as_what_they_show() -> None:
    base = torch.arange(10.0)
    user = {"all": base, "tail": base[4:], "steps": base[::2], "turned": base.view(2, 5).T}
    offered: list[Snapshot] = []
    Snapshots(TrainingState({}, user), offered.append, lambda slots: None).take(1, {})
    slot = offered[0].slot
    slot.take()
    data = bytes(slot.image())
    for name, place in read_places(data, len(data)).items():
        if name.startswith("user."):
            shown = torch.frombuffer(bytearray(data[place.start : place.stop]), dtype=torch.float32)
            assert torch.equal(shown.reshape(place.spec.shape), user[name.removeprefix("user.")])


def test_a_parameter_that_is_no_number_is_like_itself(training: Training) -> None:
    with torch.no_grad():
        training.model[2].bias.fill_(float("nan"))
    training.snapshots.take(1, {})
    training.step()
    assert training.snapshots.failure is None and len(training.offered) == 1


def test_words_of_any_length_are_kept(training: Training) -> None:
    for count in (10, 100_000):
        training.snapshots.take(1, {"metrics": [[step, {"loss": 0.5}] for step in range(count)]})
        training.step()
        assert len(training.words()["metrics"]) == count


def test_a_slot_that_is_being_made_durable_is_left_alone(training: Training) -> None:
    training.snapshots.take(1, {})
    training.step()
    slot = training.offered[0].slot
    theirs = Slot(os.dup(slot.fileno()), slot.capacity_bytes)
    assert theirs.take()
    before = bytes(theirs.memory)
    for step in range(2, 5):
        training.snapshots.take(step, {})
        training.step()
        assert training.offered[-1].slot is not slot
    assert bytes(theirs.memory) == before
    threading.Timer(0.1, theirs.give_back).start()
    other = training.offered[-1].slot
    held = Slot(os.dup(other.fileno()), other.capacity_bytes)
    assert held.take()
    assert training.snapshots.take(5, {}) is None
    assert training.snapshots.take(5, {}, wait=True)


def test_snapshots_that_are_forgotten_leave_no_files_open() -> None:
    def one() -> None:
        made = Training(wide())
        made.step()
        made.snapshots.take(1, {})
        made.step()
        made.snapshots.close()

    one()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        one()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
