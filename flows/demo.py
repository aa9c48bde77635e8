"""The markets of `make demo` and `make demo-batch`: what happens is fixed, a seed draws when."""

from __future__ import annotations

import json
import random
import secrets
from itertools import islice
from pathlib import Path

from blocks.accounts import LocalAccount
from holdfast.drivers.local.config import Fate, ScriptedMarket

DEMO_ACCOUNT = "demo"
DEMO_CLOCK_SPEED = 20.0


def demo_account(seed: int) -> LocalAccount:
    """A cloud that preempts with notice, then without; then fails three times in a row, so that on-demand is due."""
    draw = random.Random(seed)
    spot = [
        Fate(at_step=draw.randint(170, 190), notice=True),
        Fate(at_step=draw.randint(385, 399), notice=False),
        Fate(refuse=True),
        Fate(in_phase="resume", notice=False),
        Fate(after_seconds=draw.uniform(20, 40), notice=False),
    ]
    return LocalAccount(
        root=Path(f".holdfast/clouds/demo-{secrets.token_hex(4)}"),
        clock_speed=DEMO_CLOCK_SPEED,
        market=ScriptedMarket(spot=spot),
    )


BATCH_DEMO_ACCOUNT = "demo-batch"
BATCH_DEMO_CHANGES = {"batch_size": 20, "visibility_seconds": 30.0}
"""Batches so small that there is something to see on a slow computer, and soon another's when their machine has died."""


def batch_demo_account(seed: int, documents: int) -> LocalAccount:
    """A cloud that takes machines away once they have done some of the documents: with notice, without, with notice."""
    draw = random.Random(seed)

    def some() -> int:
        return max(1, round(documents * draw.uniform(0.05, 0.08)))

    spot = [
        Fate(at_step=some(), notice=True, notice_seconds=8),
        Fate(at_step=some(), notice=False),
        Fate(),
        Fate(at_step=some(), notice=True, notice_seconds=8),
    ]
    return LocalAccount(root=Path(f".holdfast/clouds/demo-{secrets.token_hex(4)}"), market=ScriptedMarket(spot=spot))


def write_documents(count: int | None) -> tuple[Path, int]:
    """So many of the documents that Python brings, one JSON line for each; their file and number."""
    from examples.documents import documents

    path = Path(".holdfast/documents.jsonl").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one) + "\n" for one in islice(documents(), count)]
    path.write_text("".join(lines))
    return path, len(lines)
