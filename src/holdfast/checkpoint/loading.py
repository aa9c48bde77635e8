"""From the images of a checkpoint into memory: every byte once, checked on its way, straight to where it belongs."""

from __future__ import annotations

import bisect
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from holdfast.checkpoint.commits import STATE, TREE, CheckpointId, Checkpoints, image_bytes
from holdfast.checkpoint.image import ITEM_BYTES, Place, Spec, header_bytes, read_places
from holdfast.checkpoint.shards import Box, is_dtensor, like, local_part, whole
from holdfast.checkpoint.slots import MADV_HUGEPAGE, advise
from holdfast.checkpoint.tensors import as_bytes, dtypes
from holdfast.errors import ConfigError, DamagedCheckpointError

HUGE_PAGE_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor in one of the images."""

    image: str
    place: Place
    box: Box


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the checkpoint, wherever its parts are."""

    spec: Spec
    """Of the whole."""
    chunks: tuple[Chunk, ...]


class StateContent:
    """What a checkpoint of kind 'state' holds. Raises DamagedCheckpointError when that can't be read."""

    def __init__(self, checkpoints: Checkpoints, checkpoint: CheckpointId, manifest: Mapping[str, Any]) -> None:
        self.checkpoint, self.manifest = checkpoint, manifest
        self._checkpoints = checkpoints
        ranks = manifest.get("ranks") or [{"tree": TREE, "state": STATE}]
        self.trees: list[dict[str, Any]] = []
        """By rank."""
        parts: dict[str, list[tuple[Chunk, tuple[int, ...]]]] = defaultdict(list)
        for rank in ranks:
            tree = self._read_tree(rank["tree"])
            self.trees.append(tree)
            if rank["state"] not in manifest["objects"]:
                continue  # it had no tensors to write
            shards = tree.get("shards") or {}
            for name, place in self._read_places(rank["state"]).items():
                shard = shards.get(name)
                shape = tuple(shard["shape"]) if shard else place.spec.shape
                begin = tuple(shard["begin"]) if shard else (0,) * len(shape)
                parts[name].append((Chunk(rank["state"], place, Box(begin, place.spec.shape)), shape))
        self.tensors = {
            name: Stored(Spec(found[0][0].place.spec.dtype, found[0][1]), tuple(chunk for chunk, _ in found))
            for name, found in parts.items()
        }

    @property
    def world_size(self) -> int:
        return len(self.trees)

    def read(self, places: Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, Any]:
        """Name -> CPU tensor, or DTensor, of all (or these) tensors.

        `places`: live tensors by name. A plain one on the CPU, of the same type and shape, is written to; a DTensor
        says how its kind is sharded. What is in no place gets memory of its own.
        Raises DamagedCheckpointError when a part is missing or changed; places may have been written to by then.
        """
        import torch

        filled: dict[str, Any] = {}
        sharded: dict[str, tuple[Any, Any]] = {}
        targets: list[tuple[Stored, Any, Box]] = []
        for name in self.tensors if names is None else names:
            if name not in self.tensors:
                raise DamagedCheckpointError(f"{self.checkpoint}: no image holds {name}")
            stored, live = self.tensors[name], places.get(name)
            shape, dtype = stored.spec.shape, dtypes()[stored.spec.dtype]
            if is_dtensor(live) and tuple(live.shape) == shape:
                _, box, _ = local_part(name, live)
                local = _fresh(box.shape, dtype)
                targets.append((stored, local, box))
                sharded[name] = live, local
                continue
            usable = (
                type(live) is torch.Tensor and live.device.type == "cpu" and live.is_contiguous()
                and not live.is_conj() and not live.is_neg()
                and live.dtype == dtype and tuple(live.shape) == shape
            )  # fmt: skip
            tensor = live if usable else _fresh(shape, dtype)
            targets.append((stored, tensor, whole(shape)))
            filled[name] = tensor
        self._fill(targets)
        for name, (live, local) in sharded.items():
            filled[name] = like(live, local.to(live.to_local().device))
        return filled

    def _read_tree(self, name: str) -> dict[str, Any]:
        try:
            tree = json.loads(self._checkpoints.read(self.checkpoint, self.manifest, name))
            return {"components": tree["components"], **tree}
        except (KeyError, ValueError, TypeError) as error:
            raise DamagedCheckpointError(f"{self.checkpoint}/{name} can't be read: {error!r}") from error

    def _read_places(self, name: str) -> dict[str, Place]:
        entry = self.manifest["objects"][name]
        head = bytearray()

        def keep(start: int, piece: memoryview) -> None:
            head.extend(piece)

        wanted = 1
        while len(head) < min(image_bytes(entry), wanted):
            number = len(head) // entry["piece_bytes"]
            self._checkpoints.read_pieces(self.checkpoint, self.manifest, name, keep, [number])
            wanted = header_bytes(head)
        return read_places(head, image_bytes(entry))

    def _fill(self, targets: list[tuple[Stored, Any, Box]]) -> None:
        import torch

        runs: dict[str, list[_Run]] = defaultdict(list)
        moves = []
        for stored, tensor, box in targets:
            covered = 0
            seen: set[Box] = set()
            for chunk in stored.chunks:
                overlap = chunk.box.overlap(box) if box.shape else Box((), ())
                if overlap is None or overlap in seen:
                    continue
                seen.add(overlap)
                covered += math.prod(overlap.shape)
                row_bytes = ITEM_BYTES[chunk.place.spec.dtype] * math.prod(chunk.box.shape[1:])
                skipped = overlap.begin[0] - chunk.box.begin[0] if box.shape else 0
                rows = overlap.shape[0] if box.shape else 1
                start = chunk.place.start + skipped * row_bytes
                if overlap.shape[1:] == chunk.box.shape[1:] == box.shape[1:] and tensor.is_contiguous():
                    into = as_bytes(tensor)
                    at = (overlap.begin[0] - box.begin[0]) * row_bytes if box.shape else 0
                    into = into[at : at + rows * row_bytes]
                else:
                    part = Box((overlap.begin[0], *chunk.box.begin[1:]), (overlap.shape[0], *chunk.box.shape[1:]))
                    whole_rows = torch.empty(part.shape, dtype=tensor.dtype)
                    moves.append((tensor[overlap.within(box)], whole_rows[overlap.within(part)]))
                    into = as_bytes(whole_rows)
                if rows * row_bytes:
                    runs[chunk.image].append(_Run(start, start + rows * row_bytes, into))
            if covered < math.prod(box.shape):
                raise DamagedCheckpointError(f"{self.checkpoint}: a part of a tensor is in no image")
        for image, wanted in runs.items():
            self._scatter(image, sorted(wanted, key=lambda run: run.start))
        for into, source in moves:
            into.copy_(source)

    def _scatter(self, image: str, runs: list[_Run]) -> None:
        import torch

        starts = [run.start for run in runs]
        longest = max(run.stop - run.start for run in runs)
        piece_bytes = self.manifest["objects"][image]["piece_bytes"]
        wanted = {
            number for run in runs for number in range(run.start // piece_bytes, (run.stop - 1) // piece_bytes + 1)
        }

        def use(start: int, piece: memoryview) -> None:
            source, stop = torch.frombuffer(piece, dtype=torch.uint8), start + len(piece)
            for run in runs[bisect.bisect_left(starts, start - longest) : bisect.bisect_left(starts, stop)]:
                first, last = max(run.start, start), min(run.stop, stop)
                if first < last:
                    run.into[first - run.start : last - run.start].copy_(source[first - start : last - start])

        self._checkpoints.read_pieces(self.checkpoint, self.manifest, image, use, wanted)


def _fresh(shape: tuple[int, ...], dtype: Any) -> Any:
    """CPU memory for a tensor, in huge pages where the kernel has them: most of its page faults are spared."""
    import torch

    tensor = torch.empty(shape, dtype=dtype)
    begin = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    size_bytes = tensor.data_ptr() + tensor.numel() * tensor.element_size() - begin
    if size_bytes >= HUGE_PAGE_BYTES:
        advise(begin, size_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES, MADV_HUGEPAGE)
    return tensor


class _Run(NamedTuple):
    """Bytes of an image that belong together in memory too."""

    start: int
    stop: int
    into: Any
    """uint8[stop - start]"""


def check_kind(checkpoint: CheckpointId, manifest: Mapping[str, Any]) -> None:
    """Raises ConfigError for a checkpoint that `attach` did not make."""
    if manifest.get("kind") != "state":
        raise ConfigError(
            f"checkpoint {checkpoint} is of kind {manifest.get('kind')!r}, made by another program; use another run id"
        )
