"""A store that fails, stops or waits where a test says: the outage as a product of the test, not a mock of our code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from holdfast.errors import TransientError
from holdfast.storage import ObjectInfo, ObjectStore
from holdfast.storage.protocol import Data


class Killed(BaseException):
    """The machine is gone in the middle of a call. Nothing that catches Exception outlives it."""


def killed(verb: str, key: str) -> None:
    raise Killed(f"{verb} {key}")


def unreachable(verb: str, key: str) -> None:
    raise TransientError(f"the store does not answer: {verb} {key}")


class FailingStore:
    """Passes every call on to `store`; `fail` is called instead of the calls whose number (from 1) is in `at`.

    With `half`, a write that fails has begun: its first piece was asked for, and is lost.
    """

    def __init__(
        self, store: ObjectStore, at: Iterable[int] = (), fail: Callable[[str, str], None] = killed, half: bool = False
    ) -> None:
        self._store, self._at, self._fail, self._half = store, frozenset(at), fail, half
        self.url = store.url
        self.calls: list[tuple[str, str]] = []

    def put(self, key: str, data: Data | Iterable[Data]) -> None:
        self._pass_on("put", key, data)

    def put_summed(self, key: str, pieces: Iterable[tuple[Data, int]]) -> None:
        self.put(key, (data for data, _ in pieces))

    def create(self, key: str, data: Data | Iterable[Data]) -> None:
        self._pass_on("create", key, data)

    def get(self, key: str) -> bytes:
        return self._pass_on("get", key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._pass_on("get_range", key, start, length)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        return self._pass_on("read_into", key, start, buffer)

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self._pass_on("list", prefix)

    def delete(self, key: str) -> None:
        self._pass_on("delete", key)

    def _pass_on(self, verb: str, key: str, *arguments: Any) -> Any:
        self.calls.append((verb, key))
        if len(self.calls) in self._at:
            if self._half and verb in ("put", "create") and not isinstance(arguments[0], Data):
                next(iter(arguments[0]), None)
            self._fail(verb, key)
        return getattr(self._store, verb)(key, *arguments)
