"""S3 and GCS with the semantics of the protocol, through obstore.

Why obstore, and what it does not do by itself: docs/decisions/0001-object-store.md.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import mmap
import queue
import random
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from holdfast.errors import (
    AlreadyExistsError,
    ConfigError,
    CredentialsError,
    HoldfastError,
    NotFoundError,
    TransientError,
)
from holdfast.storage.address import Address
from holdfast.storage.cloud_clients import check_process, client
from holdfast.storage.cloud_errors import code_of, status_of, translated
from holdfast.storage.interruptible import interruptible
from holdfast.storage.keys import check_key, is_key
from holdfast.storage.protocol import Data, ObjectInfo
from holdfast.storage.s3_parts import RefusedError, S3Parts

PART_BYTES = 16 * 1024 * 1024
PARTS_AT_ONCE = 8
MAX_PARTS = 10_000
"""Of S3 and GCS: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html"""
READ_AT_ONCE_PARTS = 4
"""More than this is read part by part, side by side: one connection to S3 gives some 100 MB/s."""
RETRY_SECONDS, ABORT_SECONDS = 60.0, 10.0
WRITER = "holdfast-writer"
"""Metadata that tells our own write from another's when its answer was lost."""

T = TypeVar("T")
log = logging.getLogger(__name__)


class CloudStore:
    """Objects below a prefix of a bucket. Any number of threads may share it; a forked child may not.

    What the store answers with "later" (throttling, HTTP 5xx, resets, time-outs) is asked again for `retry_seconds`,
    with backoff and jitter; then it is a TransientError. Every verb raises ConfigError for a bucket that is not there
    and an account that may not, and CredentialsError.
    """

    def __init__(
        self,
        address: Address,
        credentials: Any = None,
        *,
        retry_seconds: float = RETRY_SECONDS,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """`part_bytes`: 5 MiB or more; an object may have MAX_PARTS of them."""
        self.url, self._address = address.url, address
        self.credentials = credentials
        """What it was opened with: other places of the same cloud are opened with it too."""
        self._retry_seconds, self._part_bytes = retry_seconds, part_bytes
        self._client, self._keys = client(address, credentials, retry_seconds)
        """With keys, images go to S3 without obstore."""

    @interruptible
    def put(self, key: str, data: Data | Iterable[Data]) -> None:
        """In parts, side by side, when it is more than one; a source that fails leaves no part behind."""
        path, source = self._path(key), _Source(key, data, self._part_bytes)
        whole = source.whole_if_small()
        if whole is not None:
            self._persist("put", key, lambda: self._put_whole(path, whole))
        else:
            self._persist("put", key, lambda: self._put_in_parts(key, path, source), lambda: not source.is_spent)

    def _put_whole(self, path: str, whole: bytes) -> None:
        import obstore

        obstore.put(self._client, path, whole, use_multipart=False)

    def _put_in_parts(self, key: str, path: str, source: _Source) -> None:
        import obstore

        writer = secrets.token_hex(8)
        try:
            obstore.put(
                self._client,
                path,
                source.pieces(),
                attributes={WRITER: writer},
                use_multipart=True,
                chunk_size=self._part_bytes,
                max_concurrency=PARTS_AT_ONCE,
            )
        except Exception as error:
            if source.error is not None:
                raise _SourceError(source.error) from None
            # The answer to "complete the upload" was lost, and asked again, the store knows no such upload.
            if code_of(error) == "NoSuchUpload" and self._wrote(key, path, writer):
                return
            raise

    @interruptible
    def put_summed(self, key: str, pieces: Iterable[tuple[Data, int]]) -> None:
        """On S3, what is more than one piece goes in parts that are verified by the sums given, a part a piece."""
        path, pieces = self._path(key), iter(pieces)
        begun = list(itertools.islice(pieces, 2))
        pieces = itertools.chain(begun, pieces)
        if len(begun) == 2 and self._keys:
            with S3Parts(self._address, self._keys) as parts:
                if upload := self._begin(key, path, parts):
                    self._put_parts(key, path, parts, upload, pieces)
                    return
        self.put(key, (data for data, _ in pieces))

    def _begin(self, key: str, path: str, parts: S3Parts) -> _Upload | None:
        writer = secrets.token_hex(8)

        def attempt() -> _Upload | None:
            try:
                return _Upload(parts.begin(path, {WRITER: writer}), writer)
            except ssl.SSLCertVerificationError as error:
                # obstore looks for authorities where Python does not.
                log.warning("store=%s this Python trusts no certificate of it; by obstore then: %s", self.url, error)
                self._keys = None
                return None

        return self._persist("put", key, attempt)

    def _put_parts(
        self, key: str, path: str, parts: S3Parts, upload: _Upload, pieces: Iterable[tuple[Data, int]]
    ) -> None:
        tags: dict[int, tuple[str, int]] = {}
        failures: list[BaseException] = []
        waiting: queue.Queue[tuple[int, Data, int] | None] = queue.Queue(1)

        def work() -> None:
            while part := waiting.get():
                number, data, crc32 = part
                put = functools.partial(parts.put, path, upload.name, number, data, crc32)
                try:
                    if not failures:
                        tags[number] = self._persist("put", key, put, lambda: not failures), crc32
                except BaseException as error:
                    failures.append(error)

        # Not an executor's: those take no more work when the main thread has ended, and the caller may be another.
        workers = [threading.Thread(target=work, name="holdfast-put", daemon=True) for _ in range(PARTS_AT_ONCE)]
        for worker in workers:
            worker.start()
        try:
            for number, (data, crc32) in enumerate(pieces, 1):
                if number > MAX_PARTS:
                    raise ConfigError(f"{key}: an object may have {MAX_PARTS} parts here; write it as several")
                waiting.put((number, data, crc32))
                if failures:
                    break
        except BaseException as error:
            failures.append(error)
        for _ in workers:
            waiting.put(None)
        for worker in workers:
            worker.join()
        try:
            if failures:
                raise failures[0]
            listed = [tags[number] for number in sorted(tags)]
            self._persist("put", key, lambda: self._finish(key, path, parts, upload, listed))
        except BaseException:
            self._abort(key, path, parts, upload)
            raise

    def _abort(self, key: str, path: str, parts: S3Parts, upload: _Upload) -> None:
        def attempt() -> None:
            try:
                parts.abort(path, upload.name)
            except RefusedError as error:
                if code_of(error) != "NoSuchUpload":
                    raise

        try:
            self._persist("delete", key, attempt, retry_seconds=min(self._retry_seconds, ABORT_SECONDS))
        except HoldfastError as error:
            log.warning("store=%s key=%s upload %s is left behind, and costs: %s", self.url, key, upload.name, error)

    def _finish(self, key: str, path: str, parts: S3Parts, upload: _Upload, tags: Sequence[tuple[str, int]]) -> None:
        try:
            parts.finish(path, upload.name, tags)
        except RefusedError as error:
            # The answer was lost, and asked again, the store knows no such upload.
            if code_of(error) != "NoSuchUpload" or not self._wrote(key, path, upload.writer):
                raise

    @interruptible
    def create(self, key: str, data: Data | Iterable[Data]) -> None:
        """In one request (the clouds have no conditional upload in parts), so for what fits in memory."""
        import obstore
        from obstore.exceptions import AlreadyExistsError as Exists

        path, writer = self._path(key), secrets.token_hex(8)
        body = _joined(data)

        def attempt() -> None:
            try:
                obstore.put(self._client, path, body, mode="create", attributes={WRITER: writer})
            except Exists as error:
                # Perhaps it was we, and the answer was lost. S3 also says so (409) while another's write is under way.
                wrote = self._wrote(key, path, writer)
                if wrote is None:
                    raise TransientError(f"{key} in {self.url} is being written or deleted by another") from error
                if not wrote:
                    raise AlreadyExistsError(f"{key} exists in {self.url}") from None

        self._persist("create", key, attempt)

    @interruptible
    def get(self, key: str) -> bytes:
        return self._read(key, 0, None)

    @interruptible
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` -1: to the end."""
        if length == 0:
            path = self._path(key)
            self._persist("get", key, lambda: self._attributes(key, path))
            return b""
        return self._read(key, start, None if length < 0 else start + length)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        data = self.get_range(key, start, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    @interruptible
    def list(self, prefix: str) -> list[ObjectInfo]:
        import obstore

        # obstore's prefixes are whole folders; ours are text.
        folder, slash, _ = prefix.rpartition("/")
        if slash and not is_key(folder):
            return []  # no key begins like that
        below = "/".join(part for part in (self._address.prefix, folder) if part)
        cut = len(self._address.prefix) + 1 if self._address.prefix else 0

        def found() -> list[ObjectInfo]:
            return [
                ObjectInfo(entry["path"][cut:], entry["size"])
                for page in obstore.list(self._client, below or None, chunk_size=1000)
                for entry in page
                if entry["path"][cut:].startswith(prefix)
            ]

        return sorted(self._persist("list", prefix, found), key=lambda info: info.key)

    @interruptible
    def delete(self, key: str) -> None:
        import obstore

        path = self._path(key)
        with contextlib.suppress(NotFoundError):
            self._persist("delete", key, lambda: obstore.delete(self._client, path))

    def __repr__(self) -> str:
        return f"CloudStore({self.url!r})"

    def _path(self, key: str) -> str:
        check_key(key)
        path = f"{self._address.prefix}/{key}" if self._address.prefix else key
        check_key(path)  # it may be too long
        return path

    def _persist(
        self,
        verb: str,
        key: str,
        attempt: Callable[[], T],
        may_again: Callable[[], bool] = lambda: True,
        retry_seconds: float | None = None,
    ) -> T:
        """`attempt` until it succeeds, is refused, or time is up: obstore repeats only what it takes for harmless."""
        check_process()
        give_up_at = time.monotonic() + (self._retry_seconds if retry_seconds is None else retry_seconds)
        pause = 0.2
        while True:
            try:
                return attempt()
            except AlreadyExistsError:
                raise
            except _SourceError as error:
                raise error.cause from None
            except Exception as error:
                failure = translated(error, verb, key, self._address)
                late = time.monotonic() + pause > give_up_at
                again = isinstance(failure, TransientError) and not isinstance(failure, CredentialsError)
                if late or not again or not may_again():
                    raise failure from error
                log.debug("store=%s verb=%s key=%s asked again after: %s", self.url, verb, key, failure)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 8.0)

    def _wrote(self, key: str, path: str, writer: str) -> bool | None:
        """Is the object under `key` the one that `writer` wrote? None: there is none."""
        try:
            return self._attributes(key, path).get(WRITER) == writer
        except NotFoundError:
            return None

    def _attributes(self, key: str, path: str) -> dict[str, str]:
        import obstore

        try:
            return dict(obstore.get(self._client, path, options={"head": True}).attributes)
        except Exception as error:
            raise translated(error, "get", key, self._address) from error

    def _read(self, key: str, start: int, stop: int | None) -> bytes:
        path = self._path(key)
        return self._persist("get", key, lambda: self._read_once(path, start, stop))

    def _read_once(self, path: str, start: int, stop: int | None) -> bytes:
        import obstore

        at_once = READ_AT_ONCE_PARTS * self._part_bytes
        try:
            if start == 0 and stop is None:
                first = obstore.get(self._client, path)
            else:
                first = obstore.get(self._client, path, options={"range": _range(start, stop, at_once)})
            size = first.meta["size"]
            end = size if stop is None else min(stop, size)
            if end - start <= at_once:
                return bytes(first.bytes())
            return self._read_side_by_side(path, first.meta["e_tag"], start, end)
        except Exception as error:
            if status_of(error) == 416:  # it begins behind the end
                return b""
            raise

    def _read_side_by_side(self, path: str, e_tag: str | None, start: int, end: int) -> bytes:
        import obstore

        def read(at: int) -> Any:
            options: dict[str, Any] = {"range": (at, min(at + self._part_bytes, end))}
            if e_tag:
                options["if_match"] = e_tag  # else 412, and all again: parts of two versions would be neither
            return obstore.get(self._client, path, options=options).bytes()

        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="holdfast-read") as pool:
            return b"".join(pool.map(read, range(start, end, self._part_bytes)))


class _Upload(NamedTuple):
    name: str
    """S3's id of it."""
    writer: str


class _SourceError(Exception):
    """The data's source failed, not the store."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause


class _Source:
    """The bytes to put: whole when they are few, else in pieces that obstore may keep while it asks for more."""

    def __init__(self, key: str, data: Data | Iterable[Data], part_bytes: int) -> None:
        self._key, self._part_bytes = key, part_bytes
        self._chunks = iter([data] if isinstance(data, Data) else data)
        self._head = bytearray()
        self._rest = memoryview(b"")
        self.is_spent = False
        """More than the head is gone: it can't be put a second time."""
        self.error: BaseException | None = None
        """What the source itself raised."""

    def whole_if_small(self) -> bytes | None:
        for chunk in self._chunks:
            view = memoryview(chunk).cast("B")
            if not self._head and len(view) >= self._part_bytes:
                self._rest = view  # uncopied: a large piece is seldom the only one
                return None
            room = self._part_bytes - len(self._head)
            self._head += view[:room]
            if len(view) > room:
                self._rest = view[room:]
                return None
        return bytes(self._head)

    def pieces(self) -> Iterator[Data]:
        sent = 0
        try:
            for piece in self._cut():
                sent += len(piece)
                if sent > MAX_PARTS * self._part_bytes:
                    limit = MAX_PARTS * self._part_bytes >> 30
                    raise ConfigError(f"{self._key}: an object may have {limit} GiB here; write it as several")
                yield piece
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = error
            raise

    def _cut(self) -> Iterator[Data]:
        if self._head:
            yield bytes(self._head)
        yield from self._at_most_a_part(self._rest)
        for chunk in self._chunks:
            self.is_spent = True
            yield from self._at_most_a_part(memoryview(chunk).cast("B"))

    def _at_most_a_part(self, view: memoryview) -> Iterator[Data]:
        # All parts of a larger piece obstore would send at once. It keeps a piece while it asks for the next, and the
        # source may fill the same memory again: only bytes stay what they are, and mapped memory, which here is a
        # snapshot that is locked for as long as it is written.
        keeps = isinstance(view.obj, bytes | mmap.mmap)
        for start in range(0, len(view), self._part_bytes):
            piece = view[start : start + self._part_bytes]
            yield piece if keeps else bytes(piece)


def _joined(data: Data | Iterable[Data]) -> bytes:
    return bytes(data) if isinstance(data, Data) else b"".join(memoryview(chunk).cast("B") for chunk in data)


def _range(start: int, stop: int | None, at_once: int) -> Any:
    return {"offset": start} if stop is None else (start, min(stop, start + at_once))
