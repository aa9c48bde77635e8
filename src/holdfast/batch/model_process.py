"""The worker's side of the model's process: start, feed, watch, kill."""

from __future__ import annotations

import mmap
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from holdfast.batch import records
from holdfast.batch.child import CALL
from holdfast.batch.settings import WorkerSettings
from holdfast.batch.spec import BatchSpec


@dataclass(slots=True, kw_only=True)
class Task:
    """A leased batch on its way through this worker."""

    number: int
    lease: Any
    spec: BatchSpec
    data: bytes = b""
    pieces: list[tuple[int, int]] = field(default_factory=list)
    """Places of the batch that have no answer yet; the whole batch unless a call hung or died."""
    done: list[tuple[int, bytes]] = field(default_factory=list)
    """(first place, rows) of the pieces that have."""
    failed: list[tuple[int, bytes]] = field(default_factory=list)
    results: int = 0
    seconds: float = 0.0
    kills: int = 0

    def split(self, start: int, stop: int, reason: str) -> None:
        """A call on the records from `start` to `stop` hung or died: try its halves; one record alone is given up."""
        suspects: list[tuple[int, int]] = []
        rest: list[tuple[int, int]] = []
        for first, last in self.pieces:
            if not (first <= start and stop <= last):
                rest.append((first, last))
                continue
            if stop - start > 1:
                middle = (start + stop) // 2
                suspects += [(start, middle), (middle, stop)]
            else:
                self.give_up(start, stop, reason)
            rest += [piece for piece in ((first, start), (stop, last)) if piece[0] < piece[1]]
        self.pieces = suspects + rest

    def give_up(self, start: int, stop: int, reason: str) -> None:
        for place, record in enumerate(records.parse(self.spec, self.data, start, stop), start):
            self.failed.append((place, records.failed_row(self.spec, place, record, reason)))


@dataclass(frozen=True, slots=True)
class Call:
    """The call of the function that is under way."""

    number: int
    start: int
    stop: int
    began: float
    """Of time.monotonic, which all processes of a machine share."""


class ModelProcess:
    """Puts what the process says into `inbox`: ('ready',), ('unusable', text), ('piece', ...), and ('dead', self) at its end.

    Made in a thread that lives as long as it does: Linux ends the process with the thread that started it.
    """

    def __init__(self, settings: WorkerSettings, inbox: SimpleQueue[tuple[Any, ...]]) -> None:
        self._inbox = inbox
        self.ready = False
        receive, self._tasks = Pipe(duplex=False)
        self._answers, send = Pipe(duplex=False)
        with tempfile.TemporaryFile() as file:
            file.truncate(mmap.PAGESIZE)
            self._shared = mmap.mmap(file.fileno(), mmap.PAGESIZE)
            numbers = (receive.fileno(), send.fileno(), file.fileno())
            words = (settings.function, settings.setup, settings.results_format, *map(str, numbers))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "holdfast.batch.child", *words], stdin=subprocess.DEVNULL, pass_fds=numbers
            )
        receive.close()
        send.close()
        self._outbox: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        threading.Thread(target=self._send, args=(self._tasks,), name="to-model", daemon=True).start()
        threading.Thread(target=self._receive, name="from-model", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, task: Task) -> None:
        self._outbox.put((task.number, task.spec.body, task.data, list(task.pieces)))

    def call(self) -> Call | None:
        """None: between two calls."""
        number, start, stop, began, again = CALL.unpack_from(self._shared, 0)
        return Call(number, start, stop, began) if number and number == again else None

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Its exit status; it is killed if it still runs."""
        self._process.kill()
        self._outbox.put(None)
        return self._process.wait()

    @property
    def is_dead(self) -> bool:
        """Also when a process of its own holds the pipe open."""
        return self._process.poll() is not None

    def _send(self, tasks: Connection) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                tasks.send(message)
        except OSError:  # it is dead, and the other thread says so
            pass
        tasks.close()

    def _receive(self) -> None:
        try:
            while True:
                self._inbox.put(self._answers.recv())
        except (EOFError, OSError):
            self._inbox.put(("dead", self))


def status_words(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
