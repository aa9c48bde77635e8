"""The market of `make demo`: what happens is fixed, a seed draws when."""

from __future__ import annotations

import random
import secrets
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
