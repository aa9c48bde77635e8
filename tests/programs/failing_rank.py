"""Two ranks; the second one's second snapshot comes to nothing: `failing_rank.py STEPS` under torchrun."""

import logging
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import holdfast
from holdfast.checkpoint import copying, snapshot

logging.basicConfig()
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
model = DistributedDataParallel(nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100)))  # each rank saves one
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run = holdfast.attach(model=model, optimizer=optimizer, every="50 steps")
copies = 0


def copy_beside(pairs: list[copying.Pair]) -> None:
    global copies
    copies += 1
    if copies == 2 and dist.get_rank() == 1:
        raise OSError("no memory")
    copying.copy_beside(pairs)


snapshot.copy_beside = copy_beside
for _ in run.steps(int(sys.argv[1])):
    time.sleep(0.002 * (1 + dist.get_rank()))
    optimizer.zero_grad()
    model(torch.randn(4, 100)).square().mean().backward()
    optimizer.step()
dist.destroy_process_group()
