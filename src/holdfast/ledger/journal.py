"""The append-only sequence of what happened. Ledger, summary, timeline and UI are views of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from holdfast.errors import AlreadyExistsError, NotFoundError, TransientError
from holdfast.storage import ObjectStore

Wanted = tuple[str, datetime, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Entry:
    number: int
    kind: str
    at: datetime
    fields: dict[str, Any]


class Journal:
    """Entry n is the object `<prefix><n>.json`, created conditionally: of two writers one learns that it is late."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._entries: list[Entry] = []
        self._unanswered = ("", "")

    def read(self) -> list[Entry]:
        """Every entry so far. Only new ones are fetched."""
        for info in self._store.list(self._prefix):
            number = int(info.key.removeprefix(self._prefix).removesuffix(".json"))
            if number == len(self._entries) + 1:
                self._entries.append(self._parse(number, self._store.get(info.key)))
        return list(self._entries)

    def append(self, kind: str, at: datetime, **fields: Any) -> Entry:
        """Write the entry that follows the last one read. Raises AlreadyExistsError when another writer did first.

        Asked again with the same `at` after a TransientError, it knows an entry of its own.
        """
        number = len(self._entries) + 1
        body = json.dumps({"kind": kind, "at": at.isoformat(), **fields}, separators=(",", ":"))
        key = f"{self._prefix}{number:06d}.json"
        try:
            self._store.create(key, body.encode())
        except TransientError:
            # The write may have happened and only its answer be lost; asking again would take it for another writer's.
            self._unanswered = key, body
            if not self._holds(key, body.encode()):
                raise
        except AlreadyExistsError:
            if self._unanswered != (key, body) or not self._holds(key, body.encode()):
                raise
        entry = self._parse(number, body.encode())
        self._entries.append(entry)
        return entry

    def append_if(self, decide: Callable[[list[Entry]], Wanted | None]) -> Entry | None:
        """Append what `decide` says of the entries so far, and ask again whenever another writer came first."""
        while True:
            wanted = decide(self.read())
            if wanted is None:
                return None
            kind, at, fields = wanted
            try:
                return self.append(kind, at, **fields)
            except AlreadyExistsError:
                continue

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def _holds(self, key: str, body: bytes) -> bool:
        try:
            return self._store.get(key) == body
        except NotFoundError:
            return False

    @staticmethod
    def _parse(number: int, body: bytes) -> Entry:
        fields = json.loads(body)
        return Entry(number, fields.pop("kind"), datetime.fromisoformat(fields.pop("at")), fields)
