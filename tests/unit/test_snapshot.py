"""Snapshots that overlap the next step are of one moment all the same, whatever the program does meanwhile."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from holdfast.checkpoint.image import read_places
from holdfast.checkpoint.slots import Slot
from holdfast.checkpoint.snapshot import Snapshot, Snapshots
from holdfast.checkpoint.state import TrainingState, names_in
from tests.unit.snapshot_training import Training, same, wide


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


@pytest.mark.parametrize("round", range(5))
def test_what_is_written_from_the_first_step_on_is_found_out_however_early_it_comes(round: int) -> None:
    """Before the copy could have reached it, had the program gone on during the first one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8 if n == 0 else 1000, 1000) for n in range(4)))
    training = Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    training.step()
    for step in range(1, 4):
        before = training.live()
        assert training.snapshots.take(step, {})
        model[3].weight.detach().numpy()[300] = step  # not where samples are taken
        training.step()
        if training.snapshots.failure is None:
            seen = training.seen()
            assert all(torch.equal(seen[name].view_as(value), value) for name, value in before.items())
        elif step > 1:
            raise AssertionError("from the second step on, the training is held up")
        training.snapshots.failure = None


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

    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    one()
    before = open_files()
    for _ in range(3):
        one()
    give_up_at = time.monotonic() + 20  # a thread that still touches the memory holds it
    while open_files() > before and time.monotonic() < give_up_at:
        time.sleep(0.05)
    assert open_files() <= before
