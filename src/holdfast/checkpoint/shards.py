"""Which part of a tensor a rank has, and which rank writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Box:
    """A contiguous part of a tensor: where it begins in each dimension, and how far it goes."""

    begin: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: Box) -> Box | None:
        begin = tuple(max(mine, its) for mine, its in zip(self.begin, other.begin, strict=True))
        ends = [
            min(mine + length, its + its_length)
            for mine, length, its, its_length in zip(self.begin, self.shape, other.begin, other.shape, strict=True)
        ]
        shape = tuple(end - start for start, end in zip(begin, ends, strict=True))
        return Box(begin, shape) if all(length > 0 for length in shape) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Its place in `outer`, as an index."""
        return tuple(
            slice(mine - its, mine - its + length)
            for mine, its, length in zip(self.begin, outer.begin, self.shape, strict=True)
        )


def whole(shape: Iterable[int]) -> Box:
    shape = tuple(shape)
    return Box((0,) * len(shape), shape)


def is_dtensor(tensor: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(path: str, tensor: Any) -> tuple[Any, Box, bool]:
    """(this rank's plain tensor, its place, whether this rank is the one of its copies that writes it)."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise ConfigError(f"{path} is a tensor whose sum over ranks is still due (Partial), which can't be saved")
    shape, begin = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    coordinate = mesh.get_coordinate() or [0] * len(placements)
    first_copy = all(
        at == 0 or not placement.is_replicate() for at, placement in zip(coordinate, placements, strict=True)
    )
    local = tensor.to_local()
    return local, Box(tuple(begin), tuple(shape)), first_copy


def like(tensor: Any, local: Any) -> Any:
    """A DTensor with `tensor`'s mesh, placements and shape around this rank's `local` part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def owners(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes which of the tensors that all have: the largest first, each to the rank with the least to do.

    Every rank comes to the same answer, from the same names and sizes.
    """
    loads = [0] * world_size
    owner = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(world_size), key=lambda rank: (loads[rank], rank))
        owner[name] = rank
        loads[rank] += sizes[name]
    return owner
