"""The orchestrator's pulse: the lease that machines live by, and the sign that the run has an owner."""

from __future__ import annotations

import json
import logging
import threading
from datetime import timedelta

from holdfast.clock import Clock
from holdfast.errors import HoldfastError
from holdfast.runtime.contract import lease_key
from holdfast.storage import ObjectStore
from holdfast.supervision.ownership import Ownership

log = logging.getLogger(__name__)

LONGEST_WALL_SECONDS = 5.0


class Keepalive:
    def __init__(self, store: ObjectStore, run_id: str, clock: Clock, lease_seconds: float, owner: Ownership) -> None:
        self._store, self._run_id, self._clock, self._owner = store, run_id, clock, owner
        self._lease_seconds = lease_seconds
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._stopping = ""
        self.attempt: int | None = None
        """The attempt whose machine may live; None: no lease is renewed."""
        self.taken = False
        """True when another process has taken the run over: this one must not touch it any more."""

    def start(self) -> None:
        self._thread = threading.Thread(target=self._beat, name="keepalive", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def renew(self) -> None:
        """A fresh lease for the machine of `attempt`."""
        with self._lock:
            self._stopping = ""
            self._write(self._lease_seconds)

    def ask_to_stop(self, why: str, grace_seconds: float) -> None:
        """Let the lease run out: the machine commits, and ends itself within `grace_seconds`."""
        with self._lock:
            if not self._stopping:
                self._stopping = why
                self._write(grace_seconds)

    def _write(self, seconds: float) -> None:
        expires_at = self._clock.now() + timedelta(seconds=seconds)
        lease = {"attempt": self.attempt, "expires_at": expires_at.isoformat(), "stop": self._stopping}
        self._store.put(lease_key(self._run_id), json.dumps(lease).encode())

    def _beat(self) -> None:
        pause = min(LONGEST_WALL_SECONDS, self._lease_seconds / self._clock.speed / 6)
        while not self._done.wait(pause):
            try:
                if not self._owner.is_mine():
                    self.taken = True
                    return
                self._owner.renew()
                with self._lock:
                    if self.attempt is not None and not self._stopping:
                        self._write(self._lease_seconds)
            except (HoldfastError, OSError) as error:
                log.warning("lease not renewed run=%s error=%s", self._run_id, error)
