"""A training whose snapshots can be looked at."""

from __future__ import annotations

import json
from typing import Any

import torch

from holdfast.checkpoint.image import read_places
from holdfast.checkpoint.slots import Slot
from holdfast.checkpoint.snapshot import Snapshot, Snapshots
from holdfast.checkpoint.state import TrainingState
from holdfast.checkpoint.tensors import dtypes


class Training:
    """A model, its optimizer, and snapshots of both; `seen` is what the last complete snapshot holds."""

    def __init__(self, model: torch.nn.Module, optimizer: Any = None, user: dict[str, Any] | None = None) -> None:
        self.model = model
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)
        self.offered: list[Snapshot] = []
        self.renewed: list[list[Slot]] = []
        components = {"model": model, "optimizer": self.optimizer}
        self.snapshots = Snapshots(
            TrainingState(components, user or {}), self.offered.append, lambda slots: self.renewed.append(slots)
        )

    def gradients(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 8)).sum().backward()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()

    def live(self) -> dict[str, torch.Tensor]:
        found = {f"model.{name}": value.clone() for name, value in self.model.state_dict().items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                found[f"optimizer.state.model.{names[id(parameter)]}.{key}"] = value.clone()
        return found

    def seen(self) -> dict[str, torch.Tensor]:
        self.snapshots.settle()  # its copy is over when the optimizer goes on, its offer may come a moment later
        slot = self.offered[-1].slot
        assert slot.take() and slot.number == self.offered[-1].number
        data = bytes(slot.image())
        slot.give_back()
        return {
            name: torch.frombuffer(bytearray(data[place.start : place.stop] or b"\0"), dtype=torch.uint8)[
                : place.stop - place.start
            ]
            .view(dtypes()[place.spec.dtype])
            .reshape(place.spec.shape)
            for name, place in read_places(data, len(data)).items()
            if not name.startswith("random.")
        }

    def words(self) -> dict[str, Any]:
        slot = self.offered[-1].slot
        slot.take(wait=True)
        try:
            return dict(json.loads(slot.words()))
        finally:
            slot.give_back()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def wide() -> torch.nn.Module:
    """Large enough that its copy is left to the thread."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 4096), torch.nn.BatchNorm1d(4096).eval(), torch.nn.Linear(4096, 64))
