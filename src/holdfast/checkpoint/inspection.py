"""What is in a run's checkpoints, for whoever looks from outside: which there are, what each holds, whether it is whole.

Standard library only; nothing is written but by `remove`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint.commits import MANIFEST, CheckpointId, Checkpoints
from holdfast.checkpoint.loading import StateContent
from holdfast.checkpoint.state import names_in
from holdfast.checkpoint.tree import PAIRS, TENSOR, TUPLE, unflatten
from holdfast.errors import ConfigError, DamagedCheckpointError, HoldfastError, NotFoundError
from holdfast.runtime.contract import checkpoint_prefix
from holdfast.storage import ObjectStore

NEWEST = "newest"
ID = re.compile(r"(\d+)-(\d+)")
OF_A_RUN = re.compile(r"runs/(.+?)/checkpoints/(\d+-\d+)/" + re.escape(MANIFEST))
BATCH_BYTES = 256 * 1024 * 1024
PART_OF_STATE = ("components", "user", "random")

Progress = Callable[[int], None]
"""Told every so many bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glance:
    """What can be said of a checkpoint without reading its data."""

    id: CheckpointId
    manifest: dict[str, Any]
    """Empty when it can't be read."""
    size_bytes: int
    """As stored: images may be compressed."""
    problem: str
    """In words; empty when the manifest is whole, and every object is there in its size."""

    @property
    def kind(self) -> str:
        return str(self.manifest.get("kind", ""))

    @property
    def world_size(self) -> int:
        return len(self.manifest.get("ranks") or [None])

    @property
    def bytes_to_read(self) -> int:
        return sum(entry["size_bytes"] for entry in self.manifest.get("objects", {}).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """One component of a state."""

    name: str
    tensors: int
    elements: int
    size_bytes: int


class OpenState(StateContent):
    """A checkpoint of kind 'state', with the way back to its bytes."""

    def __init__(self, checkpoints: Checkpoints, checkpoint: CheckpointId, manifest: Mapping[str, Any]) -> None:
        super().__init__(checkpoints, checkpoint, manifest)
        self.checkpoints = checkpoints


def runs(store: ObjectStore) -> dict[str, list[CheckpointId]]:
    """Every run that has checkpoints; theirs, oldest first."""
    found: dict[str, list[CheckpointId]] = {}
    for info in store.list("runs/"):
        if match := OF_A_RUN.fullmatch(info.key):
            found.setdefault(match[1], []).append(CheckpointId.parse(match[2]))
    return {run: sorted(ids) for run, ids in sorted(found.items())}


def glance(store: ObjectStore, run: str) -> list[Glance]:
    """All checkpoints of a run, oldest first: one list, and one manifest each. Raises ConfigError when it has none."""
    there = {info.key: info.size_bytes for info in store.list(checkpoint_prefix(run))}
    checkpoints = Checkpoints(store, run)
    return [_glance(checkpoints, run, one, there) for one in committed(store, run)]


def committed(store: ObjectStore, run: str) -> list[CheckpointId]:
    """Oldest first. Raises ConfigError when there is none."""
    if not run:
        raise ConfigError("name a run; `holdfast checkpoints list` shows those that have checkpoints")
    found = Checkpoints(store, run).committed()
    if found:
        return found
    known = list(runs(store))
    close = difflib.get_close_matches(run, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"those that have some: {', '.join(known[:10]) or 'none'}"
    raise ConfigError(f"run {run!r} has no checkpoint in {store.url}; {hint}")


def find(store: ObjectStore, run: str, which: str = NEWEST) -> CheckpointId:
    """`which`: 'newest', a step (of its latest attempt), or an id as '0002-000000000070'. Raises ConfigError."""
    ids = committed(store, run)
    if which == NEWEST:
        return ids[-1]
    if which.isascii() and which.isdigit():
        matching = [one for one in ids if one.step == int(which)]
    elif match := ID.fullmatch(which):
        matching = [one for one in ids if one == CheckpointId(int(match[1]), int(match[2]))]
    else:
        raise ConfigError(f"checkpoint {which!r}: write {NEWEST!r}, a step, or an id such as {ids[-1]}")
    if not matching:
        raise ConfigError(f"run {run!r} has no checkpoint {which}; it has {_some(ids)}")
    return matching[-1]


def verify(
    store: ObjectStore, run: str, checkpoint: CheckpointId, progress: Progress = lambda count: None
) -> dict[str, Any]:
    """Read every byte; the manifest. Raises DamagedCheckpointError naming what is damaged, and where."""
    checkpoints = Checkpoints(store, run)
    manifest = _manifest(checkpoints, checkpoint)
    checkpoints.verify(checkpoint, manifest, progress)
    if manifest.get("kind") == "state":
        check_complete(StateContent(checkpoints, checkpoint, manifest))
    return manifest


def open_state(store: ObjectStore, run: str, checkpoint: CheckpointId) -> OpenState:
    """Raises DamagedCheckpointError, and ConfigError for a checkpoint that is a folder."""
    checkpoints = Checkpoints(store, run)
    manifest = _manifest(checkpoints, checkpoint)
    if manifest.get("kind") != "state":
        raise ConfigError(
            f"checkpoint {checkpoint} of run {run!r} is a {manifest.get('kind')}: it holds files, no tensors"
        )
    return OpenState(checkpoints, checkpoint, manifest)


def check_complete(content: StateContent) -> None:
    """Is every tensor that the state speaks of somewhere, and with all its parts? Raises DamagedCheckpointError."""
    for tree in content.trees:
        for name in names_in([tree[part] for part in PART_OF_STATE]):
            stored = content.tensors.get(name)
            if stored is None:
                raise DamagedCheckpointError(f"{content.checkpoint}: no image holds {name}")
            parts = sum(math.prod(box.shape) for box in {chunk.box for chunk in stored.chunks})
            if parts < math.prod(stored.spec.shape):
                raise DamagedCheckpointError(f"{content.checkpoint}: a part of {name} is in no image")


def holdings(content: StateContent) -> list[Holding]:
    """Components, and what the program's own values and random states take."""
    found = []
    for name, trees in [
        *((name, [tree["components"].get(name) for tree in content.trees]) for name in content.trees[0]["components"]),
        ("run.state", [tree["user"] for tree in content.trees]),
        ("random states", [tree["random"] for tree in content.trees]),
    ]:
        specs = [content.tensors[one].spec for one in dict.fromkeys(names_in(trees)) if one in content.tensors]
        elements = sum(math.prod(spec.shape) for spec in specs)
        size_bytes = sum(spec.size_bytes for spec in specs)
        found.append(Holding(name=name, tensors=len(specs), elements=elements, size_bytes=size_bytes))
    return found


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a flattened state with its path; tensors as {"$tensor": name}, a list of plain values as one."""
    children: Iterable[tuple[Any, Any]]
    if isinstance(value, dict) and value.keys() == {TUPLE} and not _is_plain(value[TUPLE]):
        children = enumerate(value[TUPLE])
    elif isinstance(value, dict) and value.keys() == {PAIRS}:
        children = ((unflatten(key, str), item) for key, item in value[PAIRS])
    elif isinstance(value, dict) and value and not next(iter(value)).startswith("$"):
        children = value.items()
    elif isinstance(value, list) and value and not _is_plain(value):
        children = enumerate(value)
    else:
        yield path, value
        return
    for key, item in children:
        yield from leaves(item, f"{path}.{key}" if path else str(key))


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, dict) and leaf.keys() == {TENSOR}


def batches(content: StateContent, names: Iterable[str]) -> Iterator[list[str]]:
    """`names` in the order of their bytes, so many at once as are worth reading together: a piece holds many."""
    batch: list[str] = []
    size_bytes = 0
    for name in sorted(
        set(names),
        key=lambda name: (content.tensors[name].chunks[0].image, content.tensors[name].chunks[0].place.start),
    ):
        if batch and size_bytes + content.tensors[name].spec.size_bytes > BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
        batch.append(name)
        size_bytes += content.tensors[name].spec.size_bytes
    if batch:
        yield batch


def superfluous(store: ObjectStore, run: str, keep: int, progress: Progress = lambda count: None) -> list[CheckpointId]:
    """All but the newest `keep`, and but the newest that is whole, from which the run would go on; oldest first.

    Raises ConfigError when none is whole: then each may be what a repair begins with.
    """
    if keep < 1:
        raise ConfigError(f"keep {keep}: at least one checkpoint must stay")
    ids = committed(store, run)
    for checkpoint in reversed(ids):
        try:
            verify(store, run, checkpoint, progress)
        except DamagedCheckpointError:
            continue
        return [one for one in ids[:-keep] if one != checkpoint]
    raise ConfigError(f"run {run!r} has {len(ids)} checkpoints and none is whole: nothing is deleted")


def remove(store: ObjectStore, run: str, doomed: Sequence[CheckpointId]) -> None:
    """Manifests first, then data: an interrupted deletion leaves no checkpoint that lacks a part."""
    for checkpoint in doomed:
        store.delete(f"{checkpoint_prefix(run)}{checkpoint}/{MANIFEST}")
    for checkpoint in doomed:
        for info in store.list(f"{checkpoint_prefix(run)}{checkpoint}/"):
            store.delete(info.key)


def _glance(checkpoints: Checkpoints, run: str, checkpoint: CheckpointId, there: dict[str, int]) -> Glance:
    prefix = f"{checkpoint_prefix(run)}{checkpoint}/"
    size_bytes = sum(size for key, size in there.items() if key.startswith(prefix))
    try:
        manifest = checkpoints.manifest(checkpoint)
    except HoldfastError as error:
        return Glance(id=checkpoint, manifest={}, size_bytes=size_bytes, problem=str(error))
    problems = []
    for name, entry in manifest["objects"].items():
        size = there.get(prefix + name)
        if size is None:
            problems.append(f"{name} is missing")
        elif size != (expected := entry.get("stored_bytes", entry["size_bytes"])):
            problems.append(f"{name} has {size} bytes, not {expected}")
    return Glance(id=checkpoint, manifest=manifest, size_bytes=size_bytes, problem="; ".join(problems))


def _manifest(checkpoints: Checkpoints, checkpoint: CheckpointId) -> dict[str, Any]:
    try:
        return checkpoints.manifest(checkpoint)
    except NotFoundError:
        raise ConfigError(f"checkpoint {checkpoint} has gone meanwhile; list the run's checkpoints again") from None


def _is_plain(values: Sequence[Any]) -> bool:
    """Numbers and words only, such as the 625 of a random state: of interest as one."""
    return all(not isinstance(value, dict | list) or value == [] for value in values)


def _some(ids: Sequence[CheckpointId]) -> str:
    shown = [str(one) for one in ids[-5:]]
    return ", ".join(shown) if len(ids) <= 5 else f"{len(ids)}, the last of them {', '.join(shown)}"
