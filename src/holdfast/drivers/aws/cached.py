"""A value that is asked for again when it has aged; any number of threads share one asking."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Cached(Generic[K, V]):
    """What `ask` answered for a key, for `seconds`, of the answer or always. An error is raised and never kept."""

    def __init__(self, ask: Callable[[K], V], seconds: float | Callable[[V], float]) -> None:
        self._ask = ask
        self._seconds = seconds
        self._locks: dict[K, threading.Lock] = {}
        self._answers: dict[K, tuple[float, V]] = {}
        self._lock = threading.Lock()

    def get(self, key: K) -> V:
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # of this key alone: who asks for another region does not wait for this one
            kept = self._answers.get(key)
            if kept and time.monotonic() - kept[0] < self._seconds_of(kept[1]):
                return kept[1]
            answer = self._ask(key)
            self._answers[key] = (time.monotonic(), answer)
            return answer

    def _seconds_of(self, answer: V) -> float:
        return self._seconds(answer) if callable(self._seconds) else self._seconds
