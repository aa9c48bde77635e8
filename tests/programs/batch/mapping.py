"""Functions of a batch job, for tests: how long a batch takes and what goes wrong is in its records."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def double(records: list[dict[str, Any]]) -> list[int]:
    time.sleep(float(os.environ.get("BATCH_SECONDS", "0")))
    if any(record.get("poison") for record in records):
        raise ValueError("this record is poison")
    return [2 * record["n"] for record in records]


def begin() -> None:
    """Each worker leaves a note."""
    notes = Path(os.environ["NOTES"])
    notes.mkdir(parents=True, exist_ok=True)
    (notes / f"{os.environ['HOLDFAST_MEMBER']}.{os.environ['HOLDFAST_WORKER']}").touch()


def fail(records: list[Any]) -> list[Any]:
    raise RuntimeError("this function never works")


def length(lines: list[str]) -> list[int]:
    return [len(line) for line in lines]


def characters(records: list[dict[str, Any]]) -> list[int]:
    time.sleep(float(os.environ["BATCH_SECONDS"]))
    return [len(record["text"]) for record in records]
