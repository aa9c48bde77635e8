"""An optimizer's step waits until what it changes is copied, and for nothing else; what changes otherwise is found out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.unit.snapshot_training import Training, same, wide


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
    proved(made)
    yield made
    made.snapshots.close()


def proved(training: Training) -> None:
    training.model.with_body = True
    training.step()
    training.model.with_body = False
    training.snapshots.take(1, {})
    training.step()
    training.snapshots.poll()


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
    proved(made)
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
