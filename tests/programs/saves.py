"""A training that saves 24 MB or more every few steps; `train` is for a fork server, which imports PyTorch once for all."""

import os
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

import holdfast

EVERY = 4

torch.optim.SGD(nn.Linear(1, 1).parameters())  # the first optimizer imports half of torch: before the forks, once


def train(steps: int, surroundings: Mapping[str, str], enough: Path, width: int) -> None:
    """`surroundings`: environment variables. It ends before `steps` when the file `enough` appears. `width`: 1,000 makes
    24 MB of state, 2,000 four times as much.
    """
    os.environ.update(surroundings)
    torch.set_num_threads(1)
    torch.manual_seed(7)
    random.seed(7)
    inputs, targets = torch.randn(64, 16), torch.randn(64, 4)
    model = nn.Sequential(
        nn.Linear(16, width), nn.Dropout(0.2), nn.BatchNorm1d(width), nn.Tanh(),
        *(nn.Linear(width, width) for _ in range(2)), nn.Linear(width, 4),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    batches = holdfast.ShuffledBatches(64, 4, seed=3)
    run = holdfast.attach(model=model, optimizer=optimizer, batches=batches)
    run.state.setdefault("mean", 0.0)
    for _ in run.steps(steps):
        chosen = batches.next()
        loss = (model(inputs[chosen] + random.random() * 1e-3) - targets[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.state["mean"] = 0.9 * run.state["mean"] + 0.1 * loss.item()
        run.report(loss=loss, mean=run.state["mean"])
        if enough.exists():
            run.stop()
