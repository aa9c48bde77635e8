"""The training state, taken apart into JSON and live tensors, and put together again."""

from __future__ import annotations

import logging
import platform
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from holdfast.checkpoint.components import (
    difference,
    kind_of,
    module_state,
    numbered_state,
    optimizer_state,
    own_name,
    parameter_names,
    parameters_of,
    put_back_shards,
    tied_names,
    unwrapped,
)
from holdfast.checkpoint.elastic import LearningRateRule, load_loader, reseed, scale_learning_rates
from holdfast.checkpoint.image import Spec
from holdfast.checkpoint.resumable_loader import ResumableLoader
from holdfast.checkpoint.sampling import ShuffledBatches
from holdfast.checkpoint.shards import Box, is_dtensor, local_part, owners, whole
from holdfast.checkpoint.tensors import dtype_names
from holdfast.checkpoint.tree import TENSOR, flatten, unflatten
from holdfast.errors import ConfigError

log = logging.getLogger(__name__)

SHARED = ("module", "optimizer")
"""Kinds of components that all ranks have alike; of the others each rank has its own state."""
REAL = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


class Leaf(NamedTuple):
    """One tensor of the state, or this rank's part of it."""

    tensor: Any
    """Live and plain: the program goes on changing it."""
    spec: Spec
    shape: tuple[int, ...]
    """Of the whole."""
    box: Box | None
    """Its place in the whole; None: it is the whole."""
    writes: bool


@dataclass(frozen=True, slots=True)
class Collected:
    tree: dict[str, Any]
    leaves: dict[str, Leaf]
    """Those that this rank writes."""

    def shards(self) -> dict[str, Any]:
        """What the image's header does not say of parts."""
        return {
            name: {"shape": leaf.shape, "begin": leaf.box.begin}
            for name, leaf in self.leaves.items()
            if leaf.box is not None
        }


class TrainingState:
    """The objects that make up the state: whatever has `state_dict` and `load_state_dict`, and random generators."""

    def __init__(
        self,
        components: Mapping[str, Any],
        user: dict[str, Any],
        rank: int = 0,
        world_size: int = 1,
        learning_rate_scaling: LearningRateRule = "none",
    ) -> None:
        for name, component in components.items():
            if not kind_of(component):
                raise ConfigError(
                    f"attach({name}=...) is a {type(component).__name__}, which has no state_dict and load_state_dict; "
                    "pass an object that has both, a torch.Generator or a numpy.random.Generator"
                )
        self._components, self._user = dict(components), user
        self._rank, self._world_size = rank, world_size
        self._scaling = learning_rate_scaling

    @property
    def components(self) -> Mapping[str, Any]:
        return self._components

    # -- taking apart -------------------------------------------------------------------------------------------------

    def collect(self) -> Collected:
        """The state as it is now; the tensors are the live ones. Raises ConfigError naming what can't be stored."""
        put_back_shards(self._components)
        names = parameter_names(self._components)
        tied_to = tied_names(self._components) if self._world_size > 1 else {}
        names_at: dict[str, str] = {}
        leaves: dict[str, Leaf] = {}
        alike: dict[str, int] = {}  # name -> bytes, of what every rank has whole
        by_address: dict[int, list[tuple[str, bool]]] = {}
        torch = sys.modules.get("torch")
        dtypes = dtype_names() if torch else {}

        def take(path: str, leaf: Any, shared: bool) -> str:
            if torch is None or not isinstance(leaf, torch.Tensor):
                return ""
            if torch.nn.parameter.is_lazy(leaf):
                raise ConfigError(f"{path} has no shape yet; run the model forward once before attach()")
            leaf = leaf.detach()
            box, global_shape, writes = None, tuple(leaf.shape), True
            sharded = is_dtensor(leaf)
            if sharded and not shared and path.startswith("user."):
                raise ConfigError(
                    f"run.state: {path.removeprefix('user.')} is a sharded tensor (DTensor), and nothing will say how to "
                    "shard it after a resume; keep it in an object with state_dict and load_state_dict, and pass that to "
                    "attach()"
                )
            shared |= sharded
            if sharded:
                leaf, box, writes = local_part(path, leaf)
                writes = writes and (leaf.numel() > 0 or 0 in global_shape)
                box = None if box == whole(global_shape) else box
            if leaf.is_meta:
                raise ConfigError(
                    f"{path} is on the meta device, where tensors have no content; move it to a real one (to_empty) and "
                    "initialise it before attach()"
                )
            dtype = dtypes.get(leaf.dtype)
            if dtype is None or leaf.layout is not torch.strided:
                raise ConfigError(
                    f"{path} is a tensor of {leaf.dtype} and {leaf.layout}, which a checkpoint can't hold; keep a dense "
                    "one of another type"
                )
            if shared and any(not stride and size > 1 for stride, size in zip(leaf.stride(), leaf.shape, strict=True)):
                raise ConfigError(
                    f"{path} is an expanded tensor: many of its elements are one in memory, and it can't be loaded; "
                    "register a clone() of it"
                )
            # Tied weights are one tensor under two names, and stay one. Ranks without a part of it see that by name alone.
            if name := names_at.get(tied_to.get(path, "")):
                return name
            address = leaf.data_ptr()
            tied = by_address.setdefault(address, [])
            for other, is_shared in tied if address else ():
                if is_shared == shared and _are_one(leaf, leaves[other].tensor) and global_shape == leaves[other].shape:
                    return other
            name = path if shared or self._world_size == 1 else f"{path}@{self._rank}"
            while name in leaves:
                name += "'"
            tied.append((name, shared))
            spec = Spec(dtype, tuple(leaf.shape))
            leaves[name] = Leaf(leaf, spec, global_shape, box, writes)
            names_at[path] = name
            if shared and not sharded:
                alike[name] = spec.size_bytes
            return name

        def flat(value: Any, path: str, shared: bool) -> Any:
            try:
                return flatten(value, path, lambda at, leaf: take(at, leaf, shared))
            except RecursionError:
                raise ConfigError(f"{path} contains itself, or too many levels to be saved") from None

        components = {
            name: flat(self._get(name, component, names), name, kind_of(component) in SHARED)
            for name, component in self._components.items()
        }
        tree = {
            "components": components,
            "user": flat(self._user, "user", False),
            "random": flat(random_states(), "random", False),
        }
        if self._world_size > 1:
            owner = owners(alike, self._world_size)
            leaves = {
                name: leaf
                for name, leaf in leaves.items()
                if (owner[name] == self._rank if name in owner else leaf.writes)
            }
        return Collected(tree, leaves)

    def _get(self, name: str, component: Any, names: Mapping[int, str]) -> Any:
        match kind_of(component):
            case "module":
                return module_state(component)
            case "optimizer":
                return optimizer_state(name, component, names)
            case "state_dict":
                return component.state_dict()
            case "torch-generator":
                return component.get_state()
        return component.bit_generator.state

    def kinds(self) -> dict[str, str]:
        """Name of an optimizer or scheduler of torch's own -> its class: what another makes of its state is nonsense."""
        return {
            name: type(component).__name__
            for name, component in self._components.items()
            if type(component).__module__.startswith("torch.optim.")
        }

    def check_kinds(self, kinds: Mapping[str, str]) -> None:
        """`kinds`: of the checkpoint. Raises ConfigError."""
        for name, kind in self.kinds().items():
            if kinds.get(name, kind) != kind:
                raise ConfigError(
                    f"{name} is of another kind than the checkpoint's: {kind}, and there it is {kinds[name]}; use the "
                    "same, or another run id"
                )

    def layout(self) -> list[str]:
        """What all ranks must have alike, a line for each: the components, and the tensors of modules."""
        lines = []
        for name, component in self._components.items():
            kind = kind_of(component)
            lines.append(f"{name} ({kind})")
            if kind == "module":
                for key, value in module_state(component).items():
                    lines.append(f"{name}.{key} {list(getattr(value, 'shape', ()))}")
        return sorted(lines)

    # -- putting together ---------------------------------------------------------------------------------------------

    def places(self, tree: Mapping[str, Any], specs: Mapping[str, Spec]) -> dict[str, Any]:
        """Name -> live tensor that takes what the checkpoint holds under this name, or is sharded as it shall be.

        `specs`: of the checkpoint's tensors. Raises ConfigError when the state is another architecture's: which parts,
        which names, which shapes and types. A real number of another precision is converted, with a warning.
        """
        here, there = set(self._components), set(tree["components"])
        if here != there:
            raise ConfigError(
                f"the checkpoint holds {sorted(there)}, but attach() was given {sorted(here)}; pass the same objects"
            )
        put_back_shards(self._components)
        names = parameter_names(self._components)
        found: dict[str, Any] = {}
        for name, component in self._components.items():
            saved = tree["components"][name]
            if kind_of(component) == "module":
                live = module_state(component)
                if different := difference(set(live), set(saved)):
                    raise ConfigError(f"the checkpoint's {name} does not fit the program's: {different}")
                pairs = [
                    (key, value[TENSOR], live[key])
                    for key, value in saved.items()
                    if isinstance(value, dict) and TENSOR in value
                ]
                _check_fit(name, pairs, specs)
                for _, stored_name, tensor in pairs:
                    found.setdefault(stored_name, tensor)
            elif kind_of(component) == "optimizer":
                by_name = {names[id(one)]: one for one in parameters_of(component) if id(one) in names}
                for parameter, values in _states_by_parameter(saved):
                    if parameter in by_name and isinstance(values, dict):
                        for value in values.values():
                            if isinstance(value, dict) and TENSOR in value:
                                found.setdefault(value[TENSOR], by_name[parameter])
            elif kind_of(component) == "state_dict":
                found |= {path: one for path, one in _sharded_tensors(name, component) if path in specs}
        return found

    def load(
        self, tree: Mapping[str, Any], tensor: Callable[[str], Any], manifest: Mapping[str, Any], world_size: int
    ) -> dict[str, Any]:
        """Put everything back but the random states, which are returned: they are due when the loop begins.

        `world_size`: of the ranks that saved it. In a world of another size each rank gets a random stream of its own,
        and what belonged to single ranks is the first one's. Raises ConfigError when the state is another architecture's.
        """
        names = parameter_names(self._components)
        for name, component in self._components.items():
            saved = unflatten(tree["components"][name], tensor)
            try:
                if kind_of(component) == "state_dict":
                    load_loader(name, component, saved, same_world=world_size == self._world_size)
                else:
                    self._set(name, component, saved, names)
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"the checkpoint's {name} does not fit the program's: {error}") from error
        user = unflatten(tree["user"], tensor)
        self._user.clear()
        self._user.update(user)
        self._scale_learning_rates(manifest.get("batch_size"))
        states: dict[str, Any] = unflatten(tree["random"], tensor)
        if world_size != self._world_size:
            seed = int(manifest.get("environment", {}).get("seed", 0))
            step = int(manifest["step"])
            log.warning("%d ranks go on where %d were: each has a new random stream", self._world_size, world_size)
            generators = {
                name: one
                for name, one in self._components.items()
                if kind_of(one) in ("torch-generator", "numpy-generator")
            }
            return {"reseed": lambda: reseed(seed, step, self._rank, self._world_size, generators)}
        return states

    def _scale_learning_rates(self, old: int | None) -> None:
        new = self.batch_size()
        if self._scaling == "none" or old == new:
            return
        if old is None or new is None:
            raise ConfigError(
                f"learning_rate_scaling is {self._scaling!r}, but no component tells the global batch: pass a "
                "ShuffledBatches or a data loader to attach()"
            )
        optimizers = [one for one in self._components.values() if kind_of(one) == "optimizer"]
        schedulers = [one for one in self._components.values() if hasattr(one, "get_last_lr")]
        scale_learning_rates(self._scaling, old, new, optimizers, schedulers)

    def _set(self, name: str, component: Any, state: Any, names: Mapping[int, str]) -> None:
        match kind_of(component):
            case "module":
                inner = unwrapped(component)
                theirs = {own_name(key): key for key in inner.state_dict()}
                inner.load_state_dict({theirs.get(key, key): value for key, value in state.items()})
            case "optimizer":
                component.load_state_dict(numbered_state(name, component, names, state))
            case "torch-generator":
                component.set_state(state)
            case _:
                component.bit_generator.state = state

    # -- what a checkpoint says of itself -----------------------------------------------------------------------------

    def learning_rates(self) -> list[float]:
        return [
            float(group["lr"])
            for component in self._components.values()
            for group in getattr(component, "param_groups", ())
            if "lr" in group
        ]

    def batch_size(self) -> int | None:
        """Samples of all ranks together in one step, where a component tells."""
        for component in self._components.values():
            if kind_of(component) != "state_dict":
                continue  # a model may have a batch_size of its own
            for one in (component, getattr(component, "batch_sampler", None)):
                if isinstance(size := getattr(one, "batch_size", None), int):
                    # Ours tell the global batch, a loader or sampler of others that of its rank.
                    is_ours = isinstance(one, ShuffledBatches | ResumableLoader)
                    return size if is_ours else size * self._world_size
        return None


def _are_one(one: Any, other: Any) -> bool:
    """Of two tensors at one address: do they have the same elements?"""
    return bool(
        one.numel()
        and one.device == other.device
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.is_conj() == other.is_conj()
        and one.is_neg() == other.is_neg()
    )


def describe_environment() -> dict[str, Any]:
    """What a checkpoint says of the place it was made in: versions, seed, world size, determinism."""
    found: dict[str, Any] = {"python": platform.python_version(), "world_size": 1}
    if torch := sys.modules.get("torch"):
        found |= {
            "torch": torch.__version__,
            "seed": torch.initial_seed(),
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
        }
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            found["world_size"] = torch.distributed.get_world_size()
    if numpy := sys.modules.get("numpy"):
        found["numpy"] = numpy.__version__
    return found


def names_in(tree: Any) -> list[str]:
    """Of all the tensors that a flattened state speaks of."""
    if isinstance(tree, list):
        return [name for item in tree for name in names_in(item)]
    if not isinstance(tree, dict):
        return []
    if tree.keys() == {TENSOR}:
        return [tree[TENSOR]]
    return [name for item in tree.values() for name in names_in(item)]


def set_random_states(states: Mapping[str, Any]) -> None:
    if "reseed" in states:
        states["reseed"]()
        return
    if "python" in states:  # what another program's checkpoint became has none
        random.setstate(states["python"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])
    if "torch" in states:
        import torch

        torch.set_rng_state(states["torch"])
        if states.get("cuda") and torch.cuda.is_available():
            for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
                torch.cuda.set_rng_state(state, device)


def _check_fit(component: str, pairs: list[tuple[str, str, Any]], specs: Mapping[str, Spec]) -> None:
    """`pairs`: key in the component, name in the checkpoint, live tensor. Raises ConfigError."""
    torch = sys.modules["torch"]
    types = dtype_names()
    wrong, converted = [], []
    at: dict[tuple[Any, ...], tuple[str, str]] = {}
    for key, stored_name, live in pairs:
        if stored_name not in specs or not isinstance(live, torch.Tensor) or torch.nn.parameter.is_lazy(live):
            continue  # damage, or for load_state_dict to judge
        there, here = specs[stored_name], Spec(types.get(live.dtype, str(live.dtype)), tuple(live.shape))
        if there.shape != here.shape:
            wrong.append(f"{key} has shape {list(there.shape)} in the checkpoint and {list(here.shape)} in the program")
        elif there.dtype != here.dtype:
            said = f"{key} is {there.dtype} in the checkpoint and {here.dtype} in the program"
            real = {there.dtype, here.dtype} <= REAL
            (converted if real else wrong).append(said)
        if live.numel() and not is_dtensor(live):
            place = (live.device, live.data_ptr(), live.shape, live.stride())
            other_key, other_name = at.setdefault(place, (key, stored_name))
            if live.data_ptr() and other_name != stored_name:
                wrong.append(f"{other_key} and {key} are one tensor in the program and two in the checkpoint")
    if wrong:
        raise ConfigError(f"the checkpoint's {component} does not fit the program's: {_shortened(wrong)}")
    if converted:
        log.warning("the checkpoint's %s is converted: %s", component, _shortened(converted))


def _shortened(said: list[str], most: int = 5) -> str:
    return "; ".join(said[:most]) + (f"; and {len(said) - most} more" if len(said) > most else "")


def random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate()}
    if numpy := sys.modules.get("numpy"):
        states["numpy"] = numpy.random.get_state()
    if torch := sys.modules.get("torch"):
        states["torch"] = torch.get_rng_state()
        states["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return states


def _sharded_tensors(name: str, component: Any) -> list[tuple[str, Any]]:
    """(path, tensor) of the DTensors that its state has now."""
    found: list[tuple[str, Any]] = []
    if "torch.distributed.tensor" in sys.modules:

        def note(path: str, leaf: Any) -> str:
            if is_dtensor(leaf):
                found.append((path, leaf))
            return path

        flatten(component.state_dict(), name, note)
    return found


def _states_by_parameter(saved: Any) -> list[tuple[Any, Any]]:
    """An optimizer's state in its flat form: with names for keys it is an object, with numbers a list of pairs."""
    states = saved.get("state", {}) if isinstance(saved, dict) else {}
    return list(states.items()) if isinstance(states, dict) and not states.keys() & {"$pairs"} else []
