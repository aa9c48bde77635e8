"""Parts of the batch benchmark: a run of real workers here, and `python -m benchmarks.support.batch_parts PART JSON`."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from benchmarks.support import batch_function
from benchmarks.support.batch_turns import Side, in_turns
from holdfast.batch.audit import finish
from holdfast.batch.plan import bodies, make_plan
from holdfast.batch.settings import SETTINGS, WORKER, WorkerSettings, write_settings
from holdfast.queues.opening import open_queue
from holdfast.runtime.contract import STORE
from holdfast.storage import DirectoryStore

FUNCTION = "benchmarks.support.batch_function"
PREFIX = "runs/batch"
PATIENCE_SECONDS, IDLE_SECONDS, LOOK_SECONDS = 1800.0, 600.0, 0.1
NUMBERS = count(1)
REPOSITORY = Path(__file__).parents[2]


@dataclass(slots=True, kw_only=True)
class Measured:
    """Of one run through the pipeline. Loading the model is in none of it."""

    records: int
    plan_seconds: float
    work_seconds: float
    """From before the first batch is put into the queue, all workers ready, to the last result."""
    audit_seconds: float
    cpu_seconds: float
    """Of the planner, the queue, the workers, their models' processes and the audit."""
    missing: int
    duplicates: int

    @property
    def seconds(self) -> float:
        return self.plan_seconds + self.work_seconds + self.audit_seconds


@dataclass(slots=True)
class Workers:
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def cpu_seconds(self) -> float:
        total = 0.0
        for process in self.processes:
            parent = psutil.Process(process.pid)
            for one in (parent, *parent.children(recursive=True)):
                times = one.cpu_times()
                total += times.user + times.system
        return total

    def check(self) -> None:
        for process in self.processes:
            if process.poll() is not None:
                raise SystemExit(f"a worker ended too soon, with status {process.returncode}; its log is above")


class Pipeline:
    """Plan, SQLite queue, `python -m holdfast.batch.worker`, results in a folder, audit."""

    def __init__(self, folder: Path, source: Path, batch_size: int, function: str, setup: str) -> None:
        self.place = folder / f"run-{next(NUMBERS)}"
        self.store = DirectoryStore(self.place / "store")
        url = f"sqlite://{self.place}/queue.db"
        cpu, began = time.process_time(), time.time()
        make_plan(self.store, PREFIX, [str(source)], batch_size)
        self.plan_seconds, self._own_cpu = time.time() - began, time.process_time() - cpu
        settings = WorkerSettings(
            queue=url,
            queue_name="batch",
            prefix=PREFIX,
            function=f"{FUNCTION}:{function}",
            setup=f"{FUNCTION}:{setup}",
            idle_seconds=IDLE_SECONDS,
        )
        self.key = write_settings(self.store, settings)
        self.queue = open_queue(url, "batch")

    def fill(self) -> None:
        cpu = time.process_time()
        self.queue.put(list(bodies(self.store, PREFIX)))
        self._own_cpu += time.process_time() - cpu

    def ended_at(self) -> float | None:
        """When the last result was there."""
        depth = self.queue.depth()
        if depth.waiting or depth.leased:
            return None
        return max(path.stat().st_mtime for path in (self.place / "store" / PREFIX / "results").rglob("*.jsonl"))

    def finish(self, work_seconds: float, workers_cpu_seconds: float) -> Measured:
        cpu, at = time.process_time(), time.time()
        audited = finish(self.store, PREFIX)
        self.queue.close()
        return Measured(
            records=audited.records_out,
            plan_seconds=self.plan_seconds,
            work_seconds=work_seconds,
            audit_seconds=time.time() - at,
            cpu_seconds=workers_cpu_seconds + self._own_cpu + time.process_time() - cpu,
            missing=audited.missing,
            duplicates=audited.duplicates,
        )


def through_the_pipeline(
    folder: Path, source: Path, batch_size: int, function: str, setup: str, workers: int
) -> Measured:
    pipeline = Pipeline(folder, source, batch_size, function, setup)
    with running(pipeline, workers) as started:
        cpu, began = started.cpu_seconds(), time.time()
        pipeline.fill()
        wait(lambda: pipeline.ended_at() is not None, started)
        cpu = started.cpu_seconds() - cpu
        ended_at = pipeline.ended_at()
    assert ended_at
    return pipeline.finish(ended_at - began, cpu)


def beside_a_bare_loop(
    folder: Path, source: Path, batch_size: int, bare_first: bool
) -> tuple[Measured, dict[str, Any]]:
    """One worker and the loop, each with the example's model, in turns."""
    pipeline = Pipeline(folder, source, batch_size, "embeddings", "load")
    with running(pipeline, 1) as started, bare_process(bare_loop, str(source), batch_size) as (bare, told):
        cpu = started.cpu_seconds()
        ours = Side(pid=started.processes[0].pid, begin=pipeline.fill, ended_at=pipeline.ended_at)
        theirs = Side(pid=bare.pid, begin=lambda: told("go"), ended_at=lambda: json.loads(told("") or "{}").get("at"))
        in_turns(*((theirs, ours) if bare_first else (ours, theirs)))
        cpu = started.cpu_seconds() - cpu
        result = json.loads(told(""))
    return pipeline.finish(ours.seconds, cpu), {**result, "seconds": theirs.seconds}


@contextmanager
def bare_process(
    part: Callable[..., Any], *arguments: Any
) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], str]]]:
    """Ready to go; told("go") begins it, and told("") is what it has said since: nothing, or its result."""
    words = [sys.executable, "-m", "benchmarks.support.batch_parts", part.__name__, json.dumps(arguments)]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin and process.stdout
    said: list[str] = []

    def told(word: str) -> str:
        if word:
            print(word, file=process.stdin, flush=True)
        while not said and select.select([process.stdout], [], [], 0)[0]:
            said.append(process.stdout.readline())  # type: ignore[union-attr]
            if not said[-1]:
                raise SystemExit(f"{part.__name__} ended too soon, with status {process.wait(60)}")
        return said[0] if said else ""

    try:
        if "ready" not in process.stdout.readline():
            raise SystemExit(f"{part.__name__} is not ready: status {process.wait(60)}")
        yield process, told
    finally:
        process.kill()
        process.wait(60)


@contextmanager
def running(pipeline: Pipeline, workers: int) -> Iterator[Workers]:
    """All have loaded the function and ask the queue, which is empty."""
    ready = pipeline.place / "ready"
    ready.mkdir()
    environment = {**os.environ, STORE: pipeline.store.url, SETTINGS: pipeline.key, batch_function.READY: str(ready)}
    words = [sys.executable, "-m", "holdfast.batch.worker"]
    started = Workers()
    log = pipeline.place / "log.txt"
    with open(log, "wb") as file:
        try:
            for number in range(workers):
                environment[WORKER] = str(number)
                started.processes.append(subprocess.Popen(words, env=environment, cwd=REPOSITORY, stderr=file))
            wait(lambda: len(list(ready.iterdir())) == workers, started)
            time.sleep(1.0)  # the worker hears of it, and asks the queue for the first time
            yield started
        except SystemExit:
            print(log.read_text()[-2000:], file=sys.stderr)
            raise
        finally:
            for process in started.processes:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
            for process in started.processes:
                process.wait(60)


def wait(done: Callable[[], bool], started: Workers) -> None:
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not done():
        started.check()
        if time.monotonic() > give_up_at:
            raise SystemExit(f"the workers were not done after {PATIENCE_SECONDS:.0f} s")
        time.sleep(LOOK_SECONDS)


def in_a_new_process(part: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.support.batch_parts", part.__name__, json.dumps(arguments)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part.__name__} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def bare_loop(source: str, batch_size: int) -> dict[str, Any]:
    """The same model, the same batches, their records parsed before: nothing but calls of the function."""
    encoder = batch_function.warm()
    records = [json.loads(line) for line in Path(source).read_text().splitlines()]
    batches = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
    print("ready", flush=True)
    sys.stdin.readline()
    cpu = time.process_time()
    for batch in batches:
        batch_function.embeddings(batch, encoder)
    return {"at": time.time(), "records": len(records), "cpu_seconds": time.process_time() - cpu}


def plan_alone(source: str, folder: str, batch_size: int) -> dict[str, Any]:
    cpu, began = time.process_time(), time.monotonic()
    summary = make_plan(DirectoryStore(Path(folder)), PREFIX, [source], batch_size)
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu,
        "records": summary.records,
        "batches": summary.batches,
        "megabytes": summary.input_bytes / 1e6,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def main(words: Sequence[str]) -> None:
    from benchmarks.support.batch_coordinator import coordinate

    parts = {part.__name__: part for part in (bare_loop, plan_alone, coordinate)}
    print(json.dumps(parts[words[0]](*json.loads(words[1]))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
