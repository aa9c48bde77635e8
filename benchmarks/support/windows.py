"""Stretches of one training loop, with a save or without: what a save costs is the difference.

A window with a save lasts from the save to a little after it is durable. Windows without one lie before and after it,
and their mean step is what the same steps would have taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

TAIL_SECONDS = 0.1
"""A window goes on so long after the save is durable, since what is tidied up then is the save's as well."""
PATIENCE_SECONDS = 120.0


class Saver(Protocol):
    """A system that saves while a loop goes on."""

    def save(self) -> None:
        """Called between two steps; returns when the next one may begin."""

    def after_step(self) -> None:
        """Called after each step of the window but the last."""

    def durable_at(self) -> float | None:
        """When the save became durable, by time.perf_counter; None: not yet."""

    def catch_up(self) -> None:
        """Called after the window, before the next."""

    def close(self) -> None: ...


@dataclass(slots=True)
class Window:
    began: float
    ends: list[float] = field(default_factory=list)
    """Of each step; the save and the first step are one."""
    between: list[float] = field(default_factory=list)
    """Seconds that the saver took between two later steps."""
    durable_at: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ends[-1] - self.began

    @property
    def steps(self) -> list[float]:
        return [end - began for began, end in zip([self.began, *self.ends], self.ends, strict=False)]

    @property
    def durable_seconds(self) -> float:
        return self.durable_at - self.began

    def extra_seconds(self, quiet_step: float) -> float:
        """What the loop took longer, all causes, than the same number of steps of `quiet_step` seconds."""
        return self.seconds - len(self.ends) * quiet_step

    def steps_while_persisting(self) -> list[float]:
        """Those that lay for the greater part between the first step, which the save holds up, and the end of the save.

        Where the save is over before a second step is half done there is none but that second one.
        """
        begins = [self.began, *self.ends][:-1]
        steps = list(zip(begins, self.ends, strict=True))[1:]
        found = [end - began for began, end in steps if self.durable_at - began >= (end - began) / 2]
        return found or [end - began for began, end in steps[:1]]


def quiet(step: Callable[[], None], seconds: float, look: Callable[[], object]) -> Window:
    """`look` is what a window with a save asks after every step: its cost is in both, and in no difference."""
    window = Window(time.perf_counter())
    while not window.ends or window.seconds < seconds:
        step()
        window.ends.append(time.perf_counter())
        look()
    return window


def saving(step: Callable[[], None], saver: Saver) -> Window:
    window = Window(time.perf_counter())
    saver.save()
    while True:
        step()
        now = time.perf_counter()
        window.ends.append(now)
        durable_at = saver.durable_at()
        if durable_at is not None and now > durable_at + TAIL_SECONDS and len(window.ends) > 1:
            window.durable_at = durable_at
            return window
        if now > window.began + PATIENCE_SECONDS:
            raise SystemExit(f"{type(saver).__name__} made nothing durable in {PATIENCE_SECONDS:.0f} s")
        saver.after_step()
        window.between.append(time.perf_counter() - now)


@dataclass(slots=True)
class Series:
    """The windows of one system, each with the quiet step around it."""

    windows: list[Window] = field(default_factory=list)
    quiet_steps: list[float] = field(default_factory=list)
    slow_downs: list[float] = field(default_factory=list)

    def add(self, window: Window, before: Window, after: Window) -> None:
        self.windows.append(window)
        self.quiet_steps.append((before.seconds + after.seconds) / (len(before.ends) + len(after.ends)))
        usual = median(before.steps + after.steps)
        self.slow_downs.append(100 * (median(window.steps_while_persisting()) / usual - 1))

    @property
    def extra_seconds(self) -> list[float]:
        return [one.extra_seconds(step) for one, step in zip(self.windows, self.quiet_steps, strict=True)]

    @property
    def durable_seconds(self) -> list[float]:
        return [one.durable_seconds for one in self.windows]
