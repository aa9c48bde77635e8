"""A data position that can be saved: after a resume no sample is repeated and none is left out."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import ShuffledBatches
from holdfast.checkpoint.tree import flatten, unflatten
from holdfast.errors import ConfigError

sizes = st.integers(1, 40)


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    return unflatten(flatten(state, "batches", lambda path, leaf: ""), lambda name: None)


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own() -> None:
    batches = ShuffledBatches(count=10, batch_size=4, seed=3)
    epochs = [[batches.next() for _ in range(3)] for _ in range(2)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4, 4, 2]
        assert sorted(index for batch in epoch for index in batch) == list(range(10))
    assert epochs[0] != epochs[1]


@given(count=sizes, batch_size=sizes, seed=st.integers(), steps=st.integers(0, 60))
def test_wherever_it_is_interrupted_it_goes_on_as_if_it_had_not_been(
    count: int, batch_size: int, seed: int, steps: int
) -> None:
    steady = ShuffledBatches(count, batch_size, seed)
    interrupted = ShuffledBatches(count, batch_size, seed)
    for _ in range(steps):
        assert steady.next() == interrupted.next()
    resumed = ShuffledBatches(count, batch_size, seed)
    resumed.load_state_dict(through_a_checkpoint(interrupted.state_dict()))
    assert list(islice(resumed, 10)) == list(islice(steady, 10))


def test_one_that_was_used_before_it_resumes_forgets_what_it_did() -> None:
    saved = ShuffledBatches(count=10, batch_size=3, seed=1)
    saved.next()
    peeked = ShuffledBatches(count=10, batch_size=3, seed=2)
    peeked.next()
    peeked.load_state_dict(saved.state_dict())
    assert [peeked.next() for _ in range(5)] == [saved.next() for _ in range(5)]


def test_another_seed_gives_another_order() -> None:
    orders = {tuple(ShuffledBatches(count=20, batch_size=20, seed=seed).next()) for seed in range(5)}
    assert len(orders) == 5


def test_the_order_never_changes_between_versions() -> None:
    """A run may be resumed by a later Holdfast: its data must come in the same order."""
    assert ShuffledBatches(count=8, batch_size=8, seed=0).next() == [0, 6, 4, 3, 1, 7, 2, 5]


def test_data_that_has_changed_its_size_is_refused() -> None:
    saved = ShuffledBatches(count=10, batch_size=2).state_dict()
    with pytest.raises(ValueError, match="the data had 10 samples, now it has 11"):
        ShuffledBatches(count=11, batch_size=2).load_state_dict(saved)


@pytest.mark.parametrize(("count", "batch_size"), [(0, 1), (1, 0), (-1, 4), (4, -1)])
def test_no_data_and_empty_batches_are_refused(count: int, batch_size: int) -> None:
    with pytest.raises(ConfigError, match=f"count={count}, batch_size={batch_size}"):
        ShuffledBatches(count, batch_size)


# -- several ranks ----------------------------------------------------------------------------------------------------


def world_of(world_size: int, count: int, batch_size: int, **options: Any) -> list[ShuffledBatches]:
    return [
        ShuffledBatches(count, batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]


@given(
    count=sizes,
    batch_size=sizes,
    seed=st.integers(),
    worlds=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=5),
)
def test_the_batches_stay_the_same_however_often_the_number_of_ranks_changes(
    count: int, batch_size: int, seed: int, worlds: list[tuple[int, int]]
) -> None:
    steady = ShuffledBatches(count, batch_size, seed, rank=0, world_size=1)
    state = steady.state_dict()
    for world_size, steps in worlds:
        ranks = world_of(world_size, count, batch_size)
        for rank in ranks:
            rank.load_state_dict(through_a_checkpoint(state))
        for _ in range(steps):
            shares = [rank.next() for rank in ranks]
            assert [index for share in shares for index in share] == steady.next()
            lengths = [len(share) for share in shares]
            assert max(lengths) - min(lengths) <= 1
            assert sum(rank.weight() for rank in ranks) == pytest.approx(world_size)
        states = [rank.state_dict() for rank in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]


@given(count=st.integers(1, 60), batch_size=sizes, interruptions=st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_from_4_ranks_to_2_to_1_to_3_an_epoch_is_every_sample_once(
    count: int, batch_size: int, interruptions: list[int]
) -> None:
    seen: list[int] = []
    state = ShuffledBatches(count, batch_size).state_dict()
    for world_size, steps in zip((4, 2, 1, 3), [*interruptions, count], strict=True):
        ranks = world_of(world_size, count, batch_size)
        for rank in ranks:
            rank.load_state_dict(through_a_checkpoint(state))
        while steps and not ranks[0].epoch_is_over:
            seen += [index for rank in ranks for index in rank.next()]
            steps -= 1
        state = ranks[0].state_dict()
    assert sorted(seen) == list(range(count))


@given(count=st.integers(12, 60), worlds=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), max_size=5))
def test_with_a_fixed_batch_per_rank_the_order_of_the_samples_stays(count: int, worlds: list[tuple[int, int]]) -> None:
    seen: list[int] = []
    state = ShuffledBatches(count, 1).state_dict()
    for world_size, steps in worlds:
        ranks = [ShuffledBatches.per_rank(count, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank in ranks:
            assert rank.batch_size == 3 * world_size
            rank.load_state_dict(through_a_checkpoint(state))
        for _ in range(steps):
            shares = [rank.next() for rank in ranks]
            assert max(len(share) for share in shares) <= 3
            seen += [index for share in shares for index in share]
        state = ranks[0].state_dict()
    steady = ShuffledBatches(count, 1)
    assert seen == [steady.next()[0] for _ in seen]


@given(count=sizes, batch_size=sizes, world_size=st.integers(1, 4))
def test_drop_last_leaves_out_what_is_less_than_a_batch(count: int, batch_size: int, world_size: int) -> None:
    if batch_size > count:
        with pytest.raises(ConfigError, match="take a smaller batch"):
            ShuffledBatches(count, batch_size, drop_last=True)
        return
    ranks = world_of(world_size, count, batch_size, drop_last=True)
    for step in range(2 * (count // batch_size)):
        assert sum(len(rank.next()) for rank in ranks) == batch_size
        assert ranks[0].epoch == step // (count // batch_size)


@given(count=sizes, batch_size=sizes, world_size=st.integers(1, 5), largest=st.integers(1, 9), steps=st.integers(1, 9))
def test_micro_batches_are_the_share_in_pieces_as_many_on_every_rank(
    count: int, batch_size: int, world_size: int, largest: int, steps: int
) -> None:
    ranks = world_of(world_size, count, batch_size)
    for _ in range(steps):
        shares = [rank.next() for rank in ranks]
    pieces = [rank.micro_batches(share, largest) for rank, share in zip(ranks, shares, strict=True)]
    assert len({len(of_rank) for of_rank in pieces}) == 1  # under FSDP each is a collective
    for rank, share, of_rank in zip(ranks, shares, pieces, strict=True):
        assert all(1 <= len(piece) <= largest for piece, _ in of_rank)
        assert [index for piece, weight in of_rank for index in piece if weight] == share
        assert sum(weight for _, weight in of_rank) == pytest.approx(rank.weight())


def test_weighted_shares_and_pieces_give_the_mean_over_the_global_batch() -> None:
    losses = [index**2 for index in range(10)]
    ranks = world_of(3, count=10, batch_size=8)
    whole = ShuffledBatches(10, 8)
    for size in (8, 2):  # at the end of the epoch the third rank has nothing
        batch = whole.next()
        assert len(batch) == size
        expected = sum(losses[index] for index in batch) / size
        shares = [rank.next() for rank in ranks]
        by_share = [
            rank.weight() * sum(losses[i] for i in share) / len(share) if share else 0.0
            for rank, share in zip(ranks, shares, strict=True)
        ]
        by_piece = [
            sum(weight * sum(losses[i] for i in piece) / len(piece) for piece, weight in rank.micro_batches(share, 2))
            for rank, share in zip(ranks, shares, strict=True)
        ]
        assert sum(by_share) / 3 == pytest.approx(expected)
        assert sum(by_piece) / 3 == pytest.approx(expected)


def test_a_state_saved_before_there_were_ranks_goes_on() -> None:
    old = {"count": 10, "batch_size": 4, "seed": 3, "epoch": 0, "position": 4}
    steady = ShuffledBatches(10, 4, seed=3)
    steady.next()
    ranks = world_of(2, count=10, batch_size=4)
    for rank in ranks:
        rank.load_state_dict(old)
    assert [index for rank in ranks for index in rank.next()] == steady.next()


@pytest.mark.parametrize(
    ("saved", "loaded", "said"),
    [
        (
            ShuffledBatches(99, 64, rank=3, world_size=4),
            ShuffledBatches(99, 64, rank=0, world_size=2),
            ["global batch 64: 16 per rank of 4 -> 32 per rank of 2"],
        ),
        (
            ShuffledBatches(99, 64, rank=0, world_size=4),
            ShuffledBatches(99, 64, rank=0, world_size=3),
            ["global batch 64: 16 per rank of 4 -> 21 or 22 per rank of 3"],
        ),
        (
            ShuffledBatches.per_rank(99, 16, rank=0, world_size=4),
            ShuffledBatches.per_rank(99, 16, rank=0, world_size=2),
            ["global batch 64 -> 32: 16 per rank of 4 -> 16 per rank of 2"],
        ),
        (ShuffledBatches(99, 64, rank=3, world_size=4), ShuffledBatches(99, 64, rank=1, world_size=2), []),
        (ShuffledBatches(99, 64, rank=3, world_size=4), ShuffledBatches(99, 64, rank=0, world_size=4), []),
    ],
)
def test_what_changes_for_the_ranks_is_said_once(
    saved: ShuffledBatches, loaded: ShuffledBatches, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded.load_state_dict(saved.state_dict())
    assert caplog.messages == said


def test_torchrun_s_environment_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    batches = ShuffledBatches(count=8, batch_size=8, seed=0)
    assert (batches.rank, batches.world_size, batches.next()) == (1, 2, [1, 7, 2, 5])
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="RANK='2' and WORLD_SIZE='2'"):
        batches.next()


@pytest.mark.parametrize(("rank", "world_size"), [(0, None), (None, 2), (2, 2), (-1, 2), (0, 0)])
def test_a_rank_of_no_world_is_refused(rank: int | None, world_size: int | None) -> None:
    with pytest.raises(ConfigError, match=f"rank={rank}, world_size={world_size}"):
        ShuffledBatches(8, 4, rank=rank, world_size=world_size)
