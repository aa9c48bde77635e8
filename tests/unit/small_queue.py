"""A queue in one SQLite file, just enough of the protocol for the batch engine's own tests."""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallLease:
    body: bytes
    deliveries: int
    receipt: Any


class SmallQueue:
    def __init__(self, path: Path, visibility_seconds: float = 600.0) -> None:
        self._visible = visibility_seconds
        self._rows = sqlite3.connect(path, isolation_level=None, timeout=60)
        self._rows.execute("pragma journal_mode=wal")
        self._rows.execute("pragma synchronous=normal")
        self._rows.execute(
            "create table if not exists waiting"
            "(number integer primary key, body blob, until real default 0, token text default '', deliveries int default 0)"
        )

    def put(self, bodies: Sequence[bytes]) -> None:
        self._rows.execute("begin immediate")
        self._rows.executemany("insert into waiting(body) values(?)", [(body,) for body in bodies])
        self._rows.execute("commit")

    def lease(self, limit: int = 1, wait_seconds: float = 0.0) -> list[SmallLease]:
        give_up_at = time.monotonic() + wait_seconds
        while True:
            now, token = time.time(), secrets.token_hex(4)
            found = self._rows.execute(
                "update waiting set until=?, token=?, deliveries=deliveries+1 where number in"
                "(select number from waiting where until<? order by number limit ?) returning number, body, deliveries",
                (now + self._visible, token, now, limit),
            ).fetchall()
            if found or time.monotonic() >= give_up_at:
                return [
                    SmallLease(body=body, deliveries=deliveries, receipt=(number, token))
                    for number, body, deliveries in sorted(found)
                ]
            time.sleep(0.05)

    def extend(self, leases: Sequence[SmallLease]) -> list[SmallLease]:
        change = "update waiting set until=? where number=? and token=?"
        until = time.time() + self._visible
        return [one for one in leases if not self._rows.execute(change, (until, *one.receipt)).rowcount]

    def acknowledge(self, leases: Sequence[SmallLease]) -> None:
        self._rows.execute("begin immediate")
        self._rows.executemany("delete from waiting where number=? and token=?", [one.receipt for one in leases])
        self._rows.execute("commit")

    def hand_back(self, leases: Sequence[SmallLease]) -> None:
        change = "update waiting set until=0, token='', deliveries=deliveries-1 where number=? and token=?"
        self._rows.execute("begin immediate")
        self._rows.executemany(change, [one.receipt for one in leases])
        self._rows.execute("commit")

    def waiting(self) -> int:
        """Free to be leased."""
        return int(self._rows.execute("select count(*) from waiting where until<?", (time.time(),)).fetchone()[0])

    def close(self) -> None:
        self._rows.close()
