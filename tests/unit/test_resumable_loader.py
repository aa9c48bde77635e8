"""A DataLoader goes on after the last batch that the loop got, whatever its workers had read ahead."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from holdfast import ResumableLoader, ShuffledBatches
from holdfast.errors import ConfigError

COUNT, BATCH = 23, 4


class Numbers(Dataset):
    """Sample i is i."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> int:
        return index


class Augmented(Numbers):
    """Sample i is i and the numbers that augmentation would draw for it."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([index, random.random(), numpy.random.rand(), torch.rand(()).item()], dtype=torch.float64)


class AugmentedAtOnce(Augmented):
    """As datasets do that fetch a whole batch."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def loader(rank: int = 0, world_size: int = 1, dataset: Any = None, **options: Any) -> ResumableLoader:
    batches = ShuffledBatches(COUNT, BATCH, seed=1, rank=rank, world_size=world_size)
    return ResumableLoader(dataset or Numbers(), batches, **options)


def steady(batches: int) -> list[list[int]]:
    return list(islice(ShuffledBatches(COUNT, BATCH, seed=1, rank=0, world_size=1), batches))


def resumed(saved: ResumableLoader, **options: Any) -> ResumableLoader:
    restored = loader(**options)
    restored.load_state_dict(saved.state_dict())
    return restored


def numbers(batches: Iterator[Any], count: int) -> list[list[int]]:
    return [batch.tolist() for batch in islice(batches, count)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("delivered", [0, 1, 3, 6, 9])
def test_it_goes_on_after_the_last_batch_that_the_loop_got(workers: int, delivered: int) -> None:
    first = loader(num_workers=workers)
    before = first.endless()
    assert numbers(before, delivered) == steady(delivered)
    after = resumed(first, num_workers=workers).endless()
    assert numbers(after, 8) == steady(delivered + 8)[delivered:]


@settings(max_examples=8, deadline=None)
@given(interruptions=st.lists(st.integers(0, 3), min_size=3, max_size=3), workers=st.integers(0, 2))
def test_workers_in_4_ranks_then_2_then_1_then_3_deliver_an_epoch_once_and_in_order(
    interruptions: list[int], workers: int
) -> None:
    state, seen, whole = loader().state_dict(), [], steady(6)
    for world_size, steps in zip((4, 2, 1, 3), [*interruptions, 6], strict=True):
        ranks = [
            loader(rank, world_size, num_workers=min(workers, 2 if world_size < 3 else 1)) for rank in range(world_size)
        ]
        for rank in ranks:
            rank.load_state_dict(state)
        iterators = [rank.endless() for rank in ranks]
        while steps and not ranks[0].batches.epoch_is_over:
            shares = [next(iterator).tolist() for iterator in iterators]
            seen.append([i for rank, share in zip(ranks, shares, strict=True) if rank.batches.weight() for i in share])
            steps -= 1
        assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)
        state = ranks[0].state_dict()
    assert seen == whole
    assert sorted(index for batch in seen for index in batch) == list(range(COUNT))


def test_an_iteration_is_the_rest_of_the_epoch() -> None:
    first = loader()
    assert len(first) == 6
    assert numbers(iter(first), 2) == steady(2)  # left by break
    assert numbers(iter(first), 99) == steady(6)[2:]
    assert numbers(iter(first), 99) == steady(12)[6:]


@pytest.mark.parametrize("delivered", range(13))
def test_a_loop_over_epochs_ends_when_it_should_wherever_it_was_resumed(delivered: int) -> None:
    first = loader()
    seen = numbers(first.endless(), delivered)
    second = resumed(first)
    while second.batches.epochs_done < 2:
        seen += numbers(iter(second), 99)
    assert seen == steady(12)


def test_workers_that_stay_alive_go_on_too() -> None:
    first = loader(num_workers=2, persistent_workers=True)
    assert numbers(iter(first), 2) == steady(2)
    assert numbers(iter(first), 99) == steady(6)[2:]
    first.load_state_dict(resumed(loader()).state_dict())
    assert numbers(iter(first), 99) == steady(6)


@pytest.mark.parametrize("dataset", [Augmented(), AugmentedAtOnce()])
@pytest.mark.parametrize("workers", [1, 2])
def test_augmentation_in_workers_goes_on_as_if_there_had_been_no_interruption(dataset: Any, workers: int) -> None:
    whole = torch.cat(list(islice(loader(dataset=dataset, num_workers=2).endless(), 8)))
    first = loader(dataset=dataset, num_workers=workers)
    parts = list(islice(first.endless(), 3))
    parts += islice(resumed(first, dataset=dataset, num_workers=3 - workers).endless(), 5)
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole[:, 1].unique()) == len(whole)


def test_augmentation_in_workers_is_the_same_in_another_world() -> None:
    whole = torch.cat(list(loader(dataset=Augmented(), num_workers=2)))
    ranks = [iter(loader(rank, 2, dataset=Augmented(), num_workers=1)) for rank in range(2)]
    shares = [torch.cat([next(rank) for rank in ranks]) for _ in range(6)]
    assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_draws_nothing_from_the_training_s_random_numbers(workers: int) -> None:
    before = torch.get_rng_state(), random.getstate()
    list(loader(num_workers=workers))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_a_rank_with_an_empty_share_computes_for_nothing() -> None:
    """23 samples in batches of 4 leave 3 for the last: the fourth rank has none, but the others wait for it."""
    ranks = [loader(rank, 4) for rank in range(4)]
    *_, last = zip(*ranks, strict=True)
    assert [len(share) for share in last] == [1, 1, 1, 1]
    assert [rank.batches.weight() for rank in ranks] == [4 / 3, 4 / 3, 4 / 3, 0.0]
    assert [rank.batches.weight(share) for rank, share in zip(ranks, last, strict=True)] == [4 / 3, 4 / 3, 4 / 3, 0.0]


def test_a_worker_finds_the_dataset_s_own_attributes() -> None:
    class Opened(Numbers):
        shift = 0

        def __getitem__(self, index: int) -> int:
            return index + self.shift

        def open(self) -> None:
            self.shift = 100

    def open_dataset(worker: int) -> None:
        torch.utils.data.get_worker_info().dataset.open()  # type: ignore[union-attr]

    assert numbers(iter(loader(dataset=Opened(), num_workers=1, worker_init_fn=open_dataset)), 1) == [
        [index + 100 for index in steady(1)[0]]
    ]


def test_workers_may_be_spawned() -> None:
    spawned = loader(num_workers=1, multiprocessing_context="spawn")
    assert numbers(iter(spawned), 99) == steady(6)


def test_a_position_that_is_moved_during_an_iteration_is_noticed() -> None:
    first = loader()
    iterator = iter(first)
    next(iterator)
    first.load_state_dict(loader().state_dict())
    with pytest.raises(ConfigError, match="moved while this iteration was under way"):
        next(iterator)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(COUNT))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: loader(dataset=Stream()), "needs a dataset with indices"),
        (lambda: loader(dataset=[1, 2, 3]), "the dataset has 3 samples, its ShuffledBatches has count=23"),
        (lambda: loader(num_workers=2, in_order=False), "in_order=False"),
    ],
)
def test_what_has_no_position_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
