"""Many simulated workers on one queue: threads of one process, each with a connection of its own, that speak with the
queue as a worker does and sleep where it would infer.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from holdfast.batch.worker import PROGRESS_SECONDS
from holdfast.queues.opening import open_queue
from holdfast.queues.protocol import Queue
from holdfast.storage import DirectoryStore

NAME, PREFIX = "batch", "runs/batch"
VISIBILITY_SECONDS = 15.0
"""A fortieth of the default: forty times its extensions."""
UNEXTENDED_VISIBILITY_SECONDS = 600.0
"""The default, where nothing is extended: a thread that waits for its turn may wait for longer than 15 s."""
LOOK_SECONDS = 5.0
WARM_BATCHES = 2
BODY = json.dumps({"id": "0" * 16, "index": 0, "source": "s3://bucket/documents/part-00000.jsonl", "pad": "x" * 200})


class Coordinator:
    def __init__(self, folder: Path, workers: int, visibility_seconds: float) -> None:
        self._visibility_seconds = visibility_seconds
        self._folder, self._store = folder, DirectoryStore(folder / "store")
        self._url = f"sqlite://{folder}/queue.db"
        self._stop, self._start = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self.acknowledged = self.lost = 0
        self._workers = workers
        self._queues = [self.open() for _ in range(workers)]

    def open(self) -> Queue:
        return open_queue(self._url, NAME, visibility_seconds=self._visibility_seconds)

    @contextmanager
    def _timed(self, verb: str) -> Any:
        began = time.monotonic()
        yield
        with self._lock:
            self._seconds[verb].append(time.monotonic() - began)

    def run(self, batch_seconds: float, seconds: float) -> dict[str, Any]:
        """All workers for so long, each batch taking about so long. 0: nothing but leases and acknowledgements."""
        self._stop.clear()
        self._start.clear()
        self.acknowledged = self.lost = 0
        work = self._paced if batch_seconds else self._without_pause
        threads = [
            threading.Thread(target=work, args=(number, queue, batch_seconds))
            for number, queue in enumerate(self._queues)
        ]
        threading.stack_size(256 * 1024)
        for thread in threads:
            thread.start()
        self._start.set()
        time.sleep(WARM_BATCHES * batch_seconds)
        with self._lock:
            self._seconds.clear()
            before = self.acknowledged
        began = time.monotonic()
        passes = []
        while time.monotonic() - began < seconds:
            if batch_seconds:
                passes.append(self._look())
            time.sleep(min(LOOK_SECONDS, max(0.01, seconds - (time.monotonic() - began))))
        with self._lock:
            elapsed, done = time.monotonic() - began, self.acknowledged - before
            timed = {verb: list(values) for verb, values in sorted(self._seconds.items())}
        self._stop.set()
        for thread in threads:
            thread.join()
        in_queue = sum(sum(timed.get(verb, [])) for verb in ("lease", "extend", "acknowledge"))
        return {
            "batch_seconds": batch_seconds,
            "batches_per_second": done / elapsed,
            "calls_per_second": {verb: len(values) / elapsed for verb, values in timed.items()},
            "milliseconds": {
                verb: {"median": 1e3 * median(values), "99 %": 1e3 * quantiles(values, n=100)[-1]}
                for verb, values in timed.items()
                if len(values) > 1
            },
            "percent_of_workers_time_in_the_queue": 100 * in_queue / (elapsed * self._workers),
            "controller_seconds_a_look": median(passes) if passes else None,
            "lost_leases": self.lost,
        }

    def _paced(self, number: int, queue: Queue, batch_seconds: float) -> None:
        dice = random.Random(number)
        self._start.wait()
        self._stop.wait(dice.uniform(0, batch_seconds))  # they don't begin at the same instant
        tell_at, extend_at, records = time.monotonic() + dice.uniform(0, PROGRESS_SECONDS), 0.0, 0
        while not self._stop.is_set():
            with self._timed("lease"):
                leases = queue.lease(1)
            if not leases:
                self._stop.wait(0.5)
                continue
            extend_at = time.monotonic() + VISIBILITY_SECONDS / 3
            done_at = time.monotonic() + batch_seconds * dice.uniform(0.5, 1.5)
            while (now := time.monotonic()) < done_at and not self._stop.is_set():
                if now >= extend_at:
                    with self._timed("extend"):
                        self._count(lost=len(queue.extend(leases)))
                    extend_at = now + VISIBILITY_SECONDS / 3
                if now >= tell_at:
                    tell_at = now + PROGRESS_SECONDS
                    self._tell(number, records)
                self._stop.wait(max(0.0, min(done_at, extend_at, tell_at) - time.monotonic()))
            with self._timed("acknowledge"):
                queue.acknowledge(leases)
            records += 100
            self._count(acknowledged=1)

    def _without_pause(self, number: int, queue: Queue, _: float) -> None:
        self._start.wait()
        while not self._stop.is_set():
            with self._timed("lease"):
                leases = queue.lease(1)
            if leases:
                with self._timed("acknowledge"):
                    queue.acknowledge(leases)
                self._count(acknowledged=len(leases))

    def _count(self, acknowledged: int = 0, lost: int = 0) -> None:
        with self._lock:
            self.acknowledged += acknowledged
            self.lost += lost

    def _tell(self, number: int, records: int) -> None:
        told = {
            "worker": f"machine-{number}-0",
            "phase": "working",
            "records": records,
            "failed": 0,
            "busy_seconds": 1.0,
        }
        with self._timed("progress"):
            self._store.put(f"{PREFIX}/workers/{told['worker']}.json", json.dumps(told).encode())

    def _look(self) -> float:
        """As the controller: every worker's progress, and how deep the queue is."""
        began = time.monotonic()
        for info in self._store.list(f"{PREFIX}/workers/"):
            json.loads(self._store.get(info.key))
        self._queues[0].depth()
        return time.monotonic() - began

    def close(self) -> None:
        for queue in self._queues:
            queue.close()


def coordinate(folder: str, workers: int, batch_seconds: float, seconds: float, batches: int) -> dict[str, Any]:
    """`batches`: in the queue at the beginning. Once paced, once as fast as it goes."""
    coordinator = Coordinator(Path(folder), workers, VISIBILITY_SECONDS)
    queue = coordinator.open()
    queue.put([BODY.encode()] * batches)
    paced = coordinator.run(batch_seconds, seconds)
    left = queue.depth()
    exact = left.waiting + left.leased == batches - coordinator.acknowledged
    coordinator.close()
    coordinator = Coordinator(Path(folder), workers, UNEXTENDED_VISIBILITY_SECONDS)
    unpaced = coordinator.run(0.0, seconds / 2)
    left_again = queue.depth()
    exact &= left_again.waiting + left_again.leased == left.waiting + left.leased - coordinator.acknowledged
    queue.close()
    coordinator.close()
    return {
        "workers": workers,
        "paced": paced,
        "without_pause": unpaced,
        "every_batch_acknowledged_once": exact,
        "shortest_batch_seconds": workers / unpaced["batches_per_second"],
    }
