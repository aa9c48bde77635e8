"""The training state as one consistent copy, and back."""

from __future__ import annotations

import platform
import random
import sys
from collections.abc import Mapping
from typing import Any

from holdfast.checkpoint.tensors import can_encode
from holdfast.checkpoint.tree import flatten, unflatten
from holdfast.errors import ConfigError


class TrainingState:
    """The objects that make up the state: whatever has `state_dict` and `load_state_dict`, and random generators."""

    def __init__(self, components: Mapping[str, Any], user: dict[str, Any]) -> None:
        for name, component in components.items():
            if not _kind(component):
                raise ConfigError(
                    f"attach({name}=...) is a {type(component).__name__}, which has no state_dict and load_state_dict; "
                    "pass an object that has both, a torch.Generator or a numpy.random.Generator"
                )
        self._components, self._user = dict(components), user

    def copy(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(JSON tree, name -> CPU tensor that shares no memory). Raises ConfigError naming what can't be stored."""
        tensors: dict[str, Any] = {}
        torch = sys.modules.get("torch")

        def take(path: str, leaf: Any) -> str:
            if torch is None or not isinstance(leaf, torch.Tensor):
                return ""
            if not can_encode(leaf):
                raise ConfigError(
                    f"{path} is a tensor of {leaf.dtype} and {leaf.layout}, which a checkpoint can't hold; keep a dense "
                    "one of another type"
                )
            name = path
            while name in tensors:
                name += "'"
            tensors[name] = leaf.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            return name

        everything = {
            "components": {name: _get(component) for name, component in self._components.items()},
            "user": self._user,
            "random": _random_states(),
        }
        return {name: flatten(part, name, take) for name, part in everything.items()}, tensors

    def load(self, tree: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Put everything back but the random states, which are returned: they are due when the loop begins.

        Raises ConfigError when the state is another architecture's.
        """
        saved = {name: unflatten(part, tensors.__getitem__) for name, part in tree.items()}
        here, there = set(self._components), set(saved["components"])
        if here != there:
            raise ConfigError(
                f"the checkpoint holds {sorted(there)}, but attach() was given {sorted(here)}; pass the same objects"
            )
        for name, component in self._components.items():
            try:
                _set(component, saved["components"][name])
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"the checkpoint's {name} does not fit the program's: {error}") from error
        self._user.clear()
        self._user.update(saved["user"])
        return saved["random"]

    def learning_rates(self) -> list[float]:
        return [
            float(group["lr"])
            for component in self._components.values()
            for group in getattr(component, "param_groups", ())
            if "lr" in group
        ]

    def batch_size(self) -> int | None:
        sizes = (getattr(component, "batch_size", None) for component in self._components.values())
        return next((size for size in sizes if isinstance(size, int)), None)


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


def set_random_states(states: Mapping[str, Any]) -> None:
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


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate()}
    if numpy := sys.modules.get("numpy"):
        states["numpy"] = numpy.random.get_state()
    if torch := sys.modules.get("torch"):
        states["torch"] = torch.get_rng_state()
        states["cuda"] = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return states


def _kind(component: Any) -> str:
    if callable(getattr(component, "state_dict", None)) and callable(getattr(component, "load_state_dict", None)):
        return "state_dict"
    if callable(getattr(component, "get_state", None)) and callable(getattr(component, "set_state", None)):
        return "torch-generator"
    return "numpy-generator" if hasattr(component, "bit_generator") else ""


def _get(component: Any) -> Any:
    match _kind(component):
        case "state_dict":
            return component.state_dict()
        case "torch-generator":
            return component.get_state()
    return component.bit_generator.state


def _set(component: Any, state: Any) -> None:
    match _kind(component):
        case "state_dict":
            component.load_state_dict(state)
        case "torch-generator":
            component.set_state(state)
        case _:
            component.bit_generator.state = state
