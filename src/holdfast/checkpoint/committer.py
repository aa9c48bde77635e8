"""The background thread that makes snapshots durable, one at a time, always the newest."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint import tensors as tensor_file
from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.folders import FILES, plain_files
from holdfast.checkpoint.reader import STATE, TREE
from holdfast.checkpoint.reporting import Reporter
from holdfast.clock import Clock
from holdfast.errors import AlreadyExistsError
from holdfast.runtime.contract import metrics_prefix
from holdfast.storage import ObjectStore

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """A consistent copy of the state after `step` steps; shares no memory with it."""

    step: int
    tree: dict[str, Any]
    tensors: dict[str, Any]
    folder: Path | None
    """A copy of the user's checkpoint directory, where there is one."""
    metadata: dict[str, Any]
    seconds: float
    """What taking it cost the training, on the machine's clock."""


class Committer:
    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        attempt: int,
        max_to_keep: int,
        reporter: Reporter,
        clock: Clock,
        parent: CheckpointId | None,
    ) -> None:
        self._store, self._attempt, self._max_to_keep = store, attempt, max_to_keep
        self._checkpoints = Checkpoints(store, run_id)
        self._metrics_prefix = metrics_prefix(run_id)
        self._reporter, self._clock, self._parent = reporter, clock, parent
        self._changed = threading.Condition()
        self._waiting: Snapshot | None = None
        self._metrics: list[tuple[int, Mapping[str, float]]] = []
        self.committed_step = parent.step if parent else -1
        self.commit_seconds: float | None = None
        self.fenced = False
        """A later attempt has begun: nothing of this one counts any more."""
        threading.Thread(target=self._work, name="holdfast-commits", daemon=True).start()

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.append((step, metrics))  # list.append is atomic; the thread takes what is there

    def offer(self, snapshot: Snapshot) -> None:
        """Commit this one next; an older one that still waits is dropped."""
        with self._changed:
            dropped, self._waiting = self._waiting, snapshot
            self._changed.notify_all()
        if dropped:
            _discard(dropped)

    def wait(self, step: int, seconds: float | None) -> bool:
        """Until `step` is durable (True), or for `seconds` of the wall, or until this attempt is fenced."""
        with self._changed:
            return self._changed.wait_for(lambda: self.committed_step >= step or self.fenced, seconds) and (
                self.committed_step >= step
            )

    def _work(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while not self.fenced:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                snapshot = self._waiting
                self._waiting = None
            assert snapshot
            try:
                self._commit(snapshot)
                pause = FIRST_PAUSE_SECONDS
                _discard(snapshot)
            except Exception as error:  # whatever it is: it must not stop the training, and must not go unsaid
                log.warning("commit failed step=%s error=%r", snapshot.step, error)
                self._reporter.event("commit-failed", step=snapshot.step, error=str(error) or repr(error))
                with self._changed:
                    # Try this one again, unless a newer one comes meanwhile.
                    if not self._changed.wait_for(lambda: self._waiting is not None, pause):
                        self._waiting = snapshot
                    else:
                        _discard(snapshot)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _commit(self, snapshot: Snapshot) -> None:
        if self._checkpoints.superseded(self._attempt):
            with self._changed:
                self.fenced = True
                self._changed.notify_all()
            return
        began, began_wall = self._clock.now(), time.monotonic()
        checkpoint = CheckpointId(self._attempt, snapshot.step)
        self._reporter.phase("commit", snapshot.step)
        metrics = [record for record in self._metrics if record[0] <= snapshot.step]
        self._write_metrics(checkpoint, metrics)
        manifest = {"kind": "state", "parent": str(self._parent) if self._parent else None, **snapshot.metadata}
        try:
            size_bytes = self._checkpoints.commit(checkpoint, _objects(snapshot), manifest)
        except AlreadyExistsError:
            size_bytes = 0  # this very step was committed before
        self._reporter.phase("committed", snapshot.step)
        self._metrics = [record for record in self._metrics if record[0] > snapshot.step]
        seconds = (self._clock.now() - began).total_seconds()
        with self._changed:
            self.committed_step, self.commit_seconds, self._parent = snapshot.step, seconds, checkpoint
            self._changed.notify_all()
        speed = self._clock.speed
        self._reporter.event(
            "committed",
            step=snapshot.step,
            bytes=size_bytes,
            snapshot_seconds=snapshot.seconds,
            stall_seconds=snapshot.seconds,
            wall_stall_seconds=snapshot.seconds / speed,
            commit_seconds=seconds,
            wall_commit_seconds=time.monotonic() - began_wall,
        )
        self._checkpoints.prune(self._attempt, self._max_to_keep)

    def _write_metrics(self, checkpoint: CheckpointId, metrics: list[tuple[int, Mapping[str, float]]]) -> None:
        """Durable before the manifest: a committed step never lacks its metrics."""
        if metrics:
            lines = [
                json.dumps({"step": step, "attempt": self._attempt, "metrics": values}) for step, values in metrics
            ]
            self._store.put(f"{self._metrics_prefix}{checkpoint}.jsonl", "\n".join(lines).encode())


def _objects(snapshot: Snapshot) -> dict[str, Any]:
    pieces: dict[str, Callable[[], Any] | Any] = {TREE: [json.dumps(snapshot.tree).encode()]}
    if snapshot.tensors:
        pieces[STATE] = tensor_file.encode(snapshot.tensors)
    if snapshot.folder:
        for name, path in plain_files(snapshot.folder):
            pieces[FILES + name] = [path.read_bytes()]
    return pieces


def _discard(snapshot: Snapshot) -> None:
    if snapshot.folder:
        shutil.rmtree(snapshot.folder, ignore_errors=True)
