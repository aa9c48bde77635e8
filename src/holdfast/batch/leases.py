"""A worker's leases: every call of its queue, in one thread, several leases at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from holdfast.errors import HoldfastError, TransientError

LINGER_SECONDS = 0.005
"""Acknowledgements are gathered for so long: a queue's cost is by the call."""
EMPTY_SECONDS = 0.2
"""Between two looks into an empty queue while there is other work."""
PATIENCE_SECONDS = 300.0
"""A broker may be away for so long (a restart)."""
log = logging.getLogger(__name__)


class Leases:
    """Puts ('leases', [Lease]), ('lost', [Lease]) and ('fatal', text) into `inbox`; ('nothing',) when there was none."""

    def __init__(
        self, open_queue: Callable[[], Any], visibility_seconds: float, inbox: SimpleQueue[tuple[Any, ...]]
    ) -> None:
        self._open, self._inbox = open_queue, inbox
        self._extend_seconds = visibility_seconds / 3
        self._changed = threading.Condition()
        self._wanted = 0
        self._done: list[Any] = []
        self._back: list[Any] = []
        self._held: dict[int, Any] = {}
        self._stopped = self._closing = False
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
        self._thread.start()

    def want(self, count: int) -> None:
        """So many more, as soon as they are to be had; replaces what was wanted before."""
        with self._changed:
            if self._wanted != count and not self._stopped:
                self._wanted = count
                self._changed.notify()

    def stop(self) -> None:
        """Nothing more is leased from now on."""
        with self._changed:
            self._stopped = True
            self._wanted = 0
            self._changed.notify()

    def acknowledge(self, lease: Any) -> None:
        with self._changed:
            self._done.append(lease)
            self._changed.notify()

    def hand_back(self, leases: Sequence[Any]) -> None:
        with self._changed:
            self._back.extend(leases)
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """What was acknowledged is said to the queue and everything else handed back, if it hears it in time."""
        self.stop()
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        queue = None
        failing_since: float | None = None
        extend_at = time.monotonic() + self._extend_seconds
        while True:
            try:
                if queue is None:
                    queue = self._open()
                extend_at = self._round(queue, extend_at)
                failing_since = None
            except StopIteration:
                queue.close()
                return
            except TransientError as error:
                now = time.monotonic()
                failing_since = failing_since or now
                log.warning("queue: %s", error)
                if now - failing_since > PATIENCE_SECONDS or self._closing:
                    self._inbox.put(("fatal", f"the queue has not answered for {now - failing_since:.0f} s: {error}"))
                    return
                time.sleep(min(5.0, 0.2 + (now - failing_since) / 4))
            except HoldfastError as error:
                self._inbox.put(("fatal", f"{type(error).__name__}: {error}"))
                return
            except Exception as error:
                log.exception("queue")
                self._inbox.put(("fatal", f"queue: {error!r}"))
                return

    def _round(self, queue: Any, extend_at: float) -> float:
        with self._changed:
            if not (self._wanted or self._done or self._back or self._closing):
                self._changed.wait(min(0.5, max(0.0, extend_at - time.monotonic())))
            if self._done and not self._back and not self._closing:
                self._changed.wait(LINGER_SECONDS)
            done, back, wanted, closing = list(self._done), list(self._back), self._wanted, self._closing
        if back:
            queue.hand_back(back)
        if done:
            queue.acknowledge(done)
        with self._changed:
            del self._done[: len(done)], self._back[: len(back)]
            for lease in [*done, *back]:
                self._held.pop(id(lease), None)
        if closing:
            with self._changed:
                if not self._done and not self._back:
                    if not self._held:
                        raise StopIteration
                    self._back = list(self._held.values())
            return extend_at
        now = time.monotonic()
        if now >= extend_at:
            extend_at = now + self._extend_seconds
            if held := list(self._held.values()):
                lost = queue.extend(held)
                for lease in lost:
                    self._held.pop(id(lease), None)
                if lost:
                    self._inbox.put(("lost", lost))
        if wanted:
            self._lease(queue, wanted, max(0.0, extend_at - now))
        return extend_at

    def _lease(self, queue: Any, wanted: int, most_seconds: float) -> None:
        waits = 0.0 if self._held else min(0.5, most_seconds)
        leases = queue.lease(wanted, wait_seconds=waits)
        with self._changed:
            for lease in leases:
                self._held[id(lease)] = lease
            if self._stopped:  # meanwhile
                self._back += leases
                return
            if leases:
                self._wanted = max(0, self._wanted - len(leases))
            elif not (self._done or self._back or self._closing):
                self._inbox.put(("nothing",))
                self._changed.wait(min(EMPTY_SECONDS, most_seconds) if self._held else 0.01)
        if leases:
            self._inbox.put(("leases", leases))
