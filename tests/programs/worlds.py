"""Training that goes on with another number of ranks: `worlds.py HOW STEPS` under torchrun, HOW: ddp, fsdp or alone.

Every rank writes down which samples it took, the first one also the loss of the global batch.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import holdfast

SAMPLES, BATCH = 96, 12
inputs = torch.randn(SAMPLES, 16, generator=torch.Generator().manual_seed(1))
targets = inputs.cumsum(dim=1)[:, :4].sin()
how, steps = sys.argv[1], int(sys.argv[2])

torch.set_num_threads(1)
torch.manual_seed(7)
model: nn.Module = nn.Sequential(nn.Linear(16, 37), nn.LayerNorm(37), nn.Tanh(), nn.Linear(37, 4))
if how != "alone":
    dist.init_process_group("gloo")
if how == "ddp":
    model = DistributedDataParallel(model)
elif how == "fsdp":
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.9)
batches = holdfast.ShuffledBatches(SAMPLES, BATCH, seed=3)
run = holdfast.attach(model=model, optimizer=optimizer, scheduler=scheduler, batches=batches, every="5 steps")
rank, world = batches.rank, batches.world_size
with open(f"{os.environ['SEEN']}.{world}.{rank}", "a") as seen:
    for step in run.steps(steps):
        share = batches.next()
        loss = (model(inputs[share]) - targets[share]).square().mean() * batches.weight()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        whole = loss.detach() / world
        if world > 1:
            dist.all_reduce(whole)
        run.report(loss=whole)
        seen.write(json.dumps([step, share]) + "\n")
        seen.flush()
        if os.environ.get("DIE_AT") == f"{rank} {step}":
            os._exit(9)
if how != "alone":
    dist.barrier()
    os._exit(0)  # torch 2.13's gloo at times aborts a process that ends in order
