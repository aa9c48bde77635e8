"""A small training run in which everything that can make two runs differ takes part."""

import os
import random
import sys
import time

import numpy
import torch
from torch import nn

import holdfast

STEPS, PAUSE_SECONDS = int(sys.argv[1]), float(sys.argv[2])

torch.set_num_threads(1)
torch.manual_seed(7)
random.seed(7)
numpy.random.seed(7)
inputs, targets = torch.randn(256, 16), torch.randn(256, 4)
model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.2), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
batches = holdfast.ShuffledBatches(256, 24, seed=3)

run = holdfast.attach(model=model, optimizer=optimizer, scheduler=scheduler, batches=batches)
run.state.setdefault("mean", 0.0)
log = os.open(os.environ["TRAINED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for step in run.steps(STEPS):
    chosen = batches.next()
    noise = random.random() * 1e-3 + float(numpy.random.rand()) * 1e-3
    loss = (model(inputs[chosen] + noise) - targets[chosen]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    run.state["mean"] = 0.9 * run.state["mean"] + 0.1 * loss.item()
    run.report(loss=loss, mean=run.state["mean"])
    time.sleep(PAUSE_SECONDS)
    os.write(log, f"{step}\n".encode())  # what was really trained, told by nobody but the program
