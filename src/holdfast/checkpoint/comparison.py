"""Where two checkpoints differ: tensors by how much, everything else by its path."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.checkpoint.inspection import PART_OF_STATE, Progress, batches, is_tensor, leaves
from holdfast.checkpoint.loading import StateContent
from holdfast.checkpoint.tensors import as_bytes
from holdfast.checkpoint.tree import TENSOR

ELEMENTS_AT_ONCE = 4 * 1024 * 1024
UNTOLD = ("objects", "ranks", "manifest_sha256", "format_version")
"""What a manifest says of storage only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    path: str
    here: str
    """Type and shape."""
    there: str
    elements: int = 0
    """That differ in any bit, of `total`; 0 where types or shapes differ."""
    total: int = 0
    largest: float = 0.0
    """Absolute difference, in double precision; nan where one side only is not a number."""


@dataclass(slots=True)
class Comparison:
    metadata: list[tuple[str, Any, Any]] = field(default_factory=list)
    values: list[tuple[str, Any, Any]] = field(default_factory=list)
    tensors: list[TensorDifference] = field(default_factory=list)
    only_here: list[str] = field(default_factory=list)
    only_there: list[str] = field(default_factory=list)
    equal_tensors: int = 0
    remark: str = ""

    @property
    def same_state(self) -> bool:
        """Metadata apart: two runs of the same training were made at different times."""
        return not (self.values or self.tensors or self.only_here or self.only_there)


def compare_states(here: StateContent, there: StateContent, progress: Progress = lambda count: None) -> Comparison:
    """`progress` is told of the bytes of both sides. Raises DamagedCheckpointError."""
    found = Comparison(metadata=compare_metadata(here.manifest, there.manifest))
    if here.world_size != there.world_size:
        found.remark = (
            f"{here.world_size} ranks saved the one, {there.world_size} the other: of what each rank has for itself, "
            "the first ones' is compared"
        )
    mine, its = _leaves_of(here), _leaves_of(there)
    if found.remark:
        mine, its = ({path: leaf for path, leaf in one.items() if path[0] == 0} for one in (mine, its))
    found.only_here = [_words(path) for path in mine if path not in its]
    found.only_there = [_words(path) for path in its if path not in mine]
    pairs: dict[str, tuple[str, str]] = {}
    for path, leaf in mine.items():
        other = its.get(path)
        if path not in its or (path[0] and all(one[path] == one.get((0, path[1])) for one in (mine, its))):
            continue  # a later rank's, which is the first one's
        if is_tensor(leaf) and is_tensor(other):
            pairs[_words(path)] = leaf[TENSOR], other[TENSOR]
        elif leaf != other:
            found.values.append((_words(path), leaf, other))
    _compare_tensors(here, there, pairs, found, progress)
    return found


def compare_files(here: Mapping[str, Any], there: Mapping[str, Any]) -> Comparison:
    """Of two folders, by their manifests."""
    found = Comparison(metadata=compare_metadata(here, there))
    mine, its = here["objects"], there["objects"]
    found.only_here = sorted(mine.keys() - its.keys())
    found.only_there = sorted(its.keys() - mine.keys())
    for name in sorted(mine.keys() & its.keys()):
        if mine[name] != its[name]:
            found.values.append(
                (
                    name,
                    *(
                        f"{one[name]['size_bytes']} bytes, SHA-256 {one[name].get('sha256', '')[:12]}"
                        for one in (mine, its)
                    ),
                )
            )
    return found


def compare_metadata(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    mine, its = (
        dict(leaves({name: value for name, value in one.items() if name not in UNTOLD})) for one in (here, there)
    )
    return [(name, mine.get(name), its.get(name)) for name in {**mine, **its} if mine.get(name) != its.get(name)]


def _leaves_of(content: StateContent) -> dict[tuple[int, str], Any]:
    """(rank, path) -> leaf."""
    return {
        (rank, path): leaf
        for rank, tree in enumerate(content.trees)
        for part in PART_OF_STATE
        for path, leaf in leaves(tree[part], "" if part == "components" else part)
    }


def _words(path: tuple[int, str]) -> str:
    rank, name = path
    return f"{name} (rank {rank})" if rank else name


def _compare_tensors(
    here: StateContent, there: StateContent, pairs: Mapping[str, tuple[str, str]], found: Comparison, progress: Progress
) -> None:
    if not pairs:
        return
    paths: dict[str, list[str]] = {}
    for path, (mine, _) in pairs.items():
        specs = here.tensors[mine].spec, there.tensors[pairs[path][1]].spec
        if specs[0] == specs[1]:
            paths.setdefault(mine, []).append(path)
        else:
            said = [f"{spec.dtype} {list(spec.shape)}" for spec in specs]
            found.tensors.append(TensorDifference(path=path, here=said[0], there=said[1]))
    for batch in batches(here, paths):
        tensors = here.read({}, batch)
        others = there.read({}, dict.fromkeys(pairs[path][1] for name in batch for path in paths[name]))
        for name in batch:
            for path in paths[name]:
                spec = here.tensors[name].spec
                difference = _difference(
                    path, f"{spec.dtype} {list(spec.shape)}", tensors[name], others[pairs[path][1]]
                )
                if difference is None:
                    found.equal_tensors += 1
                else:
                    found.tensors.append(difference)
                progress(2 * spec.size_bytes)
    order = {path: number for number, path in enumerate(pairs)}
    found.tensors.sort(key=lambda one: order[one.path])


def _difference(path: str, what: str, here: Any, there: Any) -> TensorDifference | None:
    import torch

    if torch.equal(as_bytes(here), as_bytes(there)):
        return None
    elements, largest = 0, 0.0
    for mine, its in _slices(here, there):
        differs = (as_bytes(mine).view(-1, mine.element_size()) != as_bytes(its).view(-1, mine.element_size())).any(1)
        elements += int(differs.sum())
        wide = torch.complex128 if mine.is_complex() else torch.float64
        apart = (mine[differs].to(wide) - its[differs].to(wide)).abs()
        if len(apart):
            greatest = float(apart.max())
            largest = greatest if math.isnan(greatest) else max(largest, greatest)
    return TensorDifference(path=path, here=what, there=what, elements=elements, total=here.numel(), largest=largest)


def _slices(here: Any, there: Any) -> Iterator[tuple[Any, Any]]:
    flat, other = here.reshape(-1), there.reshape(-1)
    for start in range(0, flat.numel(), ELEMENTS_AT_ONCE):
        yield flat[start : start + ELEMENTS_AT_ONCE], other[start : start + ELEMENTS_AT_ONCE]


def shown(value: Any, longest: int = 60) -> str:
    """A leaf in one line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= longest else text[: longest - 1] + "…"
