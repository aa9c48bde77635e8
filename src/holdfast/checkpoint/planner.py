"""What to do with the seconds that an interruption notice leaves, and whether they will be enough. Values in, a decision out.

At the notice what is there is committed at once: a notice is a promise that clouds do not always keep. Then the training
goes on, and commits once more as late as is safe. That costs nothing: whoever leaves after the first commit has waited
once for a commit to become durable, and so has whoever leaves after the second, but the machine has trained in between;
the restart is paid in both cases, and the replacement makes up for an early start exactly what this machine trains
meanwhile. It gains where a replacement is not to be had at once, and on AWS, where an instance that EC2 interrupts in its
first hour is free, and one that ends itself is not. Where the window is too short for a second commit, further steps would
be lost, so the program leaves as soon as the first is durable, and the replacement begins earlier.

Of a state that can't become durable in the window nothing is begun, unless a commit under way will still make it.
`window_warning` says that beforehand, by the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from holdfast.runtime.contract import NoticeKind

WINDOWS_SECONDS = {"GCP": 30.0, "AWS": 120.0}
"""Between the notice and the reclaim, at best."""
MARGIN_SECONDS = 2.0
"""Kept free before the reclaim: to leave, to ship the last log lines, and for two clocks that disagree."""
LEAST_HEADROOM = 1.25
"""Nothing is planned on its measured worst alone: where few were measured, the next may well be worse."""
SHARE_OF_THE_LINK = 0.75
"""Saving may keep the link busy for this share of the time: the rest is for retries, logs and other users of it."""
READABLE_SECONDS = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 450, 600, 900, 1200, 1800, 2700, 3600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of recent measurements of one thing, in seconds of the clock that the notice speaks of."""

    quickest: float
    median: float
    worst: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread:
        """Raises ValueError when there is none."""
        known = sorted(seconds)
        if not known:
            raise ValueError("a spread needs at least one measurement")
        middle = len(known) // 2
        return cls(quickest=known[0], median=(known[middle] + known[~middle]) / 2, worst=known[-1])

    @property
    def safe(self) -> float:
        """What a plan counts on: as far beyond the worst as that was beyond the median, and at least a quarter."""
        return max(LEAST_HEADROOM * self.worst, 2 * self.worst - self.median)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    copy_seconds: Spread
    """From the end of a step until its state is copied."""
    durable_seconds: Spread
    """From the end of the copy to the visible manifest, of a save that waits for no other."""
    step_seconds: Spread
    size_bytes: int
    """Of one checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    kind: NoticeKind
    now: datetime
    reclaim_at: datetime | None
    """None: not known. A rebalance recommendation has none; of another kind of notice it means any moment."""

    @property
    def seconds_left(self) -> float:
        return (self.reclaim_at - self.now).total_seconds() if self.reclaim_at else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What is copied and not durable yet."""

    step: int
    """The newest."""
    began_at: datetime
    """When the one that is being made durable was begun."""
    saves: int = 1
    """2 when the newest waits behind another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How far the training is, in completed steps."""

    step: int
    step_at_notice: int
    """When the loop heard of this notice (of the strongest, when there were several)."""
    durable_step: int
    """Of the newest manifest; -1: there is none."""
    saving: Saving | None = None

    @property
    def saved_step(self) -> int:
        return max(self.durable_step, self.saving.step if self.saving else -1)


@dataclass(frozen=True, slots=True)
class CommitNow:
    """Copy this very step and begin to make it durable; then ask again, before the next step."""


@dataclass(frozen=True, slots=True)
class TrainUntil:
    """Train one more step and ask again. No step is begun after `at`; None: as if there had been no notice.

    Saves that are due by the checkpoint interval alone are left out: they would be in the way of the last one.
    """

    at: datetime | None


@dataclass(frozen=True, slots=True)
class WaitFor:
    """Train no more: wait until `step` is durable, or until then (None: without an end); then ask again."""

    step: int
    until: datetime | None


@dataclass(frozen=True, slots=True)
class Leave:
    """End the program: its last step is durable."""


@dataclass(frozen=True, slots=True)
class Skip:
    """End the program: its last step can't become durable in time. `reason` is for the journal."""

    reason: str


Decision = CommitNow | TrainUntil | WaitFor | Leave | Skip


def plan(measured: Measured | None, window: Window, work: Work) -> Decision:
    """What to do after this step. Asked after every step from the notice on, and again after everything but a step.

    measured: None before the first save has become durable; what is unknown is then tried.
    """
    first_is_taken = work.saved_step >= work.step_at_notice
    if window.kind == "rebalance":
        return TrainUntil(None) if first_is_taken else CommitNow()
    if first_is_taken and measured and window.kind == "preemption":
        at = _last_step_at(measured, window, work)
        if at and window.now <= at:
            return TrainUntil(at)
    if work.durable_step >= work.step:
        return Leave()
    if work.saved_step < work.step and _may_become_durable(measured, window, work.saving):
        return CommitNow()
    if work.saving and _may_end(measured, window, work.saving):
        return WaitFor(work.saving.step, window.reclaim_at)
    return Skip(_too_late(measured, window, work))


def _last_step_at(measured: Measured, window: Window, work: Work) -> datetime | None:
    """The latest begin of a step that can surely be followed by one more commit; None: there is no such commit."""
    if window.reclaim_at is None:
        return None
    persist_at = window.reclaim_at - timedelta(seconds=MARGIN_SECONDS + measured.durable_seconds.safe)
    copy_at = persist_at - timedelta(seconds=measured.copy_seconds.safe)
    if work.saving:
        expected = work.saving.saves * measured.durable_seconds.safe
        free_at = work.saving.began_at + timedelta(seconds=expected)
        # One that takes longer than any is not counted on to end: nothing that would have to follow it is planned.
        if free_at < window.now or free_at > copy_at:
            return None
    return copy_at - timedelta(seconds=measured.step_seconds.safe)


def _may_become_durable(measured: Measured | None, window: Window, saving: Saving | None) -> bool:
    """Could a save that begins now end in the window, were all as quick as the quickest? Trying it risks nothing: a
    commit that is cut off leaves no manifest."""
    if measured is None:
        return window.seconds_left > 0
    quickest = measured.durable_seconds.quickest
    busy = _seconds_until_first(quickest, window, saving) + (saving.saves - 1) * quickest if saving else 0.0
    return max(busy, measured.copy_seconds.quickest) + quickest <= window.seconds_left


def _may_end(measured: Measured | None, window: Window, saving: Saving) -> bool:
    if window.seconds_left <= 0:
        return False
    return measured is None or (
        _seconds_until_first(measured.durable_seconds.quickest, window, saving) <= window.seconds_left
    )


def _seconds_until_first(durable_seconds: float, window: Window, saving: Saving) -> float:
    return max(0.0, durable_seconds - (window.now - saving.began_at).total_seconds())


def _too_late(measured: Measured | None, window: Window, work: Work) -> str:
    committed = f"step {work.durable_step}" if work.durable_step >= 0 else "none"
    rest = f"step {work.step} is not committed, the last that is: {committed}"
    if measured is None or window.seconds_left <= 0:
        return f"the window is over: {rest}"
    seconds = measured.copy_seconds.quickest + measured.durable_seconds.quickest
    return (
        f"{size_text(measured.size_bytes)} in {seconds:.0f} s at best, {measured.durable_seconds.median:.0f} s as a rule, "
        f"do not fit the {window.seconds_left:.0f} s that are left: {rest}"
    )


# -- beforehand -------------------------------------------------------------------------------------------------------


def window_warning(size_bytes: float, bytes_per_second: float, window_seconds: float) -> str | None:
    """None when a checkpoint of this size surely becomes durable in the window, by the rule of the plan above.

    Raises ValueError unless the speed is above zero.
    """
    if size_bytes <= window_bytes(bytes_per_second, window_seconds):
        return None
    return (
        f"{size_text(size_bytes)} at {size_text(bytes_per_second)}/s does not fit {window_seconds:.0f} s; "
        f"every {recommended_interval_seconds(size_bytes / bytes_per_second):.0f} s is recommended"
    )


def window_bytes(bytes_per_second: float, window_seconds: float) -> float:
    """The largest checkpoint that surely becomes durable in the window. Raises ValueError unless the speed is above zero."""
    if bytes_per_second <= 0:
        raise ValueError(f"bytes_per_second is {bytes_per_second!r}; it must be above zero")
    return max(0.0, window_seconds - MARGIN_SECONDS) / LEAST_HEADROOM * bytes_per_second


def recommended_interval_seconds(durable_seconds: float) -> float:
    """The spacing of checkpoints of a state that no notice can save, rounded up to a readable number.

    A preemption then costs what was done since the newest checkpoint, so the spacing is the closest that the link bears.
    One save is made durable at a time, and the link must not be full: 67 s to durable give 89 s, that is 90 s. Young's
    spacing for the cost of the copy alone is of the same order (150 s for 0.8 s and four hours between preemptions), and
    the loss is flat around it: 1.2 % of the time at 90 s, 1.1 % at 150 s.
    """
    seconds = durable_seconds / SHARE_OF_THE_LINK
    hours = 3600.0 * math.ceil(seconds / 3600 - 1e-9)
    return next((float(readable) for readable in READABLE_SECONDS if readable >= seconds - 1e-9), hours)


def size_text(size_bytes: float) -> str:
    """For people: 850 kB, 1.2 GB, 12 GB."""
    value, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    number = f"{value:.1f}".removesuffix(".0") if value < 9.95 else f"{value:.0f}"
    return f"{number} {unit}"
