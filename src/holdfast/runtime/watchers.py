"""Who may tell the agent that its machine is to go: the cloud, and the lease."""

from __future__ import annotations

import http.client
import json
import logging
import threading
from collections.abc import Callable
from datetime import datetime, timedelta

from holdfast.clock import Clock
from holdfast.errors import HoldfastError
from holdfast.runtime.contract import lease_key
from holdfast.runtime.metadata import GcpMetadata, MetadataService, Notice, candidate_services
from holdfast.storage import ObjectStore

log = logging.getLogger(__name__)

LEASE_GRACE_SECONDS = 60.0
FIRST_LEASE_SECONDS = 900.0
OVERDUE_SECONDS = 120.0
"""A machine whose agent did not end by itself so long after its lease is powered off all the same."""


class Watcher(threading.Thread):
    """Goes on until the process ends, or is told to `stop`."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()


class NoticeWatcher(Watcher):
    """Asks the metadata service every `poll_seconds`; on GCP it is told at once (`wait_for_change`)."""

    def __init__(self, clock: Clock, poll_seconds: float, tell: Callable[[Notice], None]) -> None:
        super().__init__("notice-watcher")
        self._clock, self._poll_seconds, self._tell = clock, poll_seconds, tell
        self.dialect = ""

    def run(self) -> None:
        service = self._find_service()
        self.dialect = service.dialect if service else ""
        while service and not self._stopped.is_set():
            try:
                if notice := service.notice():
                    self._tell(notice)
                    if notice.kind == "preemption":
                        return
                if isinstance(service, GcpMetadata):
                    service.wait_for_change(seconds=60)
                else:
                    self._pause()
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                log.warning("metadata service can't be read error=%s", error)
                self._pause()

    def _pause(self) -> None:
        self._stopped.wait(self._poll_seconds / self._clock.speed)

    def _find_service(self) -> MetadataService | None:
        while not self._stopped.is_set():
            for service in candidate_services(self._clock):
                if service.answers():
                    return service
            log.warning("no metadata service answers: an interruption notice can't be heard")
            self._pause()
        return None


class LeaseWatcher(Watcher):
    """The dead-man's switch: a machine that nobody supervises, or that was replaced, ends itself."""

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        attempt: int,
        clock: Clock,
        poll_seconds: float,
        tell: Callable[[Notice], None],
        power_off: Callable[[], None],
    ) -> None:
        super().__init__("lease-watcher")
        self._store, self._key, self._attempt = store, lease_key(run_id), attempt
        self._clock, self._poll_seconds, self._tell, self._power_off = clock, poll_seconds, tell, power_off
        # Until the first is read: a store that never answers must not make a machine that never ends.
        self._expires_at = clock.now() + timedelta(seconds=FIRST_LEASE_SECONDS)
        self._told = False

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._look()
            except (HoldfastError, OSError, ValueError, KeyError, TypeError) as error:
                # A store that refuses too: the lease that was read last must still end.
                log.warning("lease can't be read error=%s", error)
            now = self._clock.now()
            if now >= self._expires_at:
                self._say(now + timedelta(seconds=LEASE_GRACE_SECONDS), "nobody renewed the lease")
                if now >= self._expires_at + timedelta(seconds=OVERDUE_SECONDS):
                    self._power_off()
            # Never faster than the wall bears: a fast clock must not turn this into a busy loop.
            self._stopped.wait(max(0.1, self._poll_seconds / self._clock.speed))

    def _look(self) -> None:
        lease = json.loads(self._store.get(self._key))
        expires_at = datetime.fromisoformat(lease["expires_at"])
        if lease["attempt"] > self._attempt:
            self._expires_at = min(self._expires_at, self._clock.now())
            self._say(self._expires_at + timedelta(seconds=LEASE_GRACE_SECONDS), "a later attempt has the lease")
        elif lease.get("stop"):
            self._expires_at = expires_at
            self._say(expires_at, f"asked to stop: {lease['stop']}")
        elif not self._told:
            self._expires_at = expires_at

    def _say(self, reclaim_at: datetime, why: str) -> None:
        if not self._told:
            log.warning("lease ends reclaim_at=%s why=%s", reclaim_at.isoformat(), why)
            self._told = True
            self._tell(Notice(kind="lease", reclaim_at=reclaim_at, seen_at=self._clock.now()))
