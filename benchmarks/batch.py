"""What batch inference costs over the model itself: `python -m benchmarks.batch` (`--quick`: in about a minute).

The pipeline is the real one: the planner, the queue in SQLite, workers as their machines start them, results in a folder
on the local disk, and the audit that reads them back. The model is the example's (examples/embed.py) on one thread; next
to it the same function is called in a bare loop, its records read and parsed before. Both have loaded and warmed the
model when their time begins, and do the same batches in turns of 1.5 s: while one runs, the other's processes are
stopped, so what else goes on on the machine meets both. The pipeline's time has the plan and the audit in it.

| key | what |
| --- | --- |
| missing, duplicates | records, by the audits of all runs |
| pipeline_over_bare | records/s through the pipeline over those of the bare loop: the median of the rounds' ratios, new processes in each |
| empty_records_per_second | with a function that does nothing, a worker for each core: from the first put into the queue to the last result |
| planner_mb_per_second | of JSONL, until the plan is durable in the store |
| planner_peak_mb | the most memory that the planner's process had |
| simulated_workers | on one queue, while no lease is lost and they wait less than 1 % of their time; `coordinator` has more |

Where a figure has several cases, a key is the case that is worst for Holdfast, and `cases` has them all. The pipeline's key
is of documents as they are, where the model has the same core on both sides; with everything on one core, and documents of a
line, what the pipeline does beside the model is taken from it: `on_one_core`. `processor_time` has the comparisons in
seconds of processor time, which other programs on the machine disturb less. The results' two flushes to the disk for each batch
are in all of it. The simulated workers are threads of one process, each with a connection of its own; they lease, extend
and acknowledge as a worker does, write its progress every 5 s and sleep where it would infer; the controller's look at
all of them is timed. `shortest_batch_seconds`: with batches shorter than this the queue's lock is what limits them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.support.batch_coordinator import coordinate
from benchmarks.support.batch_parts import (
    Measured,
    beside_a_bare_loop,
    in_a_new_process,
    plan_alone,
    through_the_pipeline,
)

RESULT = Path(__file__).parent / "results" / "batch.json"
BATCH_SIZE, LARGE_BATCH_SIZE = 100, 1000
LINE_CHARACTERS = 100
DOCUMENTS, ONE_CORE = "documents", "short documents, all on one core"
TARGETS: dict[str, tuple[str, float]] = {
    "missing": ("at most", 0),
    "duplicates": ("at most", 0),
    "pipeline_over_bare": ("at least", 0.97),
    "empty_records_per_second": ("at least", 50_000),
    "planner_mb_per_second": ("at least", 200),
    "planner_peak_mb": ("at most", 200),
    "simulated_workers": ("at least", 1000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    folder: Path
    rounds: int = 7
    fewer_rounds: int = 3
    """Of what has no target, or varies less."""
    documents: int = 200
    lines: int = 800
    empty_records: int = 200_000
    planned_records: int = 10_000_000
    workers: int = 1000
    batch_seconds: float = 10.0
    coordinator_seconds: float = 30.0


def quick(setting: Setting) -> Setting:
    small = {"documents": 40, "lines": 200, "empty_records": 50_000, "planned_records": 1_000_000}
    return replace(setting, rounds=1, fewer_rounds=1, **small, workers=200, batch_seconds=2.0, coordinator_seconds=5.0)


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="less of everything, one round, in about a minute")
    options.add_argument("--rounds", type=int, help="how often the pipeline and the loop are measured (default 7)")
    options.add_argument("--folder", type=Path, help="a folder on the disk to use (default: the temporary one's)")
    options.add_argument("--result", type=Path, default=RESULT, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.rounds is not None and given.rounds < 1:
        options.error(f"--rounds is {given.rounds}; it must be at least 1")
    if given.folder and not given.folder.is_dir():
        options.error(f"--folder {given.folder} is no folder")
    began, load = time.monotonic(), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="holdfast-batch-", dir=given.folder, ignore_cleanup_errors=True) as name:
        setting = Setting(folder=Path(name))
        if given.quick:
            setting = quick(setting)
        setting = replace(setting, rounds=given.rounds or setting.rounds)
        result = measure(setting)
    result |= {"quick": given.quick, "seconds": round(time.monotonic() - began, 1)}
    result |= surroundings(load)
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    print(f"Written to {given.result}")


# -- measuring it -----------------------------------------------------------------------------------------------------


def measure(setting: Setting) -> dict[str, Any]:
    audited: list[Measured] = []
    planner = measure_planner(setting)
    ratios, processor = measure_pipeline(setting, audited)
    empty = measure_empty(setting, audited)
    print(f"{setting.workers} simulated workers on one queue", flush=True)
    folder = setting.folder / "coordinator"
    batches = int(setting.coordinator_seconds * 5000)
    coordinator = in_a_new_process(
        coordinate, str(folder), setting.workers, setting.batch_seconds, setting.coordinator_seconds, batches
    )
    paced = coordinator["paced"]
    kept_up = (
        coordinator["every_batch_acknowledged_once"]
        and not paced["lost_leases"]
        and paced["percent_of_workers_time_in_the_queue"] < 1
    )
    cases = {
        "missing": {"all runs": sum(one.missing for one in audited)},
        "duplicates": {"all runs": sum(one.duplicates for one in audited)},
        "pipeline_over_bare": {DOCUMENTS: round(median(ratios[DOCUMENTS]), 4)},
        "empty_records_per_second": {case: round(median(values)) for case, values in empty.items()},
        "planner_mb_per_second": {"10 million records" if not planner["quick"] else "1 million records": round(planner["mb_per_second"], 1)},
        "planner_peak_mb": {"its process": round(planner["peak_mb"], 1)},
        "simulated_workers": {"one SQLite queue": setting.workers if kept_up else 0},
    }  # fmt: skip
    return {
        **{key: (max if TARGETS[key][0] == "at most" else min)(cases[key].values()) for key in TARGETS},
        "targets": {name: f"{kind} {number:g}" for name, (kind, number) in TARGETS.items()},
        "cases": cases,
        "on_one_core": round(median(ratios[ONE_CORE]), 4),
        "processor_time": {case: round(median(values), 4) for case, values in processor.items()},
        "rounds": {case: [round(value, 4) for value in values] for case, values in (*ratios.items(), *empty.items())},
        "planner": planner,
        "coordinator": coordinator,
        "runs_audited": len(audited),
        "records_audited": sum(one.records for one in audited),
    }


def measure_pipeline(
    setting: Setting, audited: list[Measured]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    print("the model, in the pipeline and in a bare loop", flush=True)
    documents, lines = setting.folder / "documents.jsonl", setting.folder / "lines.jsonl"
    write_documents(documents, setting.documents, None)
    write_documents(lines, setting.lines, LINE_CHARACTERS)
    cores = sorted(os.sched_getaffinity(0))
    cases = {
        DOCUMENTS: (documents, cores),
        ONE_CORE: (lines, cores[-1:]),
    }
    ratios: dict[str, list[float]] = {case: [] for case in cases}
    processor: dict[str, list[float]] = {case: [] for case in cases}
    for number in range(setting.rounds):
        for case, (source, on) in cases.items():
            if case == ONE_CORE and number >= setting.fewer_rounds:
                continue
            with confined(on):
                ours, bare = beside_a_bare_loop(setting.folder, source, BATCH_SIZE, bare_first=number % 2 == 0)
            audited.append(ours)
            ratios[case].append((ours.records / ours.seconds) / (bare["records"] / bare["seconds"]))
            processor[case].append(bare["cpu_seconds"] / ours.cpu_seconds)
            print(
                f"  round {number + 1}, {case}: bare {bare['records'] / bare['seconds']:.1f} records/s, pipeline "
                f"{ours.records / ours.seconds:.1f} (plan {ours.plan_seconds:.3f} s, audit {ours.audit_seconds:.3f} s), "
                f"by processor time {processor[case][-1]:.3f}",
                flush=True,
            )
    return ratios, processor


def measure_empty(setting: Setting, audited: list[Measured]) -> dict[str, list[float]]:
    print("a function that does nothing", flush=True)
    workers = len(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = {}
    for number in range(setting.fewer_rounds):
        for size, times in ((BATCH_SIZE, 1), (LARGE_BATCH_SIZE, 5)):
            source = setting.folder / f"empty-{size}.jsonl"
            if not source.exists():
                write_synthetic(source, setting.empty_records * times)
            ours = through_the_pipeline(setting.folder, source, size, "nothing", "ready", workers)
            audited.append(ours)
            rates.setdefault(f"batches of {size:,}", []).append(ours.records / ours.work_seconds)
            print(
                f"  round {number + 1}, batches of {size}: {ours.records / ours.work_seconds:,.0f} records/s; for a "
                f"million: plan {1e6 * ours.plan_seconds / ours.records:.1f} s, audit {1e6 * ours.audit_seconds / ours.records:.1f} s, "
                f"{1e6 * ours.cpu_seconds / ours.records:.1f} s of processor",
                flush=True,
            )
    return rates


def measure_planner(setting: Setting) -> dict[str, Any]:
    print(f"the planner, over {setting.planned_records:,} records", flush=True)
    source = setting.folder / "planned.jsonl"
    write_synthetic(source, setting.planned_records)
    try:
        runs = [
            in_a_new_process(plan_alone, str(source), str(setting.folder / f"plan-{number}"), BATCH_SIZE)
            for number in range(setting.fewer_rounds)
        ]
    finally:
        source.unlink()
    rates = [run["megabytes"] / run["seconds"] for run in runs]
    print(f"  {', '.join(f'{rate:.0f}' for rate in rates)} MB/s", flush=True)
    return {
        "mb_per_second": median(rates),
        "mb_per_second_each": [round(rate, 1) for rate in rates],
        "mb_per_processor_second": median(run["megabytes"] / run["cpu_seconds"] for run in runs),
        "peak_mb": max(run["peak_mb"] for run in runs),
        "records": runs[0]["records"],
        "megabytes": runs[0]["megabytes"],
        "quick": setting.planned_records < 10_000_000,
    }


def write_documents(path: Path, wanted: int, characters: int | None) -> None:
    """From all over the documents; those that are wanted beyond their number come again."""
    from examples.documents import documents

    found = list(documents())
    step = max(1, len(found) // wanted)
    chosen = (found[::step] * (wanted * step // len(found) + 1))[:wanted]
    with open(path, "w") as file:
        for number, one in enumerate(chosen):
            file.write(json.dumps({"id": number, "text": one["text"][:characters]}) + "\n")


def write_synthetic(path: Path, records: int) -> None:
    """About 117 bytes a record."""
    line = (
        b'{"id": %d, "text": "The quick brown fox jumps over the lazy dog and runs away from number %d of the herd"}\n'
    )
    with open(path, "wb") as file:
        for start in range(0, records, 10_000):
            file.write(b"".join(line % (number, number) for number in range(start, min(records, start + 10_000))))


@contextmanager
def confined(cores: list[int]) -> Iterator[None]:
    """This process, and whatever it starts meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# -- what it means ----------------------------------------------------------------------------------------------------


def surroundings(load: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": [round(one, 2) for one in load],
        "load_average_after": [round(one, 2) for one in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("holdfast", "torch", "transformers", "orjson")},
        },
    }


def show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Batch inference, {result['cores']} cores", title_justify="left")
    for name in ("figure", "case"):
        table.add_column(name)
    for name in ("measured", "target"):
        table.add_column(name, justify="right")
    table.add_column("")
    for key, cases in result["cases"].items():
        kind, number = TARGETS[key]
        for case, value in cases.items():
            kept = value <= number if kind == "at most" else value >= number
            row = (key, case, f"{value:,.3g}" if value < 100 else f"{value:,.0f}", f"{kind} {number:,g}")
            table.add_row(*row, "" if kept else "MISSED", style="" if kept else "bold red")
    table.add_row("pipeline_over_bare", ONE_CORE, f"{result['on_one_core']:.3g}", "", "", style="dim")
    for case, value in result["processor_time"].items():
        table.add_row("the same by processor time", case, f"{value:.3g}", "", "", style="dim")
    coordinator = result["coordinator"]
    paced, unpaced = coordinator["paced"], coordinator["without_pause"]
    for what, value in (
        (f"batches/s of {paced['batch_seconds']:g} s each", paced["batches_per_second"]),
        ("% of their time in the queue", paced["percent_of_workers_time_in_the_queue"]),
        ("seconds of the controller's look", paced["controller_seconds_a_look"]),
        ("batches/s at most", unpaced["batches_per_second"]),
        ("seconds of the shortest batch", coordinator["shortest_batch_seconds"]),
    ):
        table.add_row("coordinator", f"{coordinator['workers']} workers: {what}", f"{value:,.3g}", style="dim")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
