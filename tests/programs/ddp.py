"""Attached training under DistributedDataParallel: the same batch at each step, however many ranks share it."""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import holdfast

SAMPLES, BATCH = 960, 24
inputs = torch.randn(SAMPLES, 16, generator=torch.Generator().manual_seed(1))
targets = inputs.cumsum(dim=1)[:, :4].sin()


def new_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def loss_of(model: nn.Module, step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
    """This rank's share of the batch's loss; DDP's mean over the ranks is the whole."""
    begin = (step - 1) * BATCH % SAMPLES
    mine = slice(begin + rank, begin + BATCH, world)
    return (model(inputs[mine]) - targets[mine]).square().mean(dim=1).sum() * world / BATCH


def main() -> None:
    """Until FULL steps were done by WORLD ranks."""
    full, world, pause_seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(new_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = holdfast.attach(model=model, optimizer=optimizer, every="10 steps")
    run.state.setdefault("full", 0)
    print(
        f"rank {dist.get_rank()} of {dist.get_world_size()} of attempt {os.environ.get('HOLDFAST_ATTEMPT')}", flush=True
    )
    for step in run.steps(100_000):
        loss = loss_of(model, step, dist.get_rank(), dist.get_world_size())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole = loss.detach() / dist.get_world_size()
        dist.all_reduce(whole)
        run.report(loss=whole, ranks=dist.get_world_size())
        run.state["full"] += dist.get_world_size() == world
        if run.state["full"] >= full:
            run.stop()
        time.sleep(pause_seconds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
