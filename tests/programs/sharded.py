"""Training that FSDP2 shards, with what makes sharding hard: `sharded.py STEPS` under torchrun, or alone.

Tied weights with fewer rows than two shards for each of three ranks, an evaluation after every step, and an average of the
parameters that is kept as shards. The first rank writes the loss of the end.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import holdfast

WORDS = 4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(WORDS, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embedding(words)).tanh())


class Average:
    def __init__(self, model: nn.Module) -> None:
        self.values = {name: one.detach().clone() for name, one in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        for name, one in model.named_parameters():
            self.values[name].lerp_(one.detach(), 0.1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.values = dict(state)


torch.set_num_threads(1)
torch.manual_seed(7)
words = torch.arange(12) % WORDS
model = Tied()
if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
batches = holdfast.ShuffledBatches(len(words), len(words), seed=3)
average = Average(model)
run = holdfast.attach(model=model, optimizer=optimizer, batches=batches, average=average, every="2 steps")
for _ in run.steps(int(sys.argv[1])):
    share = batches.next()
    loss = nn.functional.cross_entropy(model(words[share]), (words[share] + 1) % WORDS) * batches.weight()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for module in model.modules():
        getattr(module, "reshard", int)()  # the average is of the shards
    average.update(model)
    with torch.no_grad():
        model(words)
end = float(nn.functional.cross_entropy(model(words), (words + 1) % WORDS))
total = sum(getattr(one, "full_tensor", lambda one=one: one)().square().sum() for one in average.values.values())
if batches.rank == 0:
    with open(os.environ["SEEN"], "a") as seen:
        seen.write(f"{run.resumed_step} {end} {float(total)}\n")
if dist.is_initialized():
    dist.barrier()
    os._exit(0)  # torch 2.13's gloo at times aborts a process that ends in order
