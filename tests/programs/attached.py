"""The training of plain.py, with Holdfast's three lines: `attached.py STEPS`."""

import os
import sys
import time

import torch
from torch import nn

import holdfast

torch.set_num_threads(1)
torch.manual_seed(8)  # other weights than plain.py begins with: what goes on is what was loaded
model = nn.Sequential(nn.Linear(16, 37), nn.LayerNorm(37), nn.Tanh(), nn.Linear(37, 4))
decayed = [one for one in model.parameters() if one.ndim > 1]
plain = [one for one in model.parameters() if one.ndim <= 1]
optimizer = torch.optim.AdamW([{"params": plain, "weight_decay": 0.0}, {"params": decayed}], lr=0.01)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
run = holdfast.attach(model=model, optimizer=optimizer, scheduler=scheduler, every="2 steps", max_to_keep=10)
print("state", dict(run.state), flush=True)
for step in run.steps(int(sys.argv[1])):
    inputs = torch.randn(12, 16, generator=torch.Generator().manual_seed(step))
    loss = (model(inputs) - inputs.cumsum(dim=1)[:, :4].sin()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    run.state["seen"] = 12 * step
    run.report(loss=loss)
    time.sleep(float(os.environ.get("PAUSE", "0")))
