"""A small network under DistributedDataParallel: `python -m flows gang examples/gang/ddp.yaml`, or torchrun by hand.

The same batch however many ranks there are: each takes its share of it, so the loss does not depend on who is there.
"""

import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import holdfast

STEPS, BATCH = int(sys.argv[1]), 96
PAUSE_SECONDS = float(sys.argv[2]) if len(sys.argv) > 2 else 0.05

torch.set_num_threads(1)
torch.manual_seed(7)
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
inputs = torch.randn(960, 16)
targets = inputs.cumsum(dim=1)[:, :4].sin()

model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

run = holdfast.attach(model=model, optimizer=optimizer)
for step in run.steps(STEPS):
    begin = (step - 1) * BATCH % 960
    mine = slice(begin + rank, begin + BATCH, world)
    # DDP averages over ranks whose shares may differ by one sample: weigh each by its size.
    loss = (model(inputs[mine]) - targets[mine]).square().mean(dim=1).sum() * world / BATCH
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        whole = loss / world
        dist.all_reduce(whole)
    run.report(loss=whole, ranks=world)
    time.sleep(PAUSE_SECONDS)
dist.destroy_process_group()
