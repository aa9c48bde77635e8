"""Checkpoints of programs that know nothing of us: folders, each committed as a whole.

The program writes `$HOLDFAST_CHECKPOINT_DIRECTORY/<step>.tmp/` and renames it to `<step>` when it is complete.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from holdfast.checkpoint.folders import FolderCommitter
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.checkpoint.reporting import Console
from holdfast.clock import Clock
from holdfast.errors import HoldfastError, TransientError
from holdfast.runtime import contract
from holdfast.storage import ObjectStore

COMPLETE = re.compile(r"^[0-9]{1,12}$")
LOOK_SECONDS = 0.2


class FolderCheckpoints:
    """Restores the newest folder, then commits new ones from a thread of its own: an upload must not delay a notice.

    A folder's number is the only step such a program tells, so it goes on the console for it, as soon as it is seen.
    """

    def __init__(
        self, folder: Path, store: ObjectStore, run_id: str, attempt: int, policy: CheckpointPolicy, clock: Clock
    ) -> None:
        self._folder, self._clock = folder, clock
        self._committer = FolderCommitter(store, run_id, attempt, policy)
        self._console = Console(Path(os.environ[contract.CONSOLE]) if os.environ.get(contract.CONSOLE) else None)
        self._committed = self._seen = -1
        self.restored_step: int | None = None
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._commit_until_stopped, name="folder-commits", daemon=True)

    def restore(self) -> dict[str, str]:
        """Bring back the newest folder; the program's environment that says where it is."""
        self._folder.mkdir(parents=True, exist_ok=True)
        environment = {contract.CHECKPOINT_DIRECTORY: str(self._folder)}
        restored = self._committer.restore(self._folder)
        for checkpoint, error in self._committer.damaged:
            self._tell("damaged", checkpoint=checkpoint, error=error)
        if restored:
            self._committed, folder = restored
            self.restored_step = self._seen = self._committed
            self._console.phase("resumed", self._committed)
            environment |= {contract.RESUME_DIRECTORY: str(folder), contract.RESUME_STEP: str(self._committed)}
        self._thread.start()
        return environment

    def new_events(self) -> list[dict[str, Any]]:
        return [self._events.get() for _ in range(self._events.qsize())]

    def finish(self) -> list[dict[str, Any]]:
        """Commit what the program left complete; what there is to tell."""
        self._stop.set()
        self._thread.join()
        self._commit_newest()
        return self.new_events()

    def _commit_until_stopped(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._commit_newest()

    def _commit_newest(self) -> None:
        try:
            complete = {int(path.name): path for path in self._folder.iterdir() if COMPLETE.match(path.name)}
        except OSError:  # the program has removed the folder; it may make it again
            return
        if not complete or max(complete) <= self._committed:
            return
        step = max(complete)
        if step > self._seen:
            self._seen = step
            self._console.step(step, {})
        self._console.phase("commit", step)
        began = self._clock.now()
        try:
            size_bytes = self._committer.commit(complete[step], step)
        except (HoldfastError, OSError) as error:
            if not isinstance(error, TransientError):
                self._committed = step  # asking again would not help; the next folder may be better
            self._tell("commit-failed", step=step, error=str(error))
            return
        self._committed = step
        self._console.phase("committed", step)
        seconds = (self._clock.now() - began).total_seconds()
        self._tell(
            "committed",
            step=step,
            bytes=size_bytes,
            commit_seconds=seconds,
            wall_commit_seconds=seconds / self._clock.speed,
        )
        for older in complete.keys() - {step}:
            shutil.rmtree(complete[older], ignore_errors=True)

    def _tell(self, kind: str, **fields: Any) -> None:
        self._events.put({"kind": kind, "at": self._clock.now().isoformat(), **fields})
