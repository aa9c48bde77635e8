"""The live display of a fleet, a gang or a batch job in a terminal: one bar of what is done, one line per event."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from flows import DISPLAY_VARIABLE
from flows.display import PLAIN_SECONDS, STYLES
from holdfast.ledger.batch_summary import batch_progress
from holdfast.supervision.fleet_run import FleetRun
from holdfast.supervision.updates import Update
from tasks.fleet import fraction_done
from tasks.progress import Watcher


@contextmanager
def fleet_watchers(run: FleetRun) -> Iterator[list[Watcher]]:
    """The watchers to begin with: the terminal's, where somebody looks at one."""
    if os.environ.get(DISPLAY_VARIABLE) != "1":
        yield []
    elif sys.stdout.isatty():
        with LiveFleet(run.run_id) as display:
            yield [display]
    else:
        yield [PlainFleet()]


class LiveFleet:
    """One line with a bar that stays at the bottom, events above it."""

    def __init__(self, run_id: str, console: Console | None = None) -> None:
        self._run_id = run_id
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            console=console or Console(highlight=False),
            expand=True,
        )
        self._bar = self._progress.add_task("", total=1.0, status="starting")

    def __enter__(self) -> LiveFleet:
        self._progress.console.print(f"fleet [bold]{escape(self._run_id)}[/]")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, update: Update) -> None:
        self._progress.update(self._bar, completed=fraction_done(update), status=escape(fleet_status(update)))
        if update.kind != "progress":
            style = STYLES[update.kind]
            clock = update.at.strftime("%H:%M:%S")
            self._progress.console.print(f"[dim]{clock}[/] [{style}]{update.kind:<9}[/] {escape(fleet_event(update))}")


class PlainFleet:
    """For pipes and logs: the same lines, and the progress every few seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, update: Update) -> None:
        if update.kind != "progress":
            print(f"{update.at:%H:%M:%S} {update.kind:<9} {fleet_event(update)}", flush=True)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_SECONDS
            print(f"{update.at:%H:%M:%S} {'progress':<9} {fleet_status(update)}", flush=True)


def fleet_event(update: Update) -> str:
    return f"round {update.attempt}: {update.text}"


def fleet_status(update: Update) -> str:
    """A gang's steps, members by what became of them, and dollars so far."""
    fields = update.fields
    if fields.get("batches"):
        return batch_progress(fields)
    steps = f"step {fields['step'] or 0} of {fields['total_steps']}, " if fields.get("total_steps") else ""
    counts = ", ".join(f"{number} {name}" for name, number in fields["counts"].items())
    return f"{steps}{counts} of {fields['wanted']}  ${fields['usd']:.4f}"
