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


def batch_demo_account(seed: int) -> LocalAccount:
    """A cloud that takes two of its machines away soon, one with notice and one without; a third later on."""
    draw = random.Random(seed)
    spot = [
        Fate(after_seconds=draw.uniform(15, 20), notice=True, notice_seconds=8),
        Fate(after_seconds=draw.uniform(25, 30), notice=False),
        Fate(),
        Fate(after_seconds=draw.uniform(20, 30), notice=True, notice_seconds=8),
    ]
    return LocalAccount(root=Path(f".holdfast/clouds/demo-{secrets.token_hex(4)}"), market=ScriptedMarket(spot=spot))


def write_documents(count: int | None) -> Path:
    """So many of the documents that Python brings, one JSON line for each."""
    from examples.documents import documents

    path = Path(".holdfast/documents.jsonl").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in islice(documents(), count)))
    return path
