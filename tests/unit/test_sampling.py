"""A data position that can be saved: after a resume no sample is repeated and none is left out."""

from __future__ import annotations

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
