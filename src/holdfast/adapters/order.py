"""What the order of an epoch is drawn from: the process's random states, and the generators of its loaders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from holdfast.checkpoint.state import random_states, set_random_states
from holdfast.errors import ConfigError


def order_of(loaders: Iterable[Any] = ()) -> dict[str, Any]:
    """Taken before an epoch's order is drawn; `put_back` has it drawn again."""
    return {"random": random_states(), "generators": [one.get_state() for one in _generators(loaders)]}


def put_back(order: dict[str, Any], loaders: Iterable[Any] = ()) -> None:
    """Raises ConfigError where the loaders have other generators than then: another order would be drawn unseen."""
    set_random_states(order["random"])
    here, there = _generators(loaders), order["generators"]
    if len(here) != len(there):
        raise ConfigError(
            f"the data loader and its samplers have {len(here)} generators, and had {len(there)} at the checkpoint; make "
            "the loader as it was then"
        )
    for generator, state in zip(here, there, strict=True):
        generator.set_state(state)


def _generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    """Of data loaders and their samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        for one in (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
            if isinstance(generator := getattr(one, "generator", None), torch.Generator):
                found.setdefault(id(generator), generator)
    return list(found.values())
