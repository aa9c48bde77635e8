"""What the workers of the batch benchmark import: the example's model and a function that does nothing.

Every `setup` leaves a file where HOLDFAST_READY says, when the model is loaded and warm.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

READY = "HOLDFAST_READY"
WARM_UP = [{"text": "Warm up. " * length} for length in (1, 4, 16, 64)] * 8


def load() -> Any:
    encoder = warm()
    ready()
    return encoder


def warm() -> Any:
    from examples import embed

    encoder = embed.load()
    embed.embed(WARM_UP, encoder)
    return encoder


def embeddings(records: list[dict[str, Any]], encoder: Any) -> list[Any]:
    from examples import embed

    return embed.embed(records, encoder)


def ready() -> None:
    Path(os.environ[READY], str(os.getpid())).touch()


def nothing(records: list[Any]) -> list[None]:
    return [None] * len(records)
