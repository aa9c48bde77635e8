"""A torch DataLoader that can be saved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from holdfast.checkpoint.elastic import hashed, seed_this_process
from holdfast.checkpoint.sampling import ShuffledBatches
from holdfast.errors import ConfigError


class ResumableLoader:
    """A torch DataLoader over a map-style dataset, with workers or without, that goes on after the last batch it gave.

    What its workers have read ahead does not count: the position is `batches`', which moves when the loop gets a batch,
    so that `batches.weight` is of that batch. Iterating gives the rest of the present epoch, the whole of it at first
    and after every end; `endless` goes on with the next. `options` are DataLoader's: num_workers, collate_fn,
    pin_memory, persistent_workers...

    In workers, every sample's random numbers (augmentation) follow from `batches.seed`, epoch and index alone: neither
    a resume nor another number of workers or ranks changes them. Without workers they are drawn from the program's own.
    A rank whose share of an epoch's last batch is empty gets sample 0, with `batches.weight` 0.

    Raises ConfigError where the position would mean nothing.
    """

    def __init__(self, dataset: Any, batches: ShuffledBatches, **options: Any) -> None:
        from torch import Generator
        from torch.utils.data import DataLoader, IterableDataset

        if isinstance(dataset, IterableDataset):
            raise ConfigError(
                "ResumableLoader needs a dataset with indices; for an IterableDataset use torchdata's StatefulDataLoader"
            )
        if len(dataset) != batches.count:
            raise ConfigError(f"the dataset has {len(dataset)} samples, its ShuffledBatches has count={batches.count}")
        if not options.get("in_order", True):
            raise ConfigError("ResumableLoader(in_order=False): which samples were given could then not be said")
        self.batches = batches
        # A generator of its own: each iteration draws a number from it, and must not disturb the training's.
        options = {"generator": Generator().manual_seed(batches.seed % 2**63)} | options
        self._loader = DataLoader(_Samples(dataset), batch_sampler=_RestOfEpoch(batches), **options)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.batches.next()
            here = self.batches.epoch, self.batches.position
            yield batch
            if here != (self.batches.epoch, self.batches.position):
                raise ConfigError(
                    "the position was moved while this iteration was under way; restore before the loop begins, use the "
                    "loader in one loop at a time, and don't call next() on its batches"
                )

    def endless(self) -> Iterator[Any]:
        """Epoch after epoch, for `zip(run.steps(total), loader.endless())`: in this order, for the step is complete
        before the next batch is asked for.
        """
        while True:
            yield from self

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.batches.batches_per_epoch

    @property
    def batch_size(self) -> int:
        return self.batches.batch_size

    def state_dict(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)


class _RestOfEpoch:
    """What DataLoader asks for indices, ahead of the loop: it leaves the position of `batches` alone."""

    def __init__(self, batches: ShuffledBatches) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        ahead = copy.copy(self._batches)
        while True:
            share = ahead.next() or [0]
            yield [(ahead.seed, ahead.epoch, index) for index in share]
            if ahead.epoch_is_over:
                return

    def __len__(self) -> int:
        return self._batches.batches_per_epoch


class _Samples:
    """The dataset, asked with the seed and epoch of a sample beside its index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        _seed_if_in_a_worker(key)
        return self.dataset[key[2]]

    def __getitems__(self, keys: list[tuple[int, int, int]]) -> list[Any]:
        if not getattr(self.dataset, "__getitems__", None):
            return [self[key] for key in keys]
        _seed_if_in_a_worker(keys[0])
        return self.dataset.__getitems__([index for _, _, index in keys])

    def __getattr__(self, name: str) -> Any:
        # `get_worker_info().dataset` is this object, and a worker_init_fn may ask it for anything.
        if name == "dataset":
            raise AttributeError(name)  # being unpickled
        return getattr(self.dataset, name)


def _seed_if_in_a_worker(key: tuple[int, int, int]) -> None:
    from torch.utils.data import get_worker_info

    if get_worker_info() is not None:
        seed_this_process(hashed("sample {} {} {}".format(*key)))
