"""What a mixed-precision training of many ranks is made of goes through `attach`, and the ranks' gradients add up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import holdfast
from holdfast import ResumableLoader, ShuffledBatches
from holdfast.runtime import contract

SAMPLES, BATCH, STEPS = 10, 8, 4


# -- through attach ---------------------------------------------------------------------------------------------------


def dataset() -> TensorDataset:
    drawn = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(SAMPLES, 6, generator=drawn), torch.randn(SAMPLES, 2, generator=drawn))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def loader_of(kind: str) -> Any:
    batches = ShuffledBatches(SAMPLES, BATCH, seed=1, rank=0, world_size=1)
    if kind == "torchdata":
        return StatefulDataLoader(dataset(), batch_sampler=batches, num_workers=2)
    return ResumableLoader(dataset(), batches, num_workers=2)


class Training:
    """fp16 with a scaler that backs off and grows, an average of the weights, a schedule of two parts."""

    def __init__(self, loader: str) -> None:
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        first = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=4)
        then = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(self.optimizer, [first, then], [5])
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=0)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.loader = loader_of(loader)
        self.scales: list[float] = []

    def run(self, until: int, total: int) -> int:
        run = holdfast.attach(
            **{name: part for name, part in vars(self).items() if name != "scales"}, every="1000 steps"
        )
        batches: Iterator[Any] = (
            self.loader.endless() if isinstance(self.loader, ResumableLoader) else iter(self.loader)
        )
        for step, (x, y) in zip(run.steps(total), batches, strict=False):
            with torch.autocast("cpu", torch.float16):
                loss = (self.model(x) - y).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            if step == 3:
                self.model[0].weight.grad[0, 0] = float("inf")  # the scaler must skip this step, and back off
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scales.append(self.scaler.get_scale())
            self.average.update_parameters(self.model)
            self.scheduler.step()
            self.plateau.step(loss.item())
            if step == until:
                run.stop()
        return run.resumed_step


@pytest.mark.filterwarnings("ignore:.*scheduler", "ignore:.*set_vital")
@pytest.mark.parametrize("loader", ["resumable", "torchdata"])
def test_a_mixed_precision_training_goes_on_to_the_bit(
    loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady = Training(loader)
    assert steady.run(until=12, total=12) == 0

    monkeypatch.setenv(contract.STORE, tmp_path.as_uri())
    monkeypatch.setenv(contract.RUN, "mixed")
    for attempt, (until, resumed) in enumerate([(1, 0), (3, 1), (8, 3), (12, 8)], start=1):
        monkeypatch.setenv(contract.ATTEMPT, str(attempt))
        training = Training(loader)
        assert training.run(until, total=12) == resumed
        assert training.scales == steady.scales[resumed:until]
    assert len(set(steady.scales)) > 2
    for name in ("model", "average"):
        ends = [getattr(each, name).state_dict() for each in (steady, training)]
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert training.optimizer.param_groups[0]["lr"] == steady.optimizer.param_groups[0]["lr"]


# -- between ranks ----------------------------------------------------------------------------------------------------


def losses_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - y).square().mean()


def train_a_rank(rank: int, world_size: int, folder: str) -> None:
    """Three trainings of the same model: DDP by whole shares, DDP and FSDP2 by pieces of one or two samples."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    inputs, targets = dataset().tensors

    model: Any = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = ResumableLoader(dataset(), ShuffledBatches(SAMPLES, BATCH, seed=1), num_workers=1)
    assert loader.batches.world_size == world_size
    for x, y in islice(loader.endless(), STEPS):
        optimizer.zero_grad()
        (losses_of(model, x, y) * loader.batches.weight()).backward()
        optimizer.step()
    ends = {"shares": model.module.state_dict()}

    for name, wrap in (("pieces", DistributedDataParallel), ("sharded", fully_shard)):
        model = wrap(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = ShuffledBatches(SAMPLES, BATCH, seed=1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for piece, weight in batches.micro_batches(batches.next(), largest=2):
                (losses_of(model, inputs[piece], targets[piece]) * weight).backward()
            optimizer.step()
        ends[name] = getattr(model, "module", model).state_dict()
    ends["sharded"] = {
        key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in ends["sharded"].items()
    }
    if rank == 0:
        torch.save(ends, os.path.join(folder, "ends"))
    distributed.destroy_process_group()


def test_three_ranks_with_unequal_shares_learn_what_one_process_learns(tmp_path: Path) -> None:
    """Ten samples in batches of eight: shares of 3, 3 and 2, then of 1, 1 and none."""
    multiprocessing.start_processes(train_a_rank, args=(3, str(tmp_path)), nprocs=3, start_method="fork")
    ends = torch.load(tmp_path / "ends")

    inputs, targets = dataset().tensors
    model, batches = network(), ShuffledBatches(SAMPLES, BATCH, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        chosen = batches.next()
        optimizer.zero_grad()
        losses_of(model, inputs[chosen], targets[chosen]).backward()
        optimizer.step()
    assert set(ends) == {"shares", "pieces", "sharded"}
    for name, end in ends.items():
        for key, value in model.state_dict().items():
            assert torch.allclose(end[key], value, rtol=1e-5, atol=1e-6), (name, key)
