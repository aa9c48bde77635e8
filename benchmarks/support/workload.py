"""A real GPT with AdamW and steps of any length: a short one trains few of its parameters, and all belong to its state."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

HEAD_SIZE = 64
CONTEXT = 256
CLASSES_OF_A_SHORT_STEP = 512
PROJECTION_ALONE, NORM_ALONE = 0, -1
"""In place of a number of blocks: steps too short for one."""
SHORT_SECONDS = 0.02
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a step: the blocks that take part, from the top, how many tokens go through them, and how long it takes."""

    depth: int
    tokens: int
    seconds: float


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_SIZE
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden`: float[batch, tokens, width]"""
        batch, tokens, width = hidden.shape
        mixed = self.mix(self.norm_attention(hidden)).view(batch, tokens, 3, self.heads, HEAD_SIZE)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(attended.transpose(1, 2).reshape(batch, tokens, width))
        return hidden + self.shrink(functional.gelu(self.grow(self.norm_mlp(hidden))))


class GPT(nn.Module):
    """GPT-2's proportions (12 layers at a width of 768); the vocabulary makes up what is missing to `parameters`."""

    def __init__(self, parameters: int, device: str) -> None:
        super().__init__()
        layers = max(2, round((0.85 * parameters / 12 / HEAD_SIZE**2) ** (1 / 3)))
        width = HEAD_SIZE * layers
        vocabulary = max(CLASSES_OF_A_SHORT_STEP, (parameters - layers * (12 * width + 13) * width) // width - CONTEXT)
        with torch.device("meta"):  # torch's own initialisation of 100 M parameters takes longer than a save
            self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
        self.to_empty(device=device)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(1.0)

    def draw(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.uniform_(-0.02, 0.02)

    def forward(self, tokens: torch.Tensor, depth: int) -> torch.Tensor:
        """The loss of predicting each next token through the top `depth` blocks."""
        hidden = self.embedding(tokens[:, :-1]) + self.position.weight[: tokens.shape[1] - 1]
        if depth <= 0:
            if depth == PROJECTION_ALONE:
                hidden = hidden + self.blocks[-1].project(hidden)
            head, targets = self.embedding.weight[:CLASSES_OF_A_SHORT_STEP], tokens[:, 1:] % CLASSES_OF_A_SHORT_STEP
        else:
            for block in self.blocks[len(self.blocks) - depth :]:
                hidden = block(hidden)
            head, targets = self.embedding.weight, tokens[:, 1:]
        logits = functional.linear(self.norm(hidden), head)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Workload:
    """Model, optimizer with all of its state, and a step of real training."""

    def __init__(self, parameters: int, device: str, *, trained: bool = True) -> None:
        """`trained`: with one whole step done, so that the optimizer has its moments."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.device = device
        self.model = GPT(parameters, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self._depth, self._tokens = len(self.model.blocks), 4
        if trained:
            self.model.draw()
            self.step()

    def step(self) -> None:
        tokens = torch.randint(self.model.embedding.num_embeddings, (1, self._tokens + 1), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.model(tokens, self._depth).backward()
        self.optimizer.step()
        if self.device != "cpu":
            torch.cuda.synchronize()

    def tune(self, seconds: float) -> Shape:
        """A step of about `seconds`, by fewer parameters or more tokens."""
        depth = len(self.model.blocks) if seconds > SHORT_SECONDS else PROJECTION_ALONE
        shape = self._try(depth, 4)
        while shape.seconds > 1.1 * seconds and depth > NORM_ALONE:
            depth = min(depth - 1, int(depth * seconds / shape.seconds))
            shape = self._try(depth, 4)
        while shape.seconds < 0.85 * seconds and shape.tokens < CONTEXT - 1:
            longer = self._try(shape.depth, min(2 * shape.tokens, CONTEXT - 1))
            if longer.seconds > 1.25 * seconds:
                break
            shape = longer
        return shape

    def use(self, shape: Shape) -> None:
        """Only the parameters that take part are trained; the others keep their state, and belong to it."""
        self._depth, self._tokens = shape.depth, shape.tokens
        blocks = self.model.blocks
        live: list[nn.Module] = [self.model.norm, *blocks[len(blocks) - max(0, shape.depth) :]]
        if shape.depth == PROJECTION_ALONE:
            live.append(blocks[-1].project)
        elif shape.depth == len(blocks):
            live = [self.model]
        self.model.requires_grad_(False)
        for module in live:
            module.requires_grad_(True)
        self.step()

    def _try(self, depth: int, tokens: int) -> Shape:
        self.use(Shape(depth, tokens, 0.0))
        times: list[float] = []
        while len(times) < 2 or (sum(times) < 0.1 and len(times) < 30):
            times.append(timed(self.step))
        return Shape(depth, tokens, min(times))  # what it takes where nothing else runs

    def allocate_moments(self) -> None:
        """The optimizer's state as it is before its first step is loaded: memory that nobody has touched yet."""
        for parameter in self.model.parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.empty_like(parameter),
                "exp_avg_sq": torch.empty_like(parameter),
            }

    def tensors(self) -> Iterator[torch.Tensor]:
        """All of the state."""
        for parameter in self.model.parameters():
            yield parameter.data
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    @property
    def state_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def keep_freed_memory() -> None:
    """Have this process keep what it frees, as PyTorch does on a GPU. glibc else takes each step's large tensors from the
    system anew, tens of thousands of pages, and how long that takes depends on what the host did with them meanwhile.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def timed(what: Callable[[], Any]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began
