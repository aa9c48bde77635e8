"""What `holdfast checkpoints` prints: tables, verdicts, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from holdfast.checkpoint import inspection
from holdfast.checkpoint.comparison import Comparison, shown

PLAIN_WIDTH = 160
SHOWN = 40
"""Differences of one kind that are listed."""
NUMBERS = frozenset(
    {
        "step",
        "attempt",
        "ranks",
        "size",
        "tensors",
        "elements",
        "checkpoints",
        "elements that differ",
        "largest difference",
    }
)
"""Columns of them stand to the right."""


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def facts_of(run: str, look: inspection.Glance, problem: str) -> Iterator[tuple[str, str]]:
    manifest = look.manifest
    yield "checkpoint", f"{look.id} of run {run}"
    yield "state", verdict(problem, read=True)
    yield "size", f"{size(look.size_bytes)} in {len(manifest.get('objects', ()))} objects"
    if not manifest:
        return
    total = f" of {manifest['total_steps']}" if manifest.get("total_steps") else ""
    yield "step", f"{look.id.step}{total}, attempt {look.id.attempt}"
    yield "kind", look.kind
    yield "parent", manifest.get("parent") or "none"
    yield "ranks", f"{look.world_size}"
    untold = {"objects", "ranks", "kind", "parent", "step", "attempt", "total_steps", "run"}
    for name, value in inspection.leaves({key: value for key, value in manifest.items() if key not in untold}):
        if value is not None:
            yield name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def print_comparison(found: Comparison, here: str, there: str) -> None:
    out = terminal()
    if found.remark:
        out.print(escape(found.remark), soft_wrap=True)
    if found.metadata:
        table = table_of("metadata", here, there)
        for name, mine, its in found.metadata[:SHOWN]:
            table.add_row(escape(name), escape(shown(mine)), escape(shown(its)))
        _print_rows(out, table, len(found.metadata))
    for where, names in ((here, found.only_here), (there, found.only_there)):
        if names:
            out.print(
                f"only in {escape(where)}: {escape(', '.join(names[:SHOWN]))}" + _more(len(names)), soft_wrap=True
            )
    if found.values:
        table = table_of("value", here, there)
        for name, mine, its in found.values[:SHOWN]:
            table.add_row(escape(name), escape(shown(mine)), escape(shown(its)))
        _print_rows(out, table, len(found.values))
    if found.tensors:
        table = table_of("tensor", "type and shape", "elements that differ", "largest difference")
        for one in found.tensors[:SHOWN]:
            if one.here != one.there:
                table.add_row(escape(one.path), escape(f"{one.here} / {one.there}"), "", "")
            else:
                table.add_row(
                    escape(one.path), escape(one.here), f"{one.elements:,} of {one.total:,}", f"{one.largest:.6g}"
                )
        _print_rows(out, table, len(found.tensors))
    what = "the states are equal" if found.same_state else "the states differ"
    counted = (
        f"; {found.equal_tensors} tensors equal, {len(found.tensors)} different"
        if found.equal_tensors or found.tensors
        else ""
    )
    out.print(what + counted)


def _print_rows(out: Console, table: Table, count: int) -> None:
    out.print(table)
    if count > SHOWN:
        out.print(_more(count).strip())


def _more(count: int) -> str:
    return f" and {count - SHOWN} more" if count > SHOWN else ""


def verdict(problem: str, read: bool = False) -> str:
    if problem:
        return f"[bold red]damaged[/]: {escape(problem)}"
    return "[green]valid[/]" if read else "[green]all there[/]"


def instant(manifest: dict[str, Any]) -> str:
    return str(manifest.get("created_at", ""))[:19].replace("T", " ")


def table_of(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(escape(name), justify="right" if name in NUMBERS else "left", overflow="fold")
    return table


def terminal() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


@contextmanager
def progress_bar(what: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """On standard error, and only where somebody looks at it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=total_bytes)
        yield lambda count: progress.advance(bar, count)
