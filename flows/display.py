"""The live display of a run in a terminal: one progress bar, one line per event."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from flows import DISPLAY_VARIABLE
from holdfast.supervision.training_run import TrainingRun
from holdfast.supervision.updates import Update
from tasks.progress import Watcher

STYLES = {
    "launched": "cyan",
    "refused": "yellow",
    "fallback": "bold yellow",
    "notice": "magenta",
    "preempted": "bold red",
    "resumed": "green",
    "committed": "dim",
    "ended": "bold green",
    "warned": "yellow",
}
PLAIN_SECONDS = 5.0


@contextmanager
def terminal_watchers(run: TrainingRun) -> Iterator[list[Watcher]]:
    """The watchers to begin with: the terminal's, where somebody looks at one."""
    if os.environ.get(DISPLAY_VARIABLE) != "1":
        yield []
    elif sys.stdout.isatty():
        with LiveDisplay(run) as display:
            yield [display]
    else:
        yield [PlainDisplay(run)]


class LiveDisplay:
    """One bar that stays at the bottom, events above it."""

    def __init__(self, run: TrainingRun) -> None:
        self._started = run.state.started_at
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[run]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=Console(highlight=False),
        )
        self._bar = self._progress.add_task("", total=None, run=run.run_id, status="starting")

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, update: Update) -> None:
        fields = update.fields
        self._progress.update(
            self._bar,
            completed=fields.get("step") or fields.get("committed_step") or 0,
            total=fields.get("total_steps"),
            status=status_line(update),
        )
        if update.kind != "progress":
            style = STYLES[update.kind]
            clock = update.at.strftime("%H:%M:%S")
            self._progress.console.print(f"[dim]{clock}[/] [{style}]{update.kind:<9}[/] {_escape(event_line(update))}")


class PlainDisplay:
    """For pipes and logs: the same lines, and the progress every few seconds."""

    def __init__(self, run: TrainingRun) -> None:
        self._next = 0.0

    def __call__(self, update: Update) -> None:
        if update.kind != "progress":
            print(f"{update.at:%H:%M:%S} {update.kind:<9} {event_line(update)}", flush=True)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_SECONDS
            print(f"{update.at:%H:%M:%S} {'progress':<9} {status_line(update)}", flush=True)


def event_line(update: Update) -> str:
    return f"attempt {update.attempt}: {update.text}"


def status_line(update: Update) -> str:
    """Step, loss, attempt, machine, state, dollars so far."""
    fields = update.fields
    total = fields.get("total_steps")
    parts = [f"step {fields.get('step') or 0}{f'/{total}' if total else ''}"]
    metrics = fields.get("metrics") or {}
    parts += [f"{name} {value:.4g}" for name, value in metrics.items() if "loss" in name][:1]
    parts += [f"attempt {update.attempt}", f"{fields.get('pool')}", f"{fields.get('phase') or update.kind}"]
    parts.append(f"${fields.get('usd') or 0:.4f}")
    return "  ".join(parts)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
