"""Programs that are attached to one run, attempt after attempt, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.checkpoint.commits import Checkpoints
from holdfast.runtime import contract
from holdfast.storage import DirectoryStore


class Started:
    """Where programs of one run are started: each with the environment of its attempt."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.store = DirectoryStore(folder / "store")
        self.checkpoints = Checkpoints(self.store, "run")

    def attempt(self, number: int, **options: Any) -> Any:
        for name, value in (
            (contract.STORE, self.store.url),
            (contract.RUN, "run"),
            (contract.ATTEMPT, str(number)),
            (contract.TELEMETRY, str(self.folder / f"telemetry-{number}")),
        ):
            self._monkeypatch.setenv(name, value)
        return holdfast.attach(**options)

    def events(self, number: int, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / f"telemetry-{number}").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 2))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(3, 6)).square().mean().backward()
    optimizer.step()


def train(run: Any, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in run.steps(steps):
        step(model, optimizer)
