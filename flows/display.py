"""The live display of a run in a terminal: one progress bar, one line per event."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from flows import DISPLAY_VARIABLE
from holdfast.supervision.plan import hours
from holdfast.supervision.training_run import TrainingRun
from holdfast.supervision.updates import Update
from tasks.progress import Watcher

STYLES = {
    "launched": "cyan",
    "refused": "yellow",
    "fallback": "bold yellow",
    "waiting": "yellow",
    "notice": "magenta",
    "preempted": "bold red",
    "resumed": "green",
    "committed": "dim",
    "ended": "bold green",
    "formed": "bold cyan",
    "dissolved": "yellow",
    "registered": "green",
    "deregistered": "yellow",
    "planned": "blue",
    "warned": "yellow",
}
PLAIN_SECONDS = 5.0
MACHINE_CHARACTERS = 10


@contextmanager
def terminal_watchers(run: TrainingRun) -> Iterator[list[Watcher]]:
    """The watchers to begin with: the terminal's, where somebody looks at one."""
    if os.environ.get(DISPLAY_VARIABLE) != "1":
        yield []
    elif sys.stdout.isatty():
        with LiveDisplay(run.run_id) as display:
            yield [display]
    else:
        yield [PlainDisplay()]


class LiveDisplay:
    """One line with a bar that stays at the bottom, events above it."""

    def __init__(self, run_id: str, console: Console | None = None) -> None:
        self._run_id = run_id
        self._progress = Progress(
            SpinnerColumn(),
            # Where there is little room the bar is short, and then the end of the status goes: the pool.
            TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            console=console or Console(highlight=False),
            expand=True,
        )
        self._bar = self._progress.add_task("", total=None, status="starting")

    def __enter__(self) -> LiveDisplay:
        self._progress.console.print(f"run [bold]{_escape(self._run_id)}[/]")
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
            status=_escape(status_line(update)),
        )
        if update.kind != "progress":
            style = STYLES[update.kind]
            clock = update.at.strftime("%H:%M:%S")
            self._progress.console.print(f"[dim]{clock}[/] [{style}]{update.kind:<9}[/] {_escape(event_line(update))}")


class PlainDisplay:
    """For pipes and logs: the same lines, and the progress every few seconds."""

    def __init__(self) -> None:
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
    """Step, loss, attempt, machine, state, what keeps its saves back, dollars so far, pool: what matters most comes first."""
    fields = update.fields
    total = fields.get("total_steps")
    parts = [f"step {fields.get('step') or 0}{f'/{total}' if total else ''}"]
    metrics = fields.get("metrics") or {}
    parts += [f"{name} {value:.4g}" for name, value in metrics.items() if "loss" in name][:1]
    parts += [f"attempt {update.attempt}"]
    if machine := fields.get("machine"):
        parts.append(_short(machine))
    parts.append(f"{fields.get('phase') or update.kind}")
    if (slack := (fields.get("plan") or {}).get("slack_seconds")) is not None:
        parts.append(f"slack {hours(slack)}")
    if fields.get("not_durable_step"):
        parts.append(f"not durable since step {fields.get('committed_step') or 0}")
    parts += [f"${fields.get('usd') or 0:.4f}", f"{fields.get('pool') or ''}"]
    return "  ".join(parts).rstrip()


def _short(machine: str) -> str:
    return machine if len(machine) <= MACHINE_CHARACTERS + 1 else machine[:MACHINE_CHARACTERS] + "…"


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
