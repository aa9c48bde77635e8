"""A data position that can be saved."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from holdfast.errors import ConfigError


class ShuffledBatches:
    """Endless batches of indices, every epoch in a new order; after a resume no sample is repeated or skipped.

    The order of epoch e is a function of `seed` and e alone. Each batch is list[int] of `batch_size` indices below
    `count`; the last of an epoch may be shorter. Raises ConfigError unless both are above zero.
    """

    def __init__(self, count: int, batch_size: int, seed: int = 0) -> None:
        if count < 1 or batch_size < 1:
            raise ConfigError(f"ShuffledBatches(count={count}, batch_size={batch_size}): both must be above zero")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch, self.position = 0, 0
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.next()

    def next(self) -> list[int]:
        if self.position >= self.count:
            self.epoch, self.position = self.epoch + 1, 0
        batch = self._order()[self.position : self.position + self.batch_size]
        self.position += len(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("count", "batch_size", "seed", "epoch", "position")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["count"] != self.count:
            raise ValueError(f"the data had {state['count']} samples, now it has {self.count}")
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._shuffled = (-1, [])  # the order may be another seed's

    def _order(self) -> list[int]:
        if self._shuffled[0] != self.epoch:
            order = list(range(self.count))
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
            self._shuffled = (self.epoch, order)
        return self._shuffled[1]
