"""What supervision tells whoever watches: events, one line each, and progress in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

UpdateKind = Literal[
    "launched",
    "refused",
    "fallback",
    "waiting",
    "resumed",
    "committed",
    "notice",
    "preempted",
    "ended",
    "formed",
    "dissolved",
    "registered",
    "deregistered",
    "planned",
    "warned",
    "progress",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    kind: UpdateKind
    at: datetime
    attempt: int
    text: str
    """One line for people."""
    fields: dict[str, Any] = field(default_factory=dict)
    """`step`, `total_steps`, `metrics`, `phase`, `usd`, `machine`, `pool` ... as far as they are known."""
