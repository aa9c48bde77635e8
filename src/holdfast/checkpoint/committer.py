"""The training's side of the persist process: starts it, hands snapshots over, hears what became of them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import holdfast
from holdfast.checkpoint.commits import CheckpointId
from holdfast.checkpoint.persist import LINE_BYTES
from holdfast.checkpoint.persister import Ranks
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.checkpoint.reporting import Reporter
from holdfast.checkpoint.slots import Slot
from holdfast.checkpoint.snapshot import Snapshot
from holdfast.runtime.contract import PERSISTING_LOCK

log = logging.getLogger(__name__)

RECENT = 16
READY_SECONDS = 10.0
SHORTEST_LIFE_SECONDS = 1.0
"""A persist process that ends sooner is not started again at once."""


class InWork(NamedTuple):
    """A snapshot that is being made durable."""

    number: int
    step: int
    began: float
    """time.monotonic()"""


class Committer:
    """Nothing here waits for the persist process, but `wait`."""

    def __init__(
        self,
        attempt: int,
        ranks: Ranks,
        policy: CheckpointPolicy,
        budget_seconds: float,
        reporter: Reporter,
        log_file: Path | None,
    ) -> None:
        """Starts the process, which takes a moment: `begin` says when it is needed."""
        self._orders = {
            "kind": "orders",
            "ranks": asdict(ranks),
            "max_to_keep": policy.max_to_keep,
            "compression": policy.compression,
            "budget_seconds": budget_seconds,
        }
        self._attempt = attempt
        self._parent: CheckpointId | None = None
        self._reporter, self._log_file = reporter, log_file
        self._slots: Sequence[Slot] = []
        self._newest: Snapshot | None = None
        self._offered = 0
        self._metrics: list[tuple[int, Mapping[str, float]]] = []
        self.committed_step = -1
        self.finished_number = 0
        """Of the newest snapshot whose fate is known to be good: on a rank of several, its own part is durable."""
        self.commits: deque[float] = deque(maxlen=RECENT)
        """Seconds (wall) of the recent commits, from their begin to the manifest."""
        self.in_work: InWork | None = None
        self.commit_seconds: float | None = None
        self.commit_bytes = 0
        self.last_error = ""
        self.fenced = False
        """A later attempt has begun: nothing of this one counts any more."""
        self._rest = b""
        self._sending = threading.RLock()  # snapshots are offered from the thread that copies them
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = self._ready = False
        self._start()

    # -- for the loop -------------------------------------------------------------------------------------------------

    def begin(self, parent: CheckpointId | None) -> None:
        """Saving begins: `parent` is what was resumed from. Waits for the process, but not for one that can't start."""
        self._begun, self._parent = True, parent
        self.committed_step = parent.step if parent else -1
        self._send_orders()
        give_up_at = time.monotonic() + READY_SECONDS
        while not self._ready and time.monotonic() < give_up_at:
            self._hear(0.1)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.append((step, metrics))

    def metrics_until(self, step: int) -> list[tuple[int, Mapping[str, float]]]:
        """Those of steps that are not known to be committed."""
        return [record for record in self._metrics if record[0] <= step]

    def renew(self, slots: Sequence[Slot]) -> None:
        self._slots = list(slots)
        self._newest = None
        self._send_slots()

    def announce(self, snapshot: Snapshot) -> None:
        """It is being copied: what is copied of it may be on its way by the time it is offered."""
        self._send_offer(snapshot, "announce")

    def offer(self, snapshot: Snapshot) -> None:
        """Commit this one next; an older one that still waits is dropped."""
        self._newest = snapshot
        self._offered = snapshot.number
        self._send_offer(snapshot)

    @property
    def busy(self) -> bool:
        """Is there a snapshot whose fate is open?"""
        return self.finished_number < self._offered

    def poll(self) -> None:
        """Hear what the persist process said; start another when it has died."""
        self._hear(0.0)

    def wait(self, step: int, seconds: float) -> bool:
        """Until `step` is durable (True), or for `seconds` of the wall, or until this attempt is fenced."""
        give_up_at = time.monotonic() + seconds
        while self.committed_step < step and not self.fenced:
            left = give_up_at - time.monotonic()
            if left <= 0:
                return False
            self._hear(min(left, 0.5))
        return self.committed_step >= step

    def wait_until_idle(self, seconds: float) -> None:
        """Until nothing is being made durable, or for `seconds` of the wall, or until this attempt is fenced."""
        give_up_at = time.monotonic() + seconds
        while self.busy and not self.fenced and (left := give_up_at - time.monotonic()) > 0:
            self._hear(min(left, 0.5))

    def close(self) -> None:
        """The persist process finishes what it has begun, and ends."""
        with contextlib.suppress(OSError):
            self._connection.close()

    # -- the process --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        package = str(Path(holdfast.__file__).parent.parent)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        with theirs, open(self._log_file or os.devnull, "ab") as said, self._hold_machine() as held:
            # A session of its own: what ends the training's process group must not end a commit that has begun.
            self._process = subprocess.Popen(
                # -P: a file of the program's, queue.py say, must not stand in for Python's own.
                [sys.executable, "-P", "-m", "holdfast.checkpoint.persist", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), *held],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=environment,
                start_new_session=True,
            )
        self._started_at = time.monotonic()
        with self._sending:  # orders first, then slots: an offer before them would not be understood
            self._connection, self._rest = ours, b""
            if self._begun:
                self._send_orders()
            if self._slots:
                self._send_slots()
            if self._newest is not None and self.busy:
                self._send_offer(self._newest)

    @contextlib.contextmanager
    def _hold_machine(self) -> Iterator[list[int]]:
        """A locked file for the new process: while that lives, the machine's agent does not end the machine. The lock
        is taken here, so that there is no moment without it when this process is killed.
        """
        if self._log_file is None:
            yield []
            return
        with open(self._log_file.with_name(PERSISTING_LOCK), "ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield [file.fileno()]

    def _send(self, message: Mapping[str, Any], files: Sequence[int] = ()) -> None:
        with self._sending, contextlib.suppress(OSError):  # it is dead; the next look at it finds that out
            socket.send_fds(self._connection, [json.dumps(message).encode() + b"\n"], files)

    def _send_orders(self) -> None:
        self._send({**self._orders, "parent": str(self._parent) if self._parent else None})

    def _send_slots(self) -> None:
        sizes = [slot.capacity_bytes for slot in self._slots]
        self._send({"kind": "slots", "sizes": sizes}, [slot.fileno() for slot in self._slots])

    def _send_offer(self, snapshot: Snapshot, kind: str = "offer") -> None:
        self._send(
            {
                "kind": kind,
                "number": snapshot.number,
                "slot": next(index for index, slot in enumerate(self._slots) if slot is snapshot.slot),
                "step": snapshot.step,
                "began": snapshot.began,
                "hold_seconds": snapshot.hold_seconds,
                "folder": str(snapshot.folder or ""),
            }
        )

    def _hear(self, seconds: float) -> None:
        if self._process is None:
            self._start_again(seconds)
            return
        waiting = select.poll()  # select.select knows no file beyond the 1023rd, and data loaders open many
        waiting.register(self._connection, select.POLLIN)
        if not waiting.poll(seconds * 1000):
            return
        try:
            data = self._connection.recv(LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._restart()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take_in(json.loads(line))

    def _take_in(self, message: Mapping[str, Any]) -> None:
        match message["kind"]:
            case "ready":
                self._ready = True
            case "begun":
                self.in_work = InWork(message["number"], message["step"], message["began"])
            case "committed":
                if message["commit_seconds"] is not None:
                    self.commits.append(message["commit_seconds"])
                    self.commit_seconds = message["commit_seconds"]
                self._end_work(message["number"])
                self.committed_step = max(self.committed_step, message["step"])
                self.finished_number = max(self.finished_number, message["number"])
                self.commit_bytes, self.last_error = message["bytes"], ""
                self._metrics = [record for record in self._metrics if record[0] > message["step"]]
                self._parent = CheckpointId(self._attempt, message["step"])
            case "part":
                self.finished_number = max(self.finished_number, message["number"])
            case "failed":
                self._end_work(message["number"])
                self.last_error = message["error"]
            case "fenced":
                self.fenced = True

    def _end_work(self, number: int) -> None:
        if self.in_work and self.in_work.number <= number:
            self.in_work = None

    def _restart(self) -> None:
        self.in_work = None
        process, self._process = self._process, None
        assert process is not None
        if self.fenced:
            self._connection.close()
            return
        status = process.wait()  # its end of the line is closed, so it has ended, or is about to
        log.warning("the persist process ended status=%s; another is started", status)
        step = self._newest.step if self._newest else 0
        self.last_error = f"the persist process ended with status {status}"
        self._reporter.event("commit-failed", step=step, error=self.last_error)
        self._connection.close()

    def _start_again(self, seconds: float) -> None:
        """At once, but not when the last one died at birth: then after a while. Training goes on meanwhile."""
        left = self._started_at + SHORTEST_LIFE_SECONDS - time.monotonic()
        if left > 0 or self.fenced:
            time.sleep(max(0.0, min(left, seconds)))
            return
        try:
            self._start()
        except OSError as error:
            self._started_at = time.monotonic()
            log.warning("no persist process could be started error=%s", error)
