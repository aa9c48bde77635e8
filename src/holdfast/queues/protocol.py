"""What Holdfast asks of a queue. Every broker delivers at least once; the results make that exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A claim on one item, for the queue's `visibility_seconds` from when it was given or extended."""

    body: bytes
    """As it was put."""
    deliveries: int
    """How often it was handed out, this time included; a lease that was handed back doesn't count."""
    receipt: Any = field(repr=False)
    """The broker's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """How many items wait, are leased and are dead. `approximate`: docs/queues.md says how far, broker by broker."""

    waiting: int
    leased: int
    dead: int
    approximate: bool = False


class Queue(Protocol):
    """Any number of threads may share one; a forked child opens its own.

    A broker that is away is asked again for about a minute, then every verb raises TransientError.
    """

    url: str
    """For people: without password."""

    def put(self, bodies: Sequence[bytes]) -> None:
        """All are held by the broker when it returns. After an error some may be: putting them again is allowed."""

    def lease(self, limit: int = 1, wait_seconds: float = 0.0) -> list[Lease]:
        """Up to `limit` items; none, when there was nothing to be had for `wait_seconds`.

        An item that came back `max_deliveries` times is not handed out again: it is dead.
        """

    def extend(self, leases: Sequence[Lease]) -> list[Lease]:
        """Hold them for `visibility_seconds` from now. Those that are lost: another has them, or may have."""

    def acknowledge(self, leases: Sequence[Lease]) -> None:
        """They are done, and gone from the queue. A lost one stays with whoever has it."""

    def hand_back(self, leases: Sequence[Lease]) -> None:
        """Others may have them at once, and nothing is held against them. A lost one stays with whoever has it."""

    def dead_letter(self, lease: Lease, reason: str) -> None:
        """Nobody is to try it again. A lost one stays with whoever has it."""

    def dead(self) -> list[tuple[bytes, str]]:
        """Bodies and reasons; they stay."""

    def depth(self) -> Depth: ...

    def close(self) -> None:
        """What is still leased comes back to others by itself, at the latest after `visibility_seconds`."""
