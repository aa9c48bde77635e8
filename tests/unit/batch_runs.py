"""A plan, a queue and a worker, as small as they get: the store is a folder, the worker's main thread is the test's."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.batch.audit import Audit, finish
from holdfast.batch.plan import bodies, make_plan
from holdfast.batch.settings import WorkerSettings, write_settings
from holdfast.batch.worker import Progress, Worker
from holdfast.queues.opening import open_queue
from holdfast.queues.protocol import Queue
from holdfast.storage import DirectoryStore

PREFIX = "runs/batch"
FUNCTIONS = "tests.programs.batch_functions"
DEADLINE_SECONDS = 120.0


def write_jsonl(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def named(function: str) -> str:
    """One of the tests' own functions needs no module."""
    return function if ":" in function or not function else f"{FUNCTIONS}:{function}"


@dataclass(slots=True)
class BatchRun:
    folder: Path
    function: str = "length"
    setup: str = ""
    batch_size: int = 10
    format: str = "auto"
    results_format: str = "jsonl"
    visibility_seconds: float = 600.0
    batch_time_limit_seconds: float = 600.0
    progress: list[Progress] = field(default_factory=list)

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(self.folder / "store")

    @property
    def settings(self) -> WorkerSettings:
        return WorkerSettings(
            queue=f"sqlite://{self.folder}/queue.db",
            queue_name="batch",
            prefix=PREFIX,
            function=named(self.function),
            setup=named(self.setup),
            batch_time_limit_seconds=self.batch_time_limit_seconds,
            visibility_seconds=self.visibility_seconds,
            results_format=self.results_format,
            idle_seconds=0.3,
        )

    def queue(self) -> Queue:
        return open_queue(self.settings.queue, "batch", visibility_seconds=self.visibility_seconds)

    def waiting(self) -> int:
        """Batches that can be had at once."""
        queue = self.queue()
        try:
            return queue.depth().waiting
        finally:
            queue.close()

    def plan(self, *inputs: Path | str) -> BatchRun:
        make_plan(self.store, PREFIX, [str(one) for one in inputs], self.batch_size, self.format)
        write_settings(self.store, self.settings)
        queue = self.queue()
        queue.put(list(bodies(self.store, PREFIX)))
        queue.close()
        return self

    def worker(self, name: str = "worker") -> Worker:
        worker = Worker(self.store, self.settings, self.queue, name)
        self.progress.append(worker.progress)
        return worker

    def work(self) -> Audit:
        assert self.worker().run() == 0
        return finish(self.store, PREFIX)

    def results(self) -> list[dict[str, Any]]:
        """In the order of the parts in the manifest."""
        manifest = json.loads(self.store.get(f"{PREFIX}/manifest.json"))
        return [json.loads(line) for part in manifest["parts"] for line in self.store.get(part["key"]).splitlines()]

    def failed(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.store.get(f"{PREFIX}/failed.jsonl").splitlines()]


def during(worker: Worker, act: Callable[[], None]) -> int:
    """The status of a worker during whose work `act` is called, in a thread."""
    failures: Sequence[BaseException] = []

    def call() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)  # type: ignore[attr-defined]

    thread = threading.Thread(target=call)
    thread.start()
    status = worker.run()
    thread.join()
    assert not failures, failures
    return status


def wait_for(path: Path) -> None:
    give_up_at = time.monotonic() + DEADLINE_SECONDS
    while not path.exists():
        assert time.monotonic() < give_up_at, f"{path} does not appear"
        time.sleep(0.01)
