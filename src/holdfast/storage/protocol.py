"""What Holdfast asks of an object store. S3 and GCS have these semantics; a directory is given them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

Data = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    key: str
    size_bytes: int


class ObjectStore(Protocol):
    """Keys are '/'-separated and relative. Every write is atomic: a reader sees the whole object or none."""

    url: str

    def put(self, key: str, data: Data | Iterable[Data]) -> None:
        """Write or replace. Several pieces are under way at once: what is given must stay as it is until this returns.
        Raises TransientError when the store can't take it now (full, unreachable).
        """

    def put_summed(self, key: str, pieces: Iterable[tuple[Data, int]]) -> None:
        """The same, of pieces whose CRC-32 (RFC 1952) is known, by which the store verifies what arrives, if it can do so. All
        but the last have 5 MiB or more.
        """

    def create(self, key: str, data: Data | Iterable[Data]) -> None:
        """Write only if the key is free; of two at once, one wins. Raises AlreadyExistsError, TransientError."""

    def get(self, key: str) -> bytes:
        """Raises NotFoundError, TransientError."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; fewer at the end of the object. Raises NotFoundError, TransientError."""

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `start`; how many there were, fewer only at the end of the object.

        Raises NotFoundError, TransientError.
        """

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Every object whose key starts with `prefix`, in the order of their keys. Raises TransientError."""

    def delete(self, key: str) -> None:
        """Deleting what is not there is no error. Raises TransientError."""
