"""A run that begins where another program's checkpoint ends: folders of torch.distributed.checkpoint, torch.save files,
safetensors.

No file can run code here: what is pickled is read by an unpickler that knows the few types such files are made of.
"""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.checkpoint.commits import STATE, TREE, CheckpointId, Checkpoints
from holdfast.checkpoint.export import ABOUT, is_optimizer
from holdfast.checkpoint.image import Spec, plan, read_places
from holdfast.checkpoint.tensors import as_bytes, can_encode, dtype_names, dtypes
from holdfast.checkpoint.tree import flatten
from holdfast.errors import ConfigError, DamagedCheckpointError
from holdfast.storage import ObjectStore

IMPORTED = 0
"""The attempt of what no attempt of the run made: every attempt's checkpoints are newer."""
DCP = "torch.distributed.checkpoint"


def read_program_state(path: Path) -> dict[str, Any]:
    """What the file or folder holds, by top-level key. Raises ConfigError."""
    if path.is_dir():
        return _read_dcp(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file or folder")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)


def as_components(
    state: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(components, values for `run.state`, random states) of what `read_program_state` found.

    `names`: key, or dotted path of keys -> the name that the program gives to `attach`, or "" to leave it out. Dicts
    become components, everything else a value of `run.state`. Raises ConfigError.
    """
    rest = dict(state)
    renamed = {name: value for key, name in names.items() for value in [_take(rest, key)] if name}
    given = [name for name in names.values() if name]
    if twice := sorted({name for name in given if given.count(name) > 1 or name in rest}):
        raise ConfigError(f"--rename: {', '.join(twice)} would be two components; name another")
    about = rest.pop(ABOUT, None)
    about = about if isinstance(about, dict) else {}
    emptied = {key for key in rest if isinstance(rest[key], dict) and not rest[key] and state[key]}
    found = {**{key: value for key, value in rest.items() if key not in emptied}, **renamed}
    components = {name: value for name, value in found.items() if isinstance(value, dict)}
    values = {name: value for name, value in found.items() if not isinstance(value, dict)}
    components = {name: _by_component(name, _grouped(value), components) for name, value in components.items()}
    modules = {one.partition(".")[0] for saved in components.values() for one in _named_parameters(saved)}
    components = {name: _tied(value) if name in modules else value for name, value in components.items()}
    return components, {**about.get("state", {}), **values}, _random(about.get("random", {}))


def import_state(
    store: ObjectStore,
    run: str,
    step: int,
    components: Mapping[str, Any],
    values: Mapping[str, Any],
    random_states: Mapping[str, Any],
    origin: str,
) -> CheckpointId:
    """Commit it as the first checkpoint of a new run. Raises ConfigError, TransientError."""
    if step < 1:
        raise ConfigError(f"step {step}: say how many steps were done, at least 1")
    if not components:
        raise ConfigError(f"{origin} holds no component: nothing in it is a state dict")
    checkpoints = Checkpoints(store, run)
    if there := checkpoints.committed():
        raise ConfigError(f"run {run!r} has {len(there)} checkpoints already; import into a run of another name")
    tensors: dict[str, Any] = {}
    known: dict[tuple[Any, ...], str] = {}

    def take(path: str, leaf: Any) -> str:
        return _take_tensor(path, leaf, tensors, known)

    tree = {
        "components": {name: flatten(value, name, take) for name, value in components.items()},
        "user": flatten(dict(values), "user", take),
        "random": flatten(dict(random_states), "random", take),
        "shards": {},
    }
    checkpoint = CheckpointId(IMPORTED, step)
    objects = {TREE: checkpoints.write(checkpoint, TREE, [json.dumps(tree).encode()])}
    if tensors:
        objects |= checkpoints.write_image(checkpoint, STATE, memoryview(_image(tensors)))
    groups = [group for one in components.values() if is_optimizer(one) for group in one["param_groups"]]
    checkpoints.publish(
        checkpoint,
        objects,
        {
            "kind": "state",
            "parent": None,
            "run": run,
            "attempt": IMPORTED,
            "step": step,
            "created_at": datetime.now(UTC).isoformat(),
            "imported_from": origin,
            "learning_rates": [float(group["lr"]) for group in groups if "lr" in group],
            "batch_size": None,
            "environment": {"world_size": 1},
            "ranks": [{"tree": TREE, "state": STATE}],
        },
    )
    return checkpoint


# -- the files --------------------------------------------------------------------------------------------------------


def _read_dcp(folder: Path) -> dict[str, Any]:
    if not (folder / ".metadata").is_file():
        raise ConfigError(f"{folder} is no checkpoint of {DCP}: it has no file .metadata")
    import warnings

    import torch
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with open(folder / ".metadata", "rb") as file:
                metadata: Metadata = _MetadataUnpickler(file).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    class Planner(_EmptyStateDictLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            from torch.distributed.checkpoint._nested_dict import set_element

            path = self.mappings[read_item.dest_index.fqn]
            set_element(self.original_state_dict, path, torch.load(value, weights_only=True))

    state: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            _load_state_dict(state, storage_reader=Reader(folder), planner=Planner(), no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception, and holds those of many kinds
        raise ConfigError(f"{folder} can't be read as a checkpoint of {DCP}: {_reason(error)}") from error
    return state


class _MetadataUnpickler(pickle.Unpickler):
    """Of `.metadata`, which is a pickle: it may name what DCP describes tensors with, and nothing that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        found = None
        if "." not in name:
            if module in (f"{DCP}.metadata", f"{DCP}.filesystem", "pathlib", "torch", "torch.serialization"):
                found = super().find_class(module, name)
            elif (module, name) in (("collections", "OrderedDict"), ("collections", "defaultdict")):
                return super().find_class(module, name)
        described = (
            (isinstance(found, type) and found.__module__ == f"{DCP}.metadata")
            or isinstance(found, torch.dtype) or found is torch.Size
            or (module, name) in ((f"{DCP}.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"))
            or (module == "pathlib" and name.endswith("Path"))
        )  # fmt: skip
        if not described:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs")
        return found


def _read_torch_file(path: Path) -> dict[str, Any]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, all of them saying that it is no such file
        raise ConfigError(f"{path} can't be read by torch.load(weights_only=True): {_reason(error)}") from error
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds a {type(state).__name__}, not a dict of state dicts")
    if state and all(isinstance(value, torch.Tensor) for value in state.values()):
        return {"model": dict(state)}
    return state


def _read_safetensors(path: Path) -> dict[str, Any]:
    import torch

    body = bytearray(path.read_bytes())
    try:
        places = read_places(memoryview(body), len(body))
    except DamagedCheckpointError as error:
        raise ConfigError(f"{path}: {error}") from error
    tensors = {}
    for name, place in places.items():
        part = torch.frombuffer(body[place.start : place.stop] or bytearray(1), dtype=torch.uint8)
        part = part[: place.stop - place.start]
        tensors[name] = part.view(dtypes()[place.spec.dtype]).reshape(place.spec.shape)
    return {"model": _tied(tensors)}


# -- what is in them --------------------------------------------------------------------------------------------------


def _take(state: dict[str, Any], key: str) -> Any:
    """Remove and return what lies under a key, or a dotted path of keys."""
    inner, rest = state, key
    while rest not in inner:
        first, dot, rest = rest.partition(".")
        if not dot or not isinstance(inner.get(first), dict):
            raise ConfigError(f"there is no {key!r} in it; it has {', '.join(map(str, inner))}")
        inner[first] = dict(inner[first])  # the caller's stays as it is
        inner = inner[first]
    return inner.pop(rest)


def _grouped(saved: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state that was saved flat (`flatten_optimizer_state_dict`): 'state.<parameter>.<what>' -> value."""
    if not saved or not all(isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in saved):
        return saved
    state: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in saved.items():
        part, _, rest = key.partition(".")
        parameter, _, what = rest.rpartition(".")
        (state if part == "state" else options).setdefault(parameter, {})[what] = value
    groups: list[dict[str, Any]] = []
    for parameter, values in options.items():
        for group in groups:
            if {**group, "params": None} == {**values, "params": None}:
                group["params"].append(parameter)
                break
        else:
            groups.append({**values, "params": [parameter]})
    return {"state": state, "param_groups": groups}


def _named_parameters(saved: Any) -> list[str]:
    if not is_optimizer(saved):
        return []
    return [one for group in saved["param_groups"] for one in group["params"] if isinstance(one, str)]


def _tied(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights of a module, equal ones as one tensor: DCP and safetensors write tied weights once for each of their names,
    and what is one in the program must be one in the checkpoint. A module copies what it loads, so that equal weights
    which are not tied stay two there; other objects may keep what they are given, optimizers do.
    """
    import torch

    kept: dict[tuple[Any, ...], list[Any]] = {}
    found = {}
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor) and weight.numel() and can_encode(weight):
            whole = as_bytes(weight.contiguous())
            alike = kept.setdefault((weight.dtype, weight.shape, zlib.crc32(memoryview(whole.numpy()))), [])
            twin = next((one for one in alike if torch.equal(as_bytes(one.contiguous()), whole)), None)
            if twin is None:
                alike.append(weight)
            weight = weight if twin is None else twin
        found[name] = weight
    return found


def _by_component(name: str, saved: dict[str, Any], components: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer that knows parameters by the model's names is told whose they are, as ours are."""
    if not is_optimizer(saved):
        return saved
    order = [one for group in saved["param_groups"] for one in group["params"]]
    if not order or not all(isinstance(one, str) for one in order):
        return saved
    owner = {one: _owner(name, one, order, components) for one in order}
    return {
        **saved,
        "state": {owner.get(one, one): values for one, values in saved["state"].items()},
        "param_groups": [
            {**group, "params": [owner[one] for one in group["params"]]} for group in saved["param_groups"]
        ],
    }


def _owner(name: str, parameter: str, order: Iterable[str], components: Mapping[str, Any]) -> str:
    first, _, rest = parameter.partition(".")
    owners = [one for one, keys in components.items() if one != name and parameter in keys]
    if not owners and rest in components.get(first, ()):
        return parameter  # an optimizer of several modules, named by component already
    whole = [one for one in owners if all(other in components[one] for other in order)] or owners
    if len(whole) != 1:
        raise ConfigError(
            f"{name} has a parameter {parameter!r}, which is {'in none' if not whole else 'in several'} of "
            f"{', '.join(one for one in components if one != name)}; import a model and its optimizer together"
        )
    return f"{whole[0]}.{parameter}"


def _random(states: Mapping[str, Any]) -> dict[str, Any]:
    """NumPy's own has an array in it, which was exported as a tensor."""
    if "numpy" not in states:
        return dict(states)
    return {**states, "numpy": tuple(one.numpy() if hasattr(one, "numpy") else one for one in states["numpy"])}


def _take_tensor(path: str, leaf: Any, tensors: dict[str, Any], known: dict[tuple[Any, ...], str]) -> str:
    import torch

    if not isinstance(leaf, torch.Tensor):
        return ""
    leaf = leaf.detach()
    if not can_encode(leaf):
        raise ConfigError(f"{path} is a tensor of {leaf.dtype} and {leaf.layout}, which a checkpoint can't hold")
    identity = (leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride())
    if leaf.numel() and identity in known:
        return known[identity]
    name = path
    while name in tensors:
        name += "'"
    known[identity] = name
    tensors[name] = leaf
    return name


def _image(tensors: Mapping[str, Any]) -> bytearray:
    import torch

    layout = plan({name: Spec(dtype_names()[one.dtype], tuple(one.shape)) for name, one in tensors.items()})
    image = bytearray(layout.size_bytes)
    image[: len(layout.header)] = layout.header
    whole = torch.frombuffer(image, dtype=torch.uint8)
    for name, place in layout.places.items():
        if place.stop > place.start:
            whole[place.start : place.stop].copy_(as_bytes(tensors[name].contiguous()))
    return image


def _reason(error: BaseException) -> str:
    """The innermost words, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    failures = getattr(error, "failures", None)  # of a CheckpointException: by rank
    if failures:
        error = next(iter(failures.values()))[0]
    return (str(error).strip().splitlines() or [repr(error)])[0]
