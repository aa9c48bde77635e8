"""A worker: `python -m holdfast.batch.worker`, with HOLDFAST_STORE and HOLDFAST_BATCH (the key of its settings).

The model has a process of its own (child.py). Here its batches are leased and fetched ahead and its results written
behind, so that it never waits: one thread speaks with the queue, some fetch, some write, and the main thread decides, on
one event after another.

Exit status: 0 there is no more work; 83 and 84 the machine is taken away, with and without the batch in work finished; 1
the function can't be used, or fails on everything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from holdfast.batch import records, results
from holdfast.batch.leases import Leases
from holdfast.batch.model_process import Call, ModelProcess, Task, status_words
from holdfast.batch.settings import SETTINGS, WORKER, WorkerSettings, read_settings
from holdfast.batch.sources import Reader, SourceChangedError
from holdfast.batch.spec import parse_spec
from holdfast.checkpoint.reporting import NoticeFile, Reporter, Surroundings
from holdfast.clock import clock_from_environment
from holdfast.errors import ConfigError, HoldfastError, ProgramFailedError, TransientError
from holdfast.runtime import contract
from holdfast.storage import open_store
from holdfast.storage.protocol import ObjectStore

TICK_SECONDS = 0.2
PROGRESS_SECONDS = 5.0
FETCHERS = WRITERS = 4
AHEAD_SECONDS = 0.5
"""So much of the model's work is leased and fetched ahead, and at least one batch."""
MOST_AHEAD, MOST_IN_CHILD = 64, 16
FAILED_BATCHES_TO_STOP = 3
"""Batches that fail to the last record before any record has succeeded, and the worker takes it for the function's fault."""
PATIENCE_SECONDS = 600.0
"""A store may be away for so long."""
MARGIN_SECONDS = 1.0
"""Of a notice's window, to write what is finished and to hand back the rest."""
SHUTDOWN_SECONDS = 25.0
"""An orderly shutdown gives at least so long on every cloud (GCP 30 s, EC2 minutes)."""
IDLE_DEATHS = 3
log = logging.getLogger("holdfast.batch.worker")


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a worker writes every five seconds to PREFIX/workers/NAME.json."""

    worker: str
    phase: str = "starting"
    records: int = 0
    """With a result. Counted here, so a batch that two workers did is counted where its result was taken."""
    failed: int = 0
    batches: int = 0
    dropped: int = 0
    """Batches whose result another worker had already created."""
    handed_back: int = 0
    """Batches that were begun and did not fit into a notice's window."""
    restarts: int = 0
    """Of the model's process, because a call hung or died."""
    busy_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            log.warning("%s", text)
            self.warnings.append(text)


class Worker:
    def __init__(
        self,
        store: ObjectStore,
        settings: WorkerSettings,
        open_queue: Callable[[], Any],
        name: str,
        surroundings: Surroundings | None = None,
    ) -> None:
        self._store, self._settings = store, settings
        self._clock = clock_from_environment()
        self._reporter = Reporter(surroundings) if surroundings else None
        self._notice_file = NoticeFile(surroundings.notice if surroundings else None)
        self._sigterm_at: datetime | None = None
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._open_queue = open_queue
        self._reader = Reader()
        self.progress = Progress(worker=name)
        self._numbers = iter(range(1, sys.maxsize))
        self._fetching: dict[int, Task] = {}
        self._ready: deque[Task] = deque()
        self._sent: dict[int, Task] = {}
        self._writing: dict[int, Task] = {}
        self._held_failures: list[Task] = []
        """Batches that failed to the last record, while nothing has succeeded yet."""
        self._batch_seconds: deque[float] = deque(maxlen=16)
        self._idle_deaths = self._kills_without_result = 0
        self._killed_because = ""
        self._leave_by: float | None = None
        """On the monotonic clock, once there was a notice."""
        self._began = self._worked_at = time.monotonic()
        self._next_tick = self._next_progress = 0.0

    def run(self) -> int:
        """The exit status."""
        self._model = ModelProcess(self._settings, self._inbox)
        self._leases = Leases(self._open_queue, self._settings.visibility_seconds, self._inbox)
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        phase = "failed"
        try:
            status = self._work()
            phase = {contract.EXIT_FINISHED: "finished"}.get(status, "preempted")
        except ProgramFailedError as error:
            print(f"holdfast: {error}", file=sys.stderr, flush=True)
            self.progress.warnings.append(str(error))
            status = 1
        finally:
            left = max(1.0, self._leave_by - time.monotonic()) if self._leave_by else 30.0
            self._hand_back([*self._fetching.values(), *self._ready, *self._sent.values(), *self._held_failures])
            self._model.end()
            self._writers.shutdown(wait=True)
            self._drain_written()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._leases.close(left)
            self.progress.phase = phase
            with contextlib.suppress(HoldfastError):
                self._write_progress()
        if status == contract.EXIT_FINISHED:
            self._event("finished", step=self.progress.records)
        return status

    def hear_sigterm(self) -> None:
        self._sigterm_at = self._sigterm_at or self._clock.now()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _work(self) -> int:
        self._event("attached")
        while True:
            with contextlib.suppress(queue.Empty):
                self._handle(self._inbox.get(timeout=TICK_SECONDS))
                for _ in range(1000):
                    self._handle(self._inbox.get_nowait())
            self._feed()
            if time.monotonic() >= self._next_tick:
                self._next_tick = time.monotonic() + TICK_SECONDS
                if (status := self._tick()) is not None:
                    return status

    def _handle(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("leases", leases):
                self._worked_at = time.monotonic()
                for lease in leases:
                    self._take(lease)
            case ("fetched", task):
                if self._fetching.pop(task.number, None):
                    self._ready.append(task)
            case ("piece", number, *answer):
                if task := self._sent.get(number):
                    self._collect(task, *answer)
            case ("written", task, won):
                self._written(task, won)
            case ("lost", leases):
                self._forget(leases)
            case ("ready",):
                self._model.ready = True
                self.progress.phase = "working"
                self._worked_at = time.monotonic()
            case ("dead", model):
                # The signal goes to the whole group, and a model that is still starting does not ignore it yet.
                if model is self._model and self._leave_by is None and not self._sigterm_at:
                    self._restart()
            case ("drop", task):
                self._fetching.pop(task.number, None)
            case ("given-up", task):
                if self._fetching.pop(task.number, None):
                    self._write(task)
            case ("unusable", text):
                raise ProgramFailedError(f"the function can't be used:\n{text}")
            case ("fatal", text):
                raise ProgramFailedError(text)

    def _tick(self) -> int | None:
        now = time.monotonic()
        if self._leave_by is None:
            self._look_for_notice()
        if self._leave_by is not None:
            return self._leave(self._leave_by)
        if self._model.is_dead:
            self._restart()
        call = self._model.call()
        if call and now - call.began > self._settings.batch_time_limit_seconds and call == self._model.call():
            self._killed_because = (
                f"the function took longer than {self._settings.batch_time_limit_seconds:g} s and was killed"
            )
            self._model.kill()
        if now >= self._next_progress:
            self._next_progress = now + PROGRESS_SECONDS
            self._writers.submit(self._write_progress)
        if self._fetching or self._ready or self._sent or self._writing:
            self._worked_at = now
        elif self._model.ready and now - self._worked_at > self._settings.idle_seconds:
            if not self._held_failures:
                return contract.EXIT_FINISHED
            self._write_held_failures()  # there is no more work to tell the function's fault from the records'
        return None

    # -- leases in ----------------------------------------------------------------------------------------------------

    def _typical_seconds(self) -> float:
        return sorted(self._batch_seconds)[len(self._batch_seconds) // 2] if self._batch_seconds else math.inf

    def _feed(self) -> None:
        if not self._model.ready or self._leave_by is not None:
            return
        seconds = max(self._typical_seconds(), 1e-4)
        while self._ready and len(self._sent) < min(MOST_IN_CHILD, 2 + int(0.1 / seconds)):
            task = self._ready.popleft()
            self._sent[task.number] = task
            self._model.send(task)
        ahead = min(MOST_AHEAD, int(AHEAD_SECONDS / seconds))
        wanted = 2 + ahead - len(self._fetching) - len(self._ready) - len(self._sent)
        if wanted > ahead // 4 or wanted == 2 + ahead:
            self._leases.want(wanted)

    def _take(self, lease: Any) -> None:
        try:
            spec = parse_spec(lease.body)
        except (ValueError, TypeError) as error:
            raise ProgramFailedError(
                f"queue {self._settings.queue_name} has a message that is no batch ({error}): {lease.body[:200]!r}; "
                "give this run a queue name of its own"
            ) from None
        task = Task(number=next(self._numbers), lease=lease, spec=spec)
        if self._leave_by is not None:
            self._hand_back([task])
            return
        self._fetching[task.number] = task
        self._pool.submit(self._fetch, task)

    def _fetch(self, task: Task) -> None:
        """In a thread."""
        spec, format = task.spec, self._settings.results_format
        try:
            if task.lease.deliveries > 1 and self._persist(
                lambda: results.exists(self._store, self._settings.prefix, spec, format)
            ):
                self._leases.acknowledge(task.lease)
                self._inbox.put(("drop", task))
                return
            task.data = self._persist(lambda: self._reader.read(spec))
            task.pieces = [(0, spec.records)]
            self._inbox.put(("fetched", task))
        except SourceChangedError as error:
            task.failed = list(enumerate(records.lost_rows(spec, f"SourceChangedError: {error}")))
            self._inbox.put(("given-up", task))
        except HoldfastError as error:
            self._inbox.put(("fatal", f"batch {spec.name} can't be read: {error}"))
        except Exception as error:
            log.exception("fetch")
            self._inbox.put(("fatal", f"batch {spec.name} can't be read: {error!r}"))

    def _forget(self, leases: list[Any]) -> None:
        """What others have by now, and the model has not begun, is theirs."""
        lost = {id(lease) for lease in leases}
        self._ready = deque(task for task in self._ready if id(task.lease) not in lost)

    # -- results out --------------------------------------------------------------------------------------------------

    def _collect(
        self,
        task: Task,
        start: int,
        stop: int,
        rows: bytes,
        failed: list[tuple[int, bytes]],
        count: int,
        seconds: float,
    ) -> None:
        task.pieces.remove((start, stop))
        task.done.append((start, rows))
        task.failed += failed
        task.results += count
        task.seconds += seconds
        self.progress.busy_seconds += seconds
        self._idle_deaths = 0
        if count:
            self._kills_without_result = 0
        if not task.pieces:
            self._complete(task)

    def _complete(self, task: Task) -> None:
        self._sent.pop(task.number, None)
        if task.results:
            self._batch_seconds.append(task.seconds)
            if task.seconds > self._settings.visibility_seconds:
                self.progress.warn(
                    f"a batch took {task.seconds:.1f} s, longer than its visibility timeout of "
                    f"{self._settings.visibility_seconds:g} s; its lease was extended meanwhile; raise the timeout"
                )
            self._write_held_failures()
            self._write(task)
            return
        succeeded = self.progress.records or any(one.results for one in self._writing.values())
        blank = all(b'"blank":true' in row[:60] for _, row in task.failed)
        if succeeded or blank:
            self._write(task)
            return
        self._held_failures.append(task)
        if len(self._held_failures) >= FAILED_BATCHES_TO_STOP:
            row = json.loads(min(task.failed)[1])
            raise ProgramFailedError(
                f"the first {len(self._held_failures)} batches failed to the last record, so it is the function that fails, or the "
                f"inputs' format; nothing was given up, mend it and start again. Record {row['record']}: {row['error']}\n"
                f"{row['traceback']}"
            )

    def _write_held_failures(self) -> None:
        held, self._held_failures = self._held_failures, []
        for task in held:
            self._write(task)

    def _write(self, task: Task) -> None:
        self._writing[task.number] = task
        self._writers.submit(self._publish, task)

    def _publish(self, task: Task) -> None:
        """In a thread."""
        format, prefix = self._settings.results_format, self._settings.prefix
        try:
            pieces = [rows for _, rows in sorted(task.done)] or [results.empty(format)]
            whole = results.joined(format, pieces)
            won = self._persist(lambda: results.publish(self._store, prefix, task.spec, format, whole, task.failed))
            self._leases.acknowledge(task.lease)
            self._inbox.put(("written", task, won))
        except HoldfastError as error:
            self._inbox.put(("fatal", f"the results of batch {task.spec.name} can't be written: {error}"))
        except Exception as error:
            log.exception("write")
            self._inbox.put(("fatal", f"the results of batch {task.spec.name} can't be written: {error!r}"))

    def _written(self, task: Task, won: bool) -> None:
        self._writing.pop(task.number, None)
        if not won:
            self.progress.dropped += 1
            return
        self.progress.batches += 1
        self.progress.records += task.results
        self.progress.failed += sum(b'"blank":true' not in row[:60] for _, row in task.failed)

    def _drain_written(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._inbox.get_nowait()
                if event[0] == "written":
                    self._written(event[1], event[2])

    def _persist(self, call: Callable[[], Any]) -> Any:
        """What `call` returns, however often the store must be asked. Raises the last TransientError after ten minutes."""
        give_up_at, pause = time.monotonic() + PATIENCE_SECONDS, 0.2
        while True:
            try:
                return call()
            except TransientError as error:
                if time.monotonic() > give_up_at or self._leave_by is not None:
                    raise
                log.warning("asked again after: %s", error)
            time.sleep(pause)
            pause = min(10.0, pause * 2)

    # -- a model that hangs or dies -----------------------------------------------------------------------------------

    def _restart(self) -> None:
        call, model = self._model.call(), self._model
        status = model.end()
        reason, self._killed_because = self._killed_because, ""
        reason = reason or f"the function's process died: {status_words(status)}"
        if not model.ready:
            raise ProgramFailedError(
                f"the function's process died while it was loaded: {status_words(status)}; see its log"
            )
        self.progress.restarts += 1
        self._blame(call, reason)
        self._model = ModelProcess(self._settings, self._inbox)
        for task in self._sent.values():
            self._model.send(task)

    def _blame(self, call: Call | None, reason: str) -> None:
        task = self._sent.get(call.number) if call else None
        if not call or not task:
            self._idle_deaths += 1
            if self._idle_deaths >= IDLE_DEATHS:
                raise ProgramFailedError(f"{reason}, {IDLE_DEATHS} times in a row between two batches")
            return
        log.warning("batch=%s records=%s-%s %s", task.spec.name, call.start, call.stop, reason)
        task.kills += 1
        self._kills_without_result += 1
        narrow = task.spec.records.bit_length()
        if self._kills_without_result > narrow + 3 and not self.progress.records:
            raise ProgramFailedError(
                f"{reason}, {self._kills_without_result} times in a row, and no record has succeeded: it is the function "
                "that fails; nothing was given up, mend it and start again"
            )
        task.split(call.start, call.stop, reason)
        if task.kills > 4 * (narrow + 1):
            for start, stop in task.pieces:
                task.give_up(start, stop, f"not tried any more: {reason}, {task.kills} times in this batch")
            task.pieces = []
        if not task.pieces:
            self._complete(task)

    # -- a machine that is taken away ---------------------------------------------------------------------------------

    def _look_for_notice(self) -> None:
        heard, now = self._notice_file.news(), self._clock.now()
        if heard and heard.kind != "rebalance":
            at = heard.reclaim_at or now + timedelta(seconds=SHUTDOWN_SECONDS)
        elif self._sigterm_at:
            at = self._sigterm_at + timedelta(seconds=SHUTDOWN_SECONDS)
        else:
            return
        self._leases.stop()
        window = (at - now) / timedelta(seconds=self._clock.speed)
        self._leave_by = time.monotonic() + max(0.0, window - MARGIN_SECONDS)
        call = self._model.call()
        current = self._sent.pop(call.number, None) if call else None
        unstarted = [*self._fetching.values(), *self._ready, *self._sent.values(), *self._held_failures]
        self._hand_back(unstarted)
        self._fetching, self._sent, self._held_failures = {}, {}, []
        self._ready.clear()
        if call and current:
            expected = max(self._batch_seconds, default=math.inf) - (time.monotonic() - call.began)
            if expected < self._leave_by - time.monotonic():
                self._sent[current.number] = current
            else:
                self._hand_back([current])
                self.progress.handed_back += 1
                self.progress.warn(
                    f"batch {current.spec.name} does not fit into the notice's {window:.1f} s and was handed back"
                )
        self.progress.phase = "preempting"
        self._event("preempting", step=self.progress.records, committed=bool(self._sent) or current is None)

    def _leave(self, by: float) -> int | None:
        """Until the batch in work is written, or the time is up."""
        if (self._sent or self._writing) and time.monotonic() < by and not self._model.is_dead:
            return None
        kept = not self._sent and not self.progress.handed_back
        return contract.EXIT_PREEMPTED_COMMITTED if kept else contract.EXIT_PREEMPTED_UNCOMMITTED

    def _hand_back(self, tasks: list[Task]) -> None:
        self._leases.hand_back([task.lease for task in tasks])

    # -- what is told -------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> None:
        if self._reporter:
            self._reporter.event(kind, **fields)

    def _write_progress(self) -> None:
        progress, seconds = self.progress, time.monotonic() - self._began
        told = {
            **{name: getattr(progress, name) for name in Progress.__slots__},
            "elapsed_seconds": seconds,
            "records_per_second": progress.records / seconds if seconds else 0.0,
            "batch_seconds": self._typical_seconds() if self._batch_seconds else None,
            "at": datetime.now(UTC).isoformat(),
        }
        try:
            self._store.put(f"{self._settings.prefix}/workers/{progress.worker}.json", json.dumps(told).encode())
        except TransientError as error:
            log.warning("progress not stored error=%s", error)
        if self._reporter and progress.phase == "working":
            self._reporter.step(progress.records, 0, {"records_per_second": told["records_per_second"]})


def worker_name() -> str:
    machine = os.environ.get(contract.MEMBER) or f"{socket.gethostname()}-{os.getpid()}"
    number = os.environ.get(WORKER, "")
    return f"{machine}-{number}" if number else machine


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        url, key = os.environ.get(contract.STORE, ""), os.environ.get(SETTINGS, "")
        if not url or not key:
            raise ConfigError(
                f"set {contract.STORE} to the store's URL and {SETTINGS} to the key of the worker's settings"
            )
        store = open_store(url)
        settings = read_settings(store, key)
        from holdfast.queues.opening import open_queue

        worker = Worker(
            store,
            settings,
            lambda: open_queue(
                settings.queue,
                settings.queue_name,
                visibility_seconds=settings.visibility_seconds,
                max_deliveries=settings.max_deliveries,
            ),
            worker_name(),
            Surroundings.from_environment(),
        )
        signal.signal(signal.SIGTERM, lambda *_: worker.hear_sigterm())
        signal.signal(signal.SIGINT, lambda *_: worker.hear_sigterm())
        status = worker.run()
    except HoldfastError as error:
        print(f"holdfast: {error}", file=sys.stderr, flush=True)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a fetch that hangs in the network holds nobody up


if __name__ == "__main__":
    main()
