"""What the program tells its machine: telemetry for the agent, and a black box on the console that outlives both."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.clock import Clock, clock_from_environment
from holdfast.runtime import contract

PROGRESS_SECONDS = 0.2
DEVICE_LINES_PER_SECOND = 10
LOOK_SECONDS = 0.02
"""One rank alone looks around no more often than that, but after every step that may bring a save."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the agent told the program about where it runs."""

    store_url: str
    run_id: str
    attempt: int
    policy: CheckpointPolicy
    telemetry: Path | None
    notice: Path | None
    console: Path | None
    clock: Clock = field(default_factory=clock_from_environment)

    @classmethod
    def from_environment(cls) -> Surroundings | None:
        """None when no agent started this program: it then runs as if Holdfast were not there."""
        environment = os.environ
        if not all(environment.get(name) for name in (contract.STORE, contract.RUN, contract.ATTEMPT)):
            return None

        def path(name: str) -> Path | None:
            return Path(environment[name]) if environment.get(name) else None

        return cls(
            store_url=environment[contract.STORE],
            run_id=environment[contract.RUN],
            attempt=int(environment[contract.ATTEMPT]),
            policy=CheckpointPolicy.from_json(environment.get(contract.CHECKPOINT_POLICY, "{}")),
            telemetry=path(contract.TELEMETRY),
            notice=path(contract.NOTICE),
            console=path(contract.CONSOLE),
        )


class Console:
    """The black box: the machine's console, which outlives the machine. Without a path, nothing is written.

    What it says is read by whoever wants to know how far a machine came that can no longer be asked, so each line
    begins with a line end of its own: a progress bar leaves the cursor in the middle of a line. The price is a blank
    line where nobody did.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = _open_to_append(path)
        # A serial console takes a few kilobytes per second, and would hold the training up.
        self._is_slow = self._file is not None and stat.S_ISCHR(os.fstat(self._file).st_mode)
        self._next_step = 0.0

    @property
    def shows_every_step(self) -> bool:
        return self._file is not None and not self._is_slow

    def phase(self, name: str, step: int) -> None:
        self._write(f"holdfast: phase {name} {step}")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        now = time.monotonic()
        if not self._is_slow or now >= self._next_step:
            self._next_step = now + 1 / DEVICE_LINES_PER_SECOND
            self._write(f"holdfast: step {step} {json.dumps(metrics)}")

    def _write(self, line: str) -> None:
        if self._file is not None:
            _write_whole(self._file, f"\n{line}\n")


class Reporter:
    """Writes whole lines with one call each, so that a kill at any instant leaves no half of one."""

    def __init__(self, around: Surroundings) -> None:
        self._clock = around.clock
        self._telemetry = _open_to_append(around.telemetry)
        self._console = Console(around.console)
        self._next_progress = 0.0

    @property
    def shows_every_step(self) -> bool:
        return self._console.shows_every_step

    def event(self, kind: str, **fields: Any) -> None:
        if self._telemetry is not None:
            record = {"kind": kind, "at": self._clock.now().isoformat(), **fields}
            _write_whole(self._telemetry, json.dumps(record) + "\n")

    def phase(self, name: str, step: int) -> None:
        self._console.phase(name, step)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """A step is complete."""
        self._console.step(step, metrics)
        now = time.monotonic()
        if now >= self._next_progress or step == total:
            self._next_progress = now + PROGRESS_SECONDS
            self.event("progress", step=step, total_steps=total, metrics=dict(metrics))


@dataclass(slots=True)
class HeardNotice:
    kind: contract.NoticeKind
    reclaim_at: datetime | None


class NoticeFile:
    """Looks for the agent's notice at most every 20 ms: a step may be shorter than the look."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._next_look = 0.0
        self._seen = 0

    @property
    def seen(self) -> bool:
        """Was there ever a notice for this machine?"""
        return self._seen != 0

    def news(self) -> HeardNotice | None:
        """A notice that was not returned before."""
        now = time.monotonic()
        if self._path is None or now < self._next_look:
            return None
        self._next_look = now + LOOK_SECONDS
        try:
            changed = os.stat(self._path).st_mtime_ns
        except FileNotFoundError:
            return None
        if changed == self._seen:
            return None
        self._seen = changed
        content = json.loads(self._path.read_text())
        at = content.get("reclaim_at")
        return HeardNotice(content["kind"], datetime.fromisoformat(at) if at else None)


def _open_to_append(path: Path | None) -> int | None:
    if path is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return None  # a console that can't be written is no reason not to train


def _write_whole(file: int, text: str) -> None:
    try:
        os.write(file, text.encode())
    except OSError:
        return
