"""Fits a library of markets to traces: `python -m benchmarks.support.fit_hazards [DIR]` writes placement/fitted_hazards.py.

A hidden Markov model: in each hour a zone is in one of a few markets; a market has a probability, by age, that a stretch with or
without capacity ends at a tick. Expectation and maximization, begun from how much capacity there was in the two days
around; every zone weighs the same by its length in hours; markets that were seen little are drawn to what all have in common.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from holdfast.market.traces import Trace, read_traces
from holdfast.placement.hazards import Library, library_of_ticks

TICK_SECONDS = 600.0
EDGES_TICKS = (1, 2, 3, 5, 8, 13, 22, 36, 60, 100, 180)
"""Ages, in ticks, at which bins begin: a stretch's first tick has the age 1."""
MARKETS, ROUNDS = 5, 25
BLOCK_TICKS = 6
COMMON_TICKS = 20.0
"""What all have in common counts for so many ticks of every bin."""
STAY_BLOCKS = 48.0
"""A market is thought to last so long, before anything was seen."""
AROUND_BLOCKS = 49
FITTED = Path(__file__).parents[2] / "src" / "holdfast" / "placement" / "fitted_hazards.py"


def fit(traces: Sequence[Trace], markets: int = MARKETS, source: str = "") -> Library:
    """On ticks of TICK_SECONDS; what is cut off at a trace's beginning has no known age and is left out."""
    counted = [_counts(trace) for trace in traces]
    ticks = np.zeros((len(counted), max(len(one[0]) for one in counted), *counted[0][0].shape[1:]))
    ended = np.zeros_like(ticks)
    for place, (these, those) in enumerate(counted):
        ticks[place, : len(these)], ended[place, : len(those)] = these, those
    inside = np.arange(ticks.shape[1]) < np.array([len(one[0]) for one in counted])[:, None]
    common = (ended.sum((0, 1)) + 0.5) / (ticks.sum((0, 1)) + 2)
    shares = _by_capacity([one[0] for one in counted], markets, ticks.shape[1])
    switching = np.full((markets, markets), 1 / STAY_BLOCKS / max(1, markets - 1))
    np.fill_diagonal(switching, 1 - 1 / STAY_BLOCKS if markets > 1 else 1.0)
    weights = np.full(markets, 1 / markets)
    hazards = np.zeros((markets, *common.shape))
    for _ in range(ROUNDS):
        shares = shares * inside[..., None]
        of_ticks = np.einsum("ztk,ztsb->ksb", shares, ticks)
        of_ends = np.einsum("ztk,ztsb->ksb", shares, ended)
        hazards = np.clip((of_ends + COMMON_TICKS * common) / (of_ticks + COMMON_TICKS), 1e-4, 0.95)
        likely = np.einsum("ztsb,ksb->ztk", ended, np.log(hazards))
        likely += np.einsum("ztsb,ksb->ztk", ticks - ended, np.log(1 - hazards))
        shares, moves = _smooth(likely, switching, weights, inside)
        moves = moves + 2 / markets + 2 * STAY_BLOCKS * np.eye(markets)
        switching = moves / moves.sum(axis=1, keepdims=True)
        weights = np.array([share[here].mean(axis=0) for share, here in zip(shares, inside, strict=True)]).mean(axis=0)
    return library_of_ticks(EDGES_TICKS, hazards, switching, weights / weights.sum(), TICK_SECONDS, source)


def _counts(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Ticks, and ends at them, by block, state and bin."""
    states = np.frombuffer(trace.available, np.uint8).astype(int)
    place = np.arange(len(states))
    begins = np.append(True, states[1:] != states[:-1])
    since = np.maximum.accumulate(np.where(begins, place, 0))
    bins = np.searchsorted(EDGES_TICKS, place - since + 1, side="right") - 1
    blocks = (len(states) - 1) // BLOCK_TICKS
    ticks = np.zeros((blocks, 2, len(EDGES_TICKS)))
    ended = np.zeros_like(ticks)
    counted = place[: blocks * BLOCK_TICKS][since[: blocks * BLOCK_TICKS] > 0]
    np.add.at(ticks, (counted // BLOCK_TICKS, states[counted], bins[counted]), 1)
    counted = counted[states[counted + 1] != states[counted]]
    np.add.at(ended, (counted // BLOCK_TICKS, states[counted], bins[counted]), 1)
    return ticks, ended


def _by_capacity(ticks: Sequence[np.ndarray], markets: int, blocks: int) -> np.ndarray:
    """A first guess: markets differ in how much capacity there is."""
    around = []
    for one in ticks:
        padded = np.pad(one[:, 1].sum(-1) / BLOCK_TICKS, AROUND_BLOCKS // 2, mode="symmetric")
        around.append(np.convolve(padded, np.ones(AROUND_BLOCKS) / AROUND_BLOCKS, "valid")[: len(one)])
    middles = np.quantile(np.concatenate(around), (np.arange(markets) + 0.5) / markets)
    shares = np.zeros((len(ticks), blocks, markets))
    for place, capacity in enumerate(around):
        distance = -((capacity[:, None] - middles) ** 2) / 0.02
        near = np.exp(distance - distance.max(axis=1, keepdims=True))
        shares[place, : len(capacity)] = near / near.sum(axis=1, keepdims=True)
    return shares


def _smooth(likely: Any, switching: Any, weights: Any, inside: Any) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the markets in every block given all blocks, and how often which followed which. Forward, then backward."""
    zones, blocks, _ = likely.shape
    seen = np.exp(np.clip(likely - likely.max(-1, keepdims=True), -30, 0))
    forward, scale = np.zeros_like(seen), np.ones((zones, blocks, 1))
    for block in range(blocks):
        before = forward[:, block - 1] @ switching if block else np.tile(weights, (zones, 1))
        forward[:, block] = before * seen[:, block]
        scale[:, block] = forward[:, block].sum(-1, keepdims=True)
        forward[:, block] /= scale[:, block]
    backward, after = np.ones_like(seen), np.zeros_like(seen)
    for block in range(blocks - 2, -1, -1):
        after[:, block + 1] = seen[:, block + 1] * backward[:, block + 1] / scale[:, block + 1]
        backward[:, block] = after[:, block + 1] @ switching.T
    after *= inside[..., None]
    moves = np.tensordot(forward[:, :-1], after[:, 1:], axes=((0, 1), (0, 1))) * switching
    shares = forward * backward
    return shares / shares.sum(-1, keepdims=True), moves


def as_code(library: Library) -> str:
    def table(rows: Any) -> str:
        return "(" + ", ".join(table(row) if isinstance(row, tuple) else f"{row:.6g}" for row in rows) + ",)"

    return f'''"""The library of markets that policies begin with. Written by `python -m benchmarks.support.fit_hazards`; don't edit.

{library.source}
"""

from holdfast.placement.hazards import Library

FITTED = Library(
    edges_seconds={table(library.edges_seconds)},
    rates={table(library.rates)},
    switching={table(library.switching)},
    weights={table(library.weights)},
    source={library.source!r},
)
'''


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[3] / "shared" / "traces"
    traces = [trace.on_ticks_of(TICK_SECONDS) for trace in read_traces(folder)]
    hours = sum(trace.seconds for trace in traces) / 3600
    source = (
        f"Parameters only, fitted to {hours:.0f} hours of {len(traces)} public spot traces "
        "(AWS, four types in us-west-2a in October 2022; V100 in four zones in February 2023)."
    )
    FITTED.write_text(as_code(fit(traces, source=source)))
    print(f"Written to {FITTED}; format it: ruff format {FITTED}")


if __name__ == "__main__":
    main()
