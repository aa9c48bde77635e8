"""`sqlite:///PATH`: the queue of one machine, without a server. A file of SQLite on a local disk.

A killed process loses nothing: a transaction that was committed is in the operating system's hands. After a power cut
the last acknowledgements and leases may be missing (their batches are done twice), but nothing that was put.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from holdfast.errors import ConfigError, TransientError
from holdfast.queues.address import options_of
from holdfast.queues.patience import OPENING_SECONDS, persist, poll
from holdfast.queues.protocol import Depth, Lease

SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    id INTEGER PRIMARY KEY, queue TEXT NOT NULL, body BLOB NOT NULL,
    deliveries INTEGER NOT NULL DEFAULT 0, token TEXT, hidden_until REAL NOT NULL DEFAULT 0);
-- Leases that ran out come first: their batch should not be the last of the run.
CREATE INDEX IF NOT EXISTS items_by_turn ON items (queue, hidden_until DESC, id);
CREATE TABLE IF NOT EXISTS dead (id INTEGER PRIMARY KEY, queue TEXT NOT NULL, body BLOB NOT NULL, reason TEXT NOT NULL);
"""
LEASE = """
UPDATE items SET deliveries = deliveries + 1, token = ?, hidden_until = ?
WHERE id IN (SELECT id FROM items WHERE queue = ? AND hidden_until <= ? ORDER BY hidden_until DESC, id LIMIT ?)
RETURNING id, body, deliveries
"""
BUSY = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_FULL", "SQLITE_CANTOPEN")


class SqliteQueue:
    def __init__(self, url: str, name: str, visibility_seconds: float, max_deliveries: int) -> None:
        self._path = _path(url)
        self.url = f"sqlite://{self._path}"
        self._name, self._visibility_seconds, self._max_deliveries = name, visibility_seconds, max_deliveries
        self._thread_lock = threading.Lock()
        persist(self._open, OPENING_SECONDS)

    def _open(self) -> None:
        with self._translated():
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                # Processes queue up for the kernel's lock, first come first served. SQLite's own way to wait is to look
                # again after a pause: eight writers would starve each other.
                self._lock_file = os.open(f"{self._path}.turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise ConfigError(f"queue {self.url}: the file can't be made: {error}") from error
            self._database = sqlite3.connect(
                self._path, timeout=30.0, isolation_level=None, check_same_thread=False, cached_statements=32
            )
            try:
                with self._turn():
                    self._database.execute("PRAGMA journal_mode = WAL")
                    self._database.execute("PRAGMA synchronous = NORMAL")
                    self._database.executescript(SCHEMA)
            except BaseException:
                self.close()
                raise

    def put(self, bodies: Sequence[bytes]) -> None:
        with self._transaction(durable=True) as database:
            database.executemany("INSERT INTO items (queue, body) VALUES (?, ?)", ((self._name, one) for one in bodies))

    def lease(self, limit: int = 1, wait_seconds: float = 0.0) -> list[Lease]:
        return poll(lambda: self._lease(limit), wait_seconds, longest_pause_seconds=0.1)

    def _lease(self, limit: int) -> list[Lease]:
        token = secrets.token_hex(8)
        with self._transaction() as database:
            now = time.time()
            if not database.execute(
                "SELECT 1 FROM items WHERE queue = ? AND hidden_until <= ? LIMIT 1", (self._name, now)
            ).fetchone():
                return []
            rows = database.execute(LEASE, (token, now + self._visibility_seconds, self._name, now, limit)).fetchall()
            leases = [
                Lease(body=body, deliveries=deliveries, receipt=(item, token))
                for item, body, deliveries in sorted(rows)
            ]
            spent = [lease for lease in leases if lease.deliveries > self._max_deliveries]
            for lease in spent:
                reason = f"handed out {self._max_deliveries} times and never acknowledged"
                self._bury(database, lease, reason)
        return [lease for lease in leases if lease not in spent] or (self._lease(limit) if spent else [])

    def extend(self, leases: Sequence[Lease]) -> list[Lease]:
        with self._transaction() as database:
            hidden_until = time.time() + self._visibility_seconds
            return [
                lease
                for lease in leases
                if not database.execute(
                    "UPDATE items SET hidden_until = ? WHERE id = ? AND token = ?", (hidden_until, *lease.receipt)
                ).rowcount
            ]

    def acknowledge(self, leases: Sequence[Lease]) -> None:
        with self._transaction() as database:
            database.executemany("DELETE FROM items WHERE id = ? AND token = ?", (one.receipt for one in leases))

    def hand_back(self, leases: Sequence[Lease]) -> None:
        with self._transaction() as database:
            database.executemany(
                "UPDATE items SET deliveries = deliveries - 1, token = NULL, hidden_until = 0 WHERE id = ? AND token = ?",
                (one.receipt for one in leases),
            )

    def dead_letter(self, lease: Lease, reason: str) -> None:
        with self._transaction() as database:
            self._bury(database, lease, reason)

    def _bury(self, database: sqlite3.Connection, lease: Lease, reason: str) -> None:
        if database.execute("DELETE FROM items WHERE id = ? AND token = ?", lease.receipt).rowcount:
            database.execute(
                "INSERT INTO dead (queue, body, reason) VALUES (?, ?, ?)", (self._name, lease.body, reason)
            )

    def dead(self) -> list[tuple[bytes, str]]:
        with self._transaction() as database:
            return database.execute(
                "SELECT body, reason FROM dead WHERE queue = ? ORDER BY id", (self._name,)
            ).fetchall()

    def depth(self) -> Depth:
        with self._transaction() as database:
            waiting, leased = database.execute(
                "SELECT count(*) FILTER (WHERE hidden_until <= ?1), count(*) FILTER (WHERE hidden_until > ?1) "
                "FROM items WHERE queue = ?2",
                (time.time(), self._name),
            ).fetchone()
            (dead,) = database.execute("SELECT count(*) FROM dead WHERE queue = ?", (self._name,)).fetchone()
        return Depth(waiting=waiting, leased=leased, dead=dead)

    def close(self) -> None:
        with self._thread_lock:
            self._database.close()
            if self._lock_file >= 0:
                os.close(self._lock_file)
                self._lock_file = -1

    @contextlib.contextmanager
    def _transaction(self, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with self._thread_lock, self._translated(), self._turn():
            if durable:
                self._database.execute("PRAGMA synchronous = FULL")
            try:
                self._database.execute("BEGIN IMMEDIATE")
                with self._database:
                    yield self._database
            finally:
                if durable:
                    self._database.execute("PRAGMA synchronous = NORMAL")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "") or ""
            if name.startswith(BUSY) and self._path.parent.is_dir() and not self._path.is_dir():
                raise TransientError(f"queue {self.url}: SQLite can't take it now: {error}") from error
            raise ConfigError(
                f"queue {self.url}: SQLite can't use the file: {error}; name another, on a local disk"
            ) from error


def _path(url: str) -> Path:
    """Both `sqlite:///var/queue.db` and SQLAlchemy's `sqlite:////var/queue.db` are /var/queue.db."""
    parts = urlsplit(url)
    path = Path("/" + unquote(parts.path).lstrip("/"))
    options_of(url, ())
    if parts.netloc or path == Path("/"):
        raise ConfigError(f"queue {url!r}: write sqlite:///PATH, the path from the root of the disk")
    return path
