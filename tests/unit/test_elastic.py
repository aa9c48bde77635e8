"""What a changed number of ranks does to random numbers, learning rates and a torchdata loader."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from itertools import combinations, islice
from typing import Any

import numpy
import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from holdfast import ShuffledBatches
from holdfast.checkpoint.elastic import (
    learning_rate_factor,
    load_loader,
    rank_seed,
    reseed,
    scale_learning_rates,
)
from holdfast.checkpoint.tree import flatten, unflatten
from holdfast.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*scheduler")


# -- random numbers ---------------------------------------------------------------------------------------------------


def test_no_two_ranks_of_any_resume_share_a_seed() -> None:
    seeds = [rank_seed(7, step, rank, size) for step in range(50) for size in range(1, 9) for rank in range(size)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_rank_s_seed_never_changes_between_versions() -> None:
    assert rank_seed(seed=7, step=120, rank=1, world_size=2) == 4616825228563025299


def draws(generators: dict[str, Any]) -> list[float]:
    return [
        random.random(),
        float(numpy.random.rand()),
        torch.rand(()).item(),
        torch.rand((), generator=generators["torch"]).item(),
        generators["numpy"].random(),
    ]


def test_everything_that_draws_is_seeded_for_its_rank_alone() -> None:
    generators = {"torch": torch.Generator(), "numpy": numpy.random.default_rng(), "philox": philox()}
    drawn = []
    for rank in (0, 1, 2, 0):
        assert reseed(7, 120, rank, 3, generators) == rank_seed(7, 120, rank, 3)
        drawn.append(draws(generators))
    assert drawn[0] == drawn[3]
    assert all(a != b for one, other in combinations(drawn[:3], 2) for a, b in zip(one, other, strict=True))
    assert len(set(drawn[0])) == len(drawn[0])


def philox() -> Any:
    return numpy.random.Generator(numpy.random.Philox())


# -- learning rates ---------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7, 9]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=1e-2),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=1e-2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=40),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=0.02, factor=0.5),
    "SWALR": lambda o: SWALR(o, 0.05, anneal_epochs=9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=8), lr_scheduler.MultiStepLR(o, [2, 4])], [8]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=8), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}
EVERY_SCHEDULER = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def optimizer(lr: Any = 0.1) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": [torch.nn.Parameter(torch.ones(3))]}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def rates(optimizer: Any, scheduler: Any, steps: range) -> list[list[float]]:
    seen = []
    for step in steps:
        optimizer.step()
        is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*([1.0 + step] if is_plateau else []))  # a loss that only grows
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
    return seen


def test_no_scheduler_of_torch_is_left_out() -> None:
    assert set(SCHEDULERS) == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}


@EVERY_SCHEDULER
def test_every_scheduler_of_torch_goes_on_after_a_checkpoint(make: Callable[[Any], Any]) -> None:
    optimizers = [optimizer(), optimizer()]
    schedulers = [make(optimizer) for optimizer in optimizers]
    rates(optimizers[0], schedulers[0], range(5))
    for saved, restored in ((optimizers[0], optimizers[1]), (schedulers[0], schedulers[1])):
        restored.load_state_dict(through_a_checkpoint(saved.state_dict()))
    assert rates(optimizers[1], schedulers[1], range(5, 17)) == rates(optimizers[0], schedulers[0], range(5, 17))


@EVERY_SCHEDULER
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_every_rate_that_is_still_to_come_is_multiplied(make: Callable[[Any], Any], lr: Any) -> None:
    optimizers = [optimizer(lr if isinstance(lr, float) else lr.clone()) for _ in range(2)]
    schedulers = [make(optimizer) for optimizer in optimizers]
    for each, scheduler in zip(optimizers, schedulers, strict=True):
        rates(each, scheduler, range(5))
    assert scale_learning_rates("linear", 64, 32, [optimizers[1]], [schedulers[1]]) == 0.5
    assert list(map(float, schedulers[1].get_last_lr())) == [float(g["lr"]) for g in optimizers[1].param_groups]
    as_before, scaled = (rates(o, s, range(5, 17)) for o, s in zip(optimizers, schedulers, strict=True))
    assert numpy.array(scaled) == pytest.approx(numpy.array(as_before) / 2, rel=1e-5)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 0.25), ("sqrt", 0.5)])
def test_the_rule_makes_the_factor(rule: Any, factor: float, caplog: pytest.LogCaptureFixture) -> None:
    scaled = optimizer()
    with caplog.at_level(logging.WARNING):
        assert scale_learning_rates(rule, 64, 16, [scaled]) == factor
    assert [group["lr"] for group in scaled.param_groups] == [0.1 * factor] * 2
    said = [f"learning rate x {factor:g} ({rule}, global batch 64 -> 16): 0.1 -> {0.1 * factor:g}"]
    assert caplog.messages == ([] if factor == 1.0 else said)


@pytest.mark.parametrize(("rule", "old", "new"), [("cubic", 1, 2), ("linear", 0, 2), ("sqrt", 2, -1)])
def test_a_rule_or_a_batch_that_means_nothing_is_refused(rule: Any, old: int, new: int) -> None:
    with pytest.raises(ConfigError):
        learning_rate_factor(rule, old, new)


# -- torchdata --------------------------------------------------------------------------------------------------------

COUNT, BATCH = 23, 4


class Numbers(Dataset):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> int:
        return index


def stateful_loader(rank: int = 0, world_size: int = 1, workers: int = 0, every: int = 1) -> StatefulDataLoader:
    batches = ShuffledBatches(COUNT, BATCH, seed=1, rank=rank, world_size=world_size)
    return StatefulDataLoader(Numbers(), batch_sampler=batches, num_workers=workers, snapshot_every_n_steps=every)


def steady(first: int, count: int) -> list[list[int]]:
    return list(islice(ShuffledBatches(COUNT, BATCH, seed=1, rank=0, world_size=1), first, first + count))


def through_a_checkpoint(state: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}

    def take(path: str, leaf: Any) -> str:
        if isinstance(leaf, torch.Tensor):
            tensors[path] = leaf.clone()
        return path if isinstance(leaf, torch.Tensor) else ""

    return unflatten(json.loads(json.dumps(flatten(state, "loader", take), allow_nan=False)), tensors.__getitem__)


def interrupted(loader: StatefulDataLoader, delivered: int) -> Any:
    iterator = iter(loader)
    assert [next(iterator).tolist() for _ in range(delivered)] == steady(0, delivered)
    return through_a_checkpoint(loader.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("delivered", [0, 1, 5, 8])
def test_torchdata_goes_on_in_the_same_world_and_in_another(workers: int, every: int, delivered: int) -> None:
    state = interrupted(stateful_loader(workers=workers, every=every), delivered)
    same = stateful_loader(workers=workers, every=every)
    same.state_dict()  # as attach does, to say at once what can't be stored; it starts reading
    load_loader("loader", same, state, same_world=True)
    assert [batch.tolist() for batch in islice(same, 7)] == steady(delivered, 7)

    ranks = [stateful_loader(rank, 2, workers=1, every=every) for rank in range(2)]
    for rank in ranks:
        rank.state_dict()
        load_loader("loader", rank, state, same_world=False)
    shares = zip(*(islice(rank, 5) for rank in ranks), strict=True)
    assert [[index for share in pair for index in share.tolist()] for pair in shares] == steady(delivered, 5)


def test_torchdata_with_its_own_sampler_goes_on_in_the_same_world() -> None:
    def shuffled() -> StatefulDataLoader:
        torch.manual_seed(3)
        return StatefulDataLoader(Numbers(), batch_size=BATCH, shuffle=True, num_workers=2)

    first, second = shuffled(), shuffled()
    iterator = iter(first)
    next(iterator)
    second.load_state_dict(through_a_checkpoint(first.state_dict()))
    assert [batch.tolist() for batch in second] == [batch.tolist() for batch in iterator]


@pytest.mark.parametrize(("workers", "now"), [(2, 1), (0, 2), (2, 0)])
def test_torchdata_goes_on_with_another_number_of_workers(workers: int, now: int) -> None:
    loader = stateful_loader(workers=now)
    load_loader("loader", loader, interrupted(stateful_loader(workers=workers), 5), same_world=True)
    assert [batch.tolist() for batch in islice(loader, 7)] == steady(5, 7)


def test_torchdata_s_own_sampler_with_another_number_of_workers_is_refused() -> None:
    """torchdata itself stops at an assertion without words, when the loop begins."""
    saved, loader = (StatefulDataLoader(Numbers(), batch_size=BATCH, num_workers=workers) for workers in (2, 1))
    with pytest.raises(ConfigError, match=r"attach\(data=\.\.\.\).* saved with 2 workers, not 1,"):
        load_loader("data", loader, saved.state_dict(), same_world=True)


def test_a_batch_per_rank_goes_on_after_samples_that_no_snapshot_has() -> None:
    def with_fixed_batches(rank: int, world_size: int) -> StatefulDataLoader:
        batches = ShuffledBatches.per_rank(COUNT, 2, seed=1, rank=rank, world_size=world_size)
        return StatefulDataLoader(Numbers(), batch_sampler=batches, snapshot_every_n_steps=3, num_workers=1)

    two = with_fixed_batches(0, 2)
    list(islice(two, 4))  # 16 samples by both ranks, 12 of them in the snapshot
    one = with_fixed_batches(0, 1)
    load_loader("loader", one, through_a_checkpoint(two.state_dict()), same_world=False)
    order = [index for batch in steady(0, 6) for index in batch]
    assert next(iter(one)).tolist() == order[16:18]


@pytest.mark.parametrize(
    "make",
    [
        lambda: StatefulDataLoader(Numbers(), batch_size=BATCH, shuffle=True),
        lambda: StatefulDataLoader(
            Numbers(), batch_size=BATCH, sampler=StatefulDistributedSampler(Numbers(), num_replicas=2, rank=0)
        ),
        lambda: StatefulDistributedSampler(Numbers(), num_replicas=2, rank=0),
    ],
)
def test_a_position_of_one_rank_is_refused_in_another_world(make: Any) -> None:
    loader = make()
    with pytest.raises(ConfigError, match=r"attach\(data=\.\.\.\).*holdfast\.ShuffledBatches"):
        load_loader("data", loader, loader.state_dict(), same_world=False)


def test_whatever_else_has_a_state_gets_it() -> None:
    saved, restored = (ShuffledBatches(COUNT, BATCH, rank=0, world_size=1) for _ in range(2))
    saved.next()
    load_loader("batches", restored, saved.state_dict(), same_world=False)
    assert restored.next() == saved.next()
