"""The program's output: shown on the console, kept on the machine, shipped to the store in chunks."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from typing import BinaryIO

from holdfast.errors import TransientError
from holdfast.storage import ObjectStore

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 * 1024
KEEP_BYTES = 64 * 1024 * 1024
SHIP_SECONDS = 10.0
"""So much of the newest output (wall seconds) is on the console alone when a machine is taken without a notice."""
TAIL_LINES = 50
TAIL_BYTES = 32 * 1024
"""What is remembered beyond the last newline-free stretch; a program may print one endless line."""


class LogShipper:
    """Reads the program's output until its end. `ship` and `ship_all` are called by one thread only.

    The newest chunk is written again as it grows, so that the number of objects depends on what was printed, and not
    on how long the program ran.
    """

    def __init__(self, source: BinaryIO, store: ObjectStore, prefix: str) -> None:
        self._source, self._store, self._prefix = source, store, prefix
        self._tail = b""
        self._waiting = bytearray()
        self._lock = threading.Lock()
        self._shipped: deque[tuple[str, int]] = deque()
        self._number = 1
        self._growing = b""
        self._next_ship = 0.0
        self._reader = threading.Thread(target=self._read, name="log-reader", daemon=True)
        self._reader.start()

    def tail(self) -> str:
        """The last 50 lines."""
        with self._lock:
            text = self._tail.decode(errors="replace")
        return "\n".join(text.splitlines()[-TAIL_LINES:])

    def ship(self) -> None:
        """Send what waits, if there is a chunk of it or if the last time is a while ago. May be called often."""
        if len(self._waiting) >= CHUNK_BYTES or time.monotonic() >= self._next_ship:
            self.ship_all()

    def ship_all(self) -> None:
        """Send what waits, oldest first; what the store does not take now stays for the next call."""
        while True:
            with self._lock:
                news = bytes(self._waiting[: CHUNK_BYTES - len(self._growing)])
            if not news:
                return
            key, chunk = f"{self._prefix}{self._number:06d}.txt", self._growing + news
            try:
                self._store.put(key, chunk)
                self._next_ship = time.monotonic() + SHIP_SECONDS
                self._growing = chunk
                with self._lock:
                    del self._waiting[: len(news)]
                if len(chunk) < CHUNK_BYTES:
                    return
                self._shipped.append((key, len(chunk)))
                self._number, self._growing = self._number + 1, b""
                while sum(size for _, size in self._shipped) > KEEP_BYTES:
                    self._store.delete(self._shipped[0][0])
                    self._shipped.popleft()
            except TransientError as error:
                log.warning("log chunk not shipped key=%s error=%s", key, error)
                self._next_ship = 0.0
                return

    def finish(self, seconds: float) -> None:
        """Read to the end (a daemon of the program may hold the pipe open: not longer than `seconds`) and ship."""
        self._reader.join(seconds)
        self.ship_all()

    def _read(self) -> None:
        while chunk := os.read(self._source.fileno(), 65536):
            _echo(chunk)
            with self._lock:
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]
                self._waiting += chunk
                overflow = len(self._waiting) - KEEP_BYTES
                if overflow > 0:  # the store has been down for long: the newest lines matter most
                    del self._waiting[:overflow]


def _echo(chunk: bytes) -> None:
    with contextlib.suppress(OSError):  # a console that is gone must not stop the program
        os.write(1, chunk)
