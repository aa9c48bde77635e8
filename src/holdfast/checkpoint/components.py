"""The parts of a training state, in a form that does not depend on how many processes train it, or how they share it.

Modules lose the names that wrappers add, and optimizers name their state by parameter instead of by number: so what
four ranks saved under FSDP2, one process can load, and the other way round.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.checkpoint.shards import is_dtensor
from holdfast.errors import ConfigError

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def kind_of(component: Any) -> str:
    """'' for what can't be a component."""
    torch = sys.modules.get("torch")
    if torch and isinstance(component, torch.nn.Module):
        return "module"
    if torch and isinstance(component, torch.optim.Optimizer):
        return "optimizer"
    if callable(getattr(component, "state_dict", None)) and callable(getattr(component, "load_state_dict", None)):
        return "state_dict"
    if callable(getattr(component, "get_state", None)) and callable(getattr(component, "set_state", None)):
        return "torch-generator"
    return "numpy-generator" if hasattr(component, "bit_generator") else ""


def unwrapped(module: Any) -> Any:
    """The user's own module inside DistributedDataParallel and torch.compile."""
    torch = sys.modules["torch"]
    parallel = getattr(torch.nn.parallel, "DistributedDataParallel", ())
    while True:
        if isinstance(module, parallel):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module._orig_mod
        else:
            return module


def own_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def put_back_shards(components: Mapping[str, Any]) -> None:
    """FSDP2 leaves a root's parameters whole after a forward pass without a backward: other objects, with other ids, than
    those that the optimizer has.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for component in components.values():
        if fsdp and kind_of(component) == "module":
            for module in component.modules():
                if isinstance(module, fsdp.FSDPModule):
                    module.reshard()


def module_state(module: Any) -> dict[str, Any]:
    return {own_name(name): value for name, value in unwrapped(module).state_dict().items()}


def parameter_names(components: Mapping[str, Any]) -> dict[int, str]:
    """id of a parameter -> 'component.name'."""
    names: dict[int, str] = {}
    for component_name, component in components.items():
        if kind_of(component) == "module":
            for name, parameter in unwrapped(component).named_parameters(remove_duplicate=False):
                names.setdefault(id(parameter), f"{component_name}.{own_name(name)}")
    return names


def tied_names(components: Mapping[str, Any]) -> dict[str, str]:
    """Further names of a parameter -> its first, each 'component.name'."""
    first = parameter_names(components)
    return {
        path: first[id(parameter)]
        for component_name, component in components.items()
        if kind_of(component) == "module"
        for name, parameter in unwrapped(component).named_parameters(remove_duplicate=False)
        if (path := f"{component_name}.{own_name(name)}") != first[id(parameter)]
    }


def optimizer_state(component_name: str, optimizer: Any, names: Mapping[int, str]) -> dict[str, Any]:
    """Its state by the parameters' names; torch's own form, by number, when a parameter is no attached module's. Raises
    ConfigError when that one is sharded: a number would not say how.
    """
    state: dict[str, Any] = optimizer.state_dict()
    named = _names_in_order(optimizer, names)
    if named is None:
        if any(is_dtensor(parameter) for parameter in parameters_of(optimizer)):
            raise ConfigError(
                f"{component_name} has sharded parameters (DTensor) that belong to no module given to attach(); pass the "
                "module too"
            )
        return state
    return {
        **state,
        "state": {named[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [named[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


def numbered_state(name: str, optimizer: Any, names: Mapping[int, str], saved: dict[str, Any]) -> dict[str, Any]:
    """The inverse, for this optimizer's order and grouping of the parameters. Raises ConfigError."""
    if not any(isinstance(one, str) for group in saved["param_groups"] for one in group["params"]):
        return saved
    named = _names_in_order(optimizer, names)
    if named is None:
        raise ConfigError(
            f"the checkpoint's {name} knows its parameters by name, but {name} has some that belong to no module given "
            "to attach(); pass the module too"
        )
    home = {one: group for group in saved["param_groups"] for one in group["params"]}
    if different := difference(set(named), set(home)):
        raise ConfigError(f"{name} has other parameters than the checkpoint's: {different}")
    for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=False):
        here, there = set(group) - set(old), set(old) - set(group)
        if here and there:  # one of them alone is another version's, or a scheduler's
            raise ConfigError(
                f"{name} is of another kind than the checkpoint's: {difference(set(group), set(old))}; use the same, or "
                "another run id"
            )
    now = {frozenset(names[id(one)] for one in group["params"]) for group in optimizer.param_groups} - {frozenset()}
    then = {frozenset(group["params"]) for group in saved["param_groups"]} - {frozenset()}
    if now != then:
        raise ConfigError(
            f"{name} has its parameters in {len(now)} groups, the checkpoint has them in {len(then)}, or in others: each "
            f"group has settings of its own; group them as the checkpoint does ({_in_short(then)}), or use another run id"
        )
    numbers = {one: number for number, one in enumerate(named)}
    groups = []
    for group in optimizer.param_groups:
        members = [names[id(parameter)] for parameter in group["params"]]
        old = home[members[0]] if members else {}
        groups.append({**group, **old, "params": [numbers[one] for one in members]})
    return {**saved, "state": {numbers[one]: values for one, values in saved["state"].items()}, "param_groups": groups}


def parameters_of(optimizer: Any) -> Iterator[Any]:
    for group in optimizer.param_groups:
        yield from group["params"]


def difference(here: set[str], there: set[str]) -> str:
    """Which names differ, in words; '' when none does."""
    said = []
    for what, names in (("the checkpoint lacks", here - there), ("the program lacks", there - here)):
        if names:
            shown = sorted(names)[:5]
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            said.append(f"{what} {', '.join(shown)}{more}")
    return "; ".join(said)


def _in_short(groups: set[frozenset[str]]) -> str:
    members = sorted(sorted(group) for group in groups)
    return "; ".join(f"{', '.join(one[:2])}{' ...' if len(one) > 2 else ''}" for one in members[:4])


def _names_in_order(optimizer: Any, names: Mapping[int, str]) -> list[str] | None:
    """By the numbers that `Optimizer.state_dict` gives them."""
    seen: dict[int, str] = {}
    for parameter in parameters_of(optimizer):
        if id(parameter) not in names:
            return None
        seen.setdefault(id(parameter), names[id(parameter)])
    return list(seen.values()) if len(set(seen.values())) == len(seen) else None
