"""A small GPT that learns to write Python's own documentation, byte by byte.

Runs as it is (`python examples/gpt.py`), and on spot machines without a change (`examples/demo.yaml`).
"""

import argparse
import pydoc_data.topics

import torch
from torch import nn
from torch.nn import functional as F

import holdfast

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 96, 4, 3, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.05))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, seq, WIDTH]
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # int64[batch, seq] -> float[batch, seq, 256]
        return self.head(self.blocks(self.token(tokens) + self.place.weight[: tokens.shape[1]]))


def loss_on(model: Gpt, text: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=draw)
    windows = torch.stack([text[start : start + CONTEXT + 1] for start in starts]).long()
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=400)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)

    topics = pydoc_data.topics.topics
    text = torch.frombuffer(bytearray("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8)
    train, validate = text[: -len(text) // 10], text[-len(text) // 10 :]
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=arguments.steps)
    draw = torch.Generator().manual_seed(arguments.seed)

    run = holdfast.attach(model=model, optimizer=optimizer, scheduler=scheduler, draw=draw)
    for step in run.steps(arguments.steps):
        loss = loss_on(model, train, draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        run.report(loss=loss)
        if step % 50 == 0:
            print(f"step {step}: train loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        same = torch.Generator().manual_seed(1)
        validation = torch.stack([loss_on(model, validate, same) for _ in range(20)]).mean()
    print(f"validation loss {validation.item():.3f} after {arguments.steps} steps")


if __name__ == "__main__":
    main()
