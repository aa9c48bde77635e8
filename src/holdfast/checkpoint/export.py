"""Checkpoints for programs that know nothing of Holdfast: safetensors, torch.save, torch.distributed.checkpoint, files."""

from __future__ import annotations

import bisect
import contextlib
import json
import math
import mmap
import os
import shutil
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.folders import FILES
from holdfast.checkpoint.image import ALIGNMENT, ITEM_BYTES, plan
from holdfast.checkpoint.inspection import OpenState, Progress, batches, is_tensor, leaves
from holdfast.checkpoint.loading import Stored
from holdfast.checkpoint.state import names_in
from holdfast.checkpoint.tree import TENSOR, unflatten
from holdfast.errors import ConfigError, DamagedCheckpointError
from holdfast.storage import ObjectStore

ABOUT = "holdfast"
"""Where a torch.save or DCP export has what is no component: where it came from, `run.state` and random states."""


def nothing(count: int) -> None:
    """Progress that nobody looks at."""


def to_safetensors(content: OpenState, path: Path, component: str = "model", progress: Progress = nothing) -> list[str]:
    """The tensors of one component, by its own names, from all ranks' parts; what is no tensor, and so was left out.

    Needs no PyTorch. Tied weights are written once for each of their names, as the layout wants it.
    Raises ConfigError and DamagedCheckpointError; there is no file then.
    """
    found = dict(leaves(_component(content, component)))
    names = {key: leaf[TENSOR] for key, leaf in found.items() if is_tensor(leaf)}
    if not names:
        raise ConfigError(f"component {component!r} holds no tensor; export it with the others, to a .pt file")
    stored = {key: _stored(content, name) for key, name in names.items()}
    remarks = {
        "format": "pt",
        "component": component,
        "run": str(content.manifest.get("run", "")),
        "checkpoint": str(content.checkpoint),
    }
    layout = plan({key: one.spec for key, one in stored.items()})
    header = _with_remarks(layout.header, remarks)
    moved = len(header) - len(layout.header)
    with _whole_or_none(path) as staged, open(staged, "w+b") as file:
        file.truncate(layout.size_bytes + moved)
        with mmap.mmap(file.fileno(), 0) as memory:
            memory[: len(header)] = header
            copies: dict[str, list[_Copy]] = defaultdict(list)
            for key, one in stored.items():
                for image, copy in _copies(content.checkpoint, key, one, layout.places[key].start + moved):
                    copies[image].append(copy)
            for image, wanted in copies.items():
                _copy_bytes(content, image, sorted(wanted), memory, progress)
            memory.flush()
    return [key for key in found if key not in names]


def to_torch_file(content: OpenState, path: Path, component: str = "", progress: Progress = nothing) -> list[str]:
    """A file for `torch.load(path, weights_only=True)`: component -> its state dict, or one component's state dict.

    Optimizers have torch's own form, by number. Nothing is left out.
    """
    import torch

    tensors = _tensors(content, component, progress)
    state = {name: numbered(saved) for name, saved in _values(content, component, tensors).items()}
    with _whole_or_none(path) as staged:
        try:
            torch.save(state[component] if component else {**state, **_about(content, tensors)}, staged)
        except RuntimeError as error:  # what torch makes of a full disk
            raise ConfigError(f"{path} can't be written: {error}; is there room for it?") from error
    return []


def to_dcp(
    content: OpenState,
    folder: Path,
    component: str = "",
    names: Mapping[str, str] | None = None,
    progress: Progress = nothing,
) -> list[str]:
    """A folder for `torch.distributed.checkpoint.load`, in the form of `get_state_dict`: optimizers by parameters' names.

    `names`: component -> the key that the program loads it under, where it is another. Nothing is left out.
    """
    import warnings

    import torch.distributed.checkpoint as dcp

    names = names or {}
    if unknown := names.keys() - content.trees[0]["components"].keys():
        raise ConfigError(
            f"--rename: checkpoint {content.checkpoint} has no component {', '.join(sorted(unknown))}; it has "
            f"{', '.join(content.trees[0]['components'])}"
        )
    keys = [names.get(name, name) for name in content.trees[0]["components"]] + [ABOUT]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"--rename: {', '.join(twice)} would be two things of the export; name another key")
    tensors = _tensors(content, component, progress)
    state = {names.get(name, name): by_own_names(saved) for name, saved in _values(content, component, tensors).items()}
    if not component:
        state |= _about(content, tensors)
    with _whole_or_none(folder) as staged, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(state, checkpoint_id=staged, no_dist=True)
        except dcp.CheckpointException as error:  # no Exception, so nobody else would catch it
            first = next(iter(error.failures.values()), (error,))[0]
            raise ConfigError(f"{folder} can't be written: {str(first) or repr(first)}") from error
    return []


def to_folder(
    store: ObjectStore,
    run: str,
    checkpoint: CheckpointId,
    manifest: Mapping[str, Any],
    folder: Path,
    progress: Progress = nothing,
) -> list[str]:
    """The files of a directory checkpoint, or of `attach(directory=...)`, each proven whole."""
    checkpoints = Checkpoints(store, run)
    listed = [name for name in manifest["objects"] if name.startswith(FILES)]
    if not listed:
        raise ConfigError(f"checkpoint {checkpoint} of run {run!r} holds no files")
    with _whole_or_none(folder) as staged:
        for name in listed:
            relative = PurePosixPath(name.removeprefix(FILES))
            if relative.is_absolute() or ".." in relative.parts:
                raise DamagedCheckpointError(f"{checkpoint} has a file outside its folder: {name!r}")
            path = staged / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(checkpoints.read(checkpoint, manifest, name))
            progress(manifest["objects"][name]["size_bytes"])
    return []


def size_of(content: OpenState, component: str = "") -> int:
    """Bytes of the tensors that an export reads."""
    tree = _component(content, component) if component else content.trees[0]
    return sum(_stored(content, name).spec.size_bytes for name in set(names_in(tree)))


# -- the forms of an optimizer's state --------------------------------------------------------------------------------


def is_optimizer(saved: Any) -> bool:
    return (
        isinstance(saved, dict)
        and {"state", "param_groups"} <= saved.keys()
        and isinstance(saved["param_groups"], list)
    )


def numbered(saved: Any) -> Any:
    """As `Optimizer.state_dict` has it: parameters are numbered in the order of the groups."""
    if not is_optimizer(saved):
        return saved
    order = [one for group in saved["param_groups"] for one in group["params"]]
    if not all(isinstance(one, str) for one in order):
        return saved
    numbers = {one: number for number, one in enumerate(dict.fromkeys(order))}
    return {
        **saved,
        "state": {numbers[one]: values for one, values in saved["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[one] for one in group["params"]]} for group in saved["param_groups"]
        ],
    }


def by_own_names(saved: Any) -> Any:
    """As `get_optimizer_state_dict` has it: by the names that the model itself gives its parameters.

    An optimizer of several modules keeps the components' names in front: no name of its own tells them apart.
    """
    if not is_optimizer(saved):
        return saved
    order = [one for group in saved["param_groups"] for one in group["params"]]
    if not all(isinstance(one, str) for one in order) or len({one.partition(".")[0] for one in order}) != 1:
        return saved

    def own(name: str) -> str:
        return name.partition(".")[2]

    return {
        **saved,
        "state": {own(one): values for one, values in saved["state"].items()},
        "param_groups": [{**group, "params": [own(one) for one in group["params"]]} for group in saved["param_groups"]],
    }


# -- reading ----------------------------------------------------------------------------------------------------------


def _component(content: OpenState, component: str) -> Any:
    components = content.trees[0]["components"]
    if component not in components:
        raise ConfigError(
            f"checkpoint {content.checkpoint} has no component {component!r}; it has {', '.join(components)}: name one "
            "with --component"
        )
    return components[component]


def _stored(content: OpenState, name: str) -> Stored:
    if name not in content.tensors:
        raise DamagedCheckpointError(f"{content.checkpoint}: no image holds {name}")
    return content.tensors[name]


def _tensors(content: OpenState, component: str, progress: Progress) -> dict[str, Any]:
    """Every tensor of the first rank's tree, whole."""
    tree = _component(content, component) if component else content.trees[0]
    wanted = set(names_in(tree))
    for name in wanted:
        _stored(content, name)
    found: dict[str, Any] = {}
    for batch in batches(content, wanted):
        found |= content.read({}, batch)
        progress(sum(content.tensors[name].spec.size_bytes for name in batch))
    return found


def _values(content: OpenState, component: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    components = content.trees[0]["components"]
    if ABOUT in components:
        raise ConfigError(f"a component is called {ABOUT!r}, which an export has a use for; export it with --component")
    wanted = {component: components[component]} if component else components
    return {name: _plain(unflatten(saved, tensors.__getitem__)) for name, saved in wanted.items()}


def _about(content: OpenState, tensors: Mapping[str, Any]) -> dict[str, Any]:
    tree, manifest = content.trees[0], content.manifest
    return {
        ABOUT: {
            "run": str(manifest.get("run", "")),
            "checkpoint": str(content.checkpoint),
            "step": content.checkpoint.step,
            "state": _plain(unflatten(tree["user"], tensors.__getitem__)),
            "random": _plain(unflatten(tree["random"], tensors.__getitem__)),
        }
    }


def _plain(value: Any) -> Any:
    """NumPy's arrays as tensors: torch.load(weights_only=True) takes no array."""
    if isinstance(value, dict):
        return type(value)({key: _plain(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if type(value).__module__ == "numpy":
        import torch

        return torch.from_numpy(value.copy()) if hasattr(value, "setflags") and value.ndim else value.item()
    return value


# -- bytes from image to file -----------------------------------------------------------------------------------------


class _Copy(NamedTuple):
    start: int
    """In the image."""
    stop: int
    target: int
    """In the file."""


def _copies(checkpoint: CheckpointId, key: str, stored: Stored, target: int) -> Iterator[tuple[str, _Copy]]:
    """Where each part's contiguous bytes go in the whole tensor."""
    shape, item_bytes = stored.spec.shape, ITEM_BYTES[stored.spec.dtype]
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    covered = 0
    for box, chunk in {chunk.box: chunk for chunk in stored.chunks}.items():
        covered += math.prod(box.shape)
        split = len(shape)  # dimensions from here on are whole, and lie together
        while split and box.shape[split - 1] == shape[split - 1]:
            split -= 1
        outer = max(0, split - 1)
        run_bytes = math.prod(box.shape[outer:]) * item_bytes
        if not run_bytes:
            continue
        start = chunk.place.start
        inner = sum(begin * stride for begin, stride in zip(box.begin[outer:], strides[outer:], strict=True))
        for at in product(*(range(length) for length in box.shape[:outer])):
            offset = inner + sum(
                (begin + index) * stride for begin, index, stride in zip(box.begin, at, strides, strict=False)
            )
            yield chunk.image, _Copy(start, start + run_bytes, target + offset * item_bytes)
            start += run_bytes
    if covered < math.prod(shape):
        raise DamagedCheckpointError(f"{checkpoint}: a part of {key} is in no image")


def _copy_bytes(content: OpenState, image: str, copies: list[_Copy], memory: mmap.mmap, progress: Progress) -> None:
    starts = [copy.start for copy in copies]
    longest = max(copy.stop - copy.start for copy in copies)
    piece_bytes = content.manifest["objects"][image]["piece_bytes"]
    wanted = {
        number for copy in copies for number in range(copy.start // piece_bytes, (copy.stop - 1) // piece_bytes + 1)
    }

    def use(start: int, piece: memoryview) -> None:
        stop = start + len(piece)
        for copy in copies[bisect.bisect_left(starts, start - longest) : bisect.bisect_left(starts, stop)]:
            first, last = max(copy.start, start), min(copy.stop, stop)
            if first < last:
                at = copy.target + first - copy.start
                memory[at : at + last - first] = piece[first - start : last - start]
                progress(last - first)

    content.checkpoints.read_pieces(content.checkpoint, content.manifest, image, use, wanted)


def _with_remarks(header: bytes, remarks: Mapping[str, str]) -> bytes:
    """transformers reads only files whose remarks say that they are PyTorch's."""
    entries = json.loads(header[8:])
    text = json.dumps({"__metadata__": remarks, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def _whole_or_none(path: Path) -> Iterator[Path]:
    """A place beside `path` that takes its place in the end. Raises ConfigError when something is there already."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} is there already; name another place, or remove it")
    staged = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        staged.rename(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # it was said why there is none
            if staged.is_dir():
                shutil.rmtree(staged, ignore_errors=True)
            else:
                staged.unlink(missing_ok=True)
