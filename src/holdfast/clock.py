"""Time as the cloud counts it. Prices, notices, leases and bills follow this clock and no other."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

CLOCK_VARIABLE = "HOLDFAST_CLOCK"


class Clock(Protocol):
    speed: float
    """Seconds of this clock per second of the wall."""

    def now(self) -> datetime: ...

    def sleep(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class WallClock:
    """The computer's own clock, in aware UTC."""

    speed: float = 1.0

    def now(self) -> datetime:
        return datetime.now(UTC)

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))


@dataclass(frozen=True, slots=True)
class FastClock:
    """A clock that showed `origin` when the wall's showed the same, and has run `speed` times as fast since."""

    origin: datetime
    speed: float

    def now(self) -> datetime:
        return self.origin + (datetime.now(UTC) - self.origin) * self.speed

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds) / self.speed)


def clock_to_text(clock: Clock) -> str:
    """The value of HOLDFAST_CLOCK that makes `clock_from_environment` return an equal clock."""
    return f"{clock.origin.isoformat()} {clock.speed!r}" if isinstance(clock, FastClock) else ""


def clock_from_text(text: str) -> Clock:
    if not text:
        return WallClock()
    origin, speed = text.split()
    return FastClock(datetime.fromisoformat(origin), float(speed))


def clock_from_environment() -> Clock:
    """A machine's clock: the wall's, unless whoever made the machine set another."""
    return clock_from_text(os.environ.get(CLOCK_VARIABLE, ""))


def in_seconds(seconds: float, now: datetime) -> datetime:
    return now + timedelta(seconds=seconds)
