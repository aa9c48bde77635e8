"""Two ranks with another module each under one name, as stages of a pipeline are."""

import torch.distributed as dist
from torch import nn

import holdfast

dist.init_process_group("gloo")
stage = {("second" if dist.get_rank() else "first"): nn.Linear(3, 3)}
run = holdfast.attach(model=nn.ModuleDict(stage))
for _ in run.steps(3):
    pass
