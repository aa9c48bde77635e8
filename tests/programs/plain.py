"""Training that knows torch.distributed.checkpoint and nothing of Holdfast: `plain.py FIRST LAST FROM TO [KEY=NAME ...]`.

FROM and TO: DCP folders, or "-". With torchrun the model is sharded (FSDP2). Prints a line per step: number and loss.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

first, last, begin, end = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
torch.manual_seed(7)
model = nn.Sequential(nn.Linear(16, 37), nn.LayerNorm(37), nn.Tanh(), nn.Linear(37, 4))
world = int(os.environ.get("WORLD_SIZE", "1"))
if world > 1:
    dist.init_process_group("gloo")
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
decayed = [one for one in model.parameters() if one.ndim > 1]
plain = [one for one in model.parameters() if one.ndim <= 1]
optimizer = torch.optim.AdamW([{"params": plain, "weight_decay": 0.0}, {"params": decayed}], lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)


def state() -> dict:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optim": optimizer_state, "scheduler": scheduler.state_dict(), "step": last}


if begin != "-":
    loaded = state()
    del loaded["step"]
    dcp.load(loaded, checkpoint_id=begin)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    scheduler.load_state_dict(loaded["scheduler"])
for step in range(first, last + 1):
    inputs = torch.randn(12, 16, generator=torch.Generator().manual_seed(step))
    loss = (model(inputs) - inputs.cumsum(dim=1)[:, :4].sin()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(json.dumps([step, loss.item()]), flush=True)
if end != "-":
    dcp.save(state(), checkpoint_id=end)
if dist.is_initialized():
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's that is not over by then makes the interpreter's end an abort, now and then
