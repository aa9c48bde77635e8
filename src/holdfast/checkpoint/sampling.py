"""A data position that can be saved, and that holds for any number of ranks."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator, Sequence, Sized
from typing import Any

from holdfast.errors import ConfigError

logger = logging.getLogger(__name__)


class ShuffledBatches:
    """Endless batches of indices, every epoch in a new order; after a resume no sample is repeated or skipped.

    The order of epoch e is a function of `seed` and e alone, and the position counts samples of the whole: the state is
    the same on all ranks, and goes on in a world of any size. `batch_size` is the global batch; `next` gives this
    rank's share of it. The last batch of an epoch may be shorter, so that shares differ and may be empty: see `weight`.
    `drop_last` leaves it out instead.

    `rank` and `world_size`: of torch.distributed where it is initialised, else of RANK and WORLD_SIZE, else 0 of 1.
    With tensor or pipeline parallelism give those of the data-parallel group: ranks that share samples share a rank.
    Raises ConfigError for numbers that make no batch.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        drop_last: bool = False,
    ) -> None:
        if count < 1 or batch_size < 1:
            raise ConfigError(f"ShuffledBatches(count={count}, batch_size={batch_size}): both must be above zero")
        given = None if rank is None and world_size is None else (rank, world_size)
        if given and (rank is None or world_size is None or not 0 <= rank < world_size):
            raise ConfigError(
                f"ShuffledBatches(rank={rank}, world_size={world_size}): give both or neither, and a rank below the world size"
            )
        self.count, self.seed, self.drop_last = count, seed, drop_last
        self.epoch, self.position = 0, 0
        self._size, self._size_is_per_rank = batch_size, False
        self._given: Any = given
        self._shuffled: tuple[int, list[int]] = (-1, [])
        self._last_sizes = (0, 0)  # of the share and of the global batch that `next` gave last
        self._refuse_an_epoch_without_batches()

    @classmethod
    def per_rank(
        cls,
        count: int,
        batch_size: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        drop_last: bool = False,
    ) -> ShuffledBatches:
        """With a fixed `batch_size` for each rank instead: the global batch is that times the number of ranks, and
        changes with it. Consider scaling the learning rate.
        """
        batches = cls(count, batch_size, seed, rank, world_size, drop_last=drop_last)
        batches._size_is_per_rank = True
        batches._refuse_an_epoch_without_batches()
        return batches

    @property
    def rank(self) -> int:
        return self._place()[0]

    @property
    def world_size(self) -> int:
        return self._place()[1]

    @property
    def batch_size(self) -> int:
        """Samples in a whole global batch."""
        return self._size * self.world_size if self._size_is_per_rank else self._size

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.next()

    def next(self) -> list[int]:
        """This rank's share of the next global batch.

        Put one after the other by rank, the shares are the global batch in its order; their sizes differ by at most one.
        """
        if self.epoch_is_over:
            self.epoch, self.position = self.epoch + 1, 0
        batch = self._order()[self.position : self.position + self.batch_size]
        self.position += len(batch)
        rank, world_size = self._place()
        share = batch[slice(*_bounds(len(batch), rank, world_size))]
        self._last_sizes = (len(share), len(batch))
        return share

    @property
    def epoch_is_over(self) -> bool:
        """`next` begins another one."""
        left = self.count - self.position
        return left < self.batch_size if self.drop_last else left <= 0

    @property
    def epochs_done(self) -> int:
        """Whole epochs: `while batches.epochs_done < epochs:` is right after a resume at any position."""
        return self.epoch + self.epoch_is_over

    @property
    def batches_per_epoch(self) -> int:
        """Steps from the beginning of an epoch to its end."""
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def weight(self, part: Sized | None = None) -> float:
        """What to multiply the mean loss over this rank's share by; over a piece of the share, given as the list or the
        tensor of its samples, when gradients are accumulated.

        Then the gradient that DDP or FSDP averages over the ranks is that of the mean loss over the global batch,
        whatever the shares' sizes. It is 1 where all shares are equal. A rank whose share is empty must still take
        part, for the others wait for its gradients: let it compute with any sample; the weight is 0 then.
        """
        share, batch = self._last_sizes
        return (share if part is None else len(part)) * self.world_size / batch if share else 0.0

    def micro_batches(self, share: Sequence[int], largest: int) -> list[tuple[list[int], float]]:
        """`share`, as `next` gave it, in pieces of at most `largest` with their weights, for gradient accumulation.

        Every rank gets as many pieces, since under FSDP each is a collective; where samples don't suffice, a piece is
        one sample with weight 0.
        """
        if largest < 1:
            raise ConfigError(f"micro_batches(largest={largest}): it must be above zero")
        largest_share = -(-self._last_sizes[1] // self.world_size)
        count = max(1, -(-largest_share // largest))
        pieces = [list(share[slice(*_bounds(len(share), piece, count))]) for piece in range(count)]
        return [(piece, self.weight(piece)) if piece else ([0], 0.0) for piece in pieces]

    def state_dict(self) -> dict[str, Any]:
        return {
            name: getattr(self, name) for name in ("count", "batch_size", "world_size", "seed", "epoch", "position")
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the data is of another size. Says in the log what changes for the ranks."""
        if state["count"] != self.count:
            raise ValueError(f"the data had {state['count']} samples, now it has {self.count}")
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._shuffled = (-1, [])  # the order may be another seed's
        before = state["batch_size"], state.get("world_size", 1)
        now = self.batch_size, self.world_size
        if before != now and self.rank == 0:
            # A warning: a program that has set up no logging shows nothing below.
            sizes = f"{before[0]}" if before[0] == now[0] else f"{before[0]} -> {now[0]}"
            logger.warning("global batch %s: %s -> %s", sizes, _per_rank(*before), _per_rank(*now))

    def _place(self) -> tuple[int, int]:
        # Asked each time: a program may make this object before it initialises torch.distributed.
        return self._given or _place_in_the_world()

    def _order(self) -> list[int]:
        if self._shuffled[0] != self.epoch:
            order = list(range(self.count))
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
            self._shuffled = (self.epoch, order)
        return self._shuffled[1]

    def _refuse_an_epoch_without_batches(self) -> None:
        if not self.batches_per_epoch:
            raise ConfigError(
                f"a global batch of {self.batch_size} is more than all {self.count} samples, and drop_last leaves out "
                "what is less than a batch; take a smaller batch"
            )


def _place_in_the_world() -> tuple[int, int]:
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = os.environ.get("RANK") or "0", os.environ.get("WORLD_SIZE") or "1"
    try:
        rank, world_size = map(int, names)
    except ValueError:
        rank, world_size = 0, 0
    if not 0 <= rank < world_size:
        raise ConfigError("RANK={!r} and WORLD_SIZE={!r} in the environment: no rank of a world".format(*names))
    return rank, world_size


def _bounds(count: int, index: int, parts: int) -> tuple[int, int]:
    """Where part `index` of `parts` begins and ends among `count`; the first parts are larger by one."""
    size, larger = divmod(count, parts)
    begin = index * size + min(index, larger)
    return begin, begin + size + (index < larger)


def _per_rank(batch_size: int, world_size: int) -> str:
    least, most = batch_size // world_size, -(-batch_size // world_size)
    return f"{least}{'' if least == most else f' or {most}'} per rank of {world_size}"
