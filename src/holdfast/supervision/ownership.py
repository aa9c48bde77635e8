"""One live orchestrator per run. A second is refused, unless the first is dead."""

from __future__ import annotations

import json
import os
import secrets
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

from holdfast.errors import AlreadyExistsError, NotFoundError, RunTakenError
from holdfast.process_identity import identify, lives
from holdfast.storage import ObjectStore

ALIVE_SECONDS = 60.0
"""On another computer an owner counts as dead when it has not been heard of for so long (wall seconds)."""


class Ownership:
    """Owner n is the object `owners/<n>.json`, created conditionally; the highest number owns the run."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self._store, self._run_id = store, run_id
        self._prefix = f"runs/{run_id}/owners/"
        self.number = 0
        self.took_over = False

    def claim(self) -> None:
        """Raises RunTakenError when another live process owns the run."""
        last = self._last_number()
        if last:
            why_alive = self._why_alive(last)
            if why_alive:
                raise RunTakenError(f"run {self._run_id!r} is being worked on by another process: {why_alive}")
            self.took_over = not self._exists(f"{last:06d}.released")
        me = {
            "owner": secrets.token_hex(8),
            "host": socket.gethostname(),
            "process": identify(os.getpid()),
            "claimed_at": datetime.now(UTC).isoformat(),
        }
        self.number = last + 1
        try:
            self._store.create(f"{self._prefix}{self.number:06d}.json", json.dumps(me).encode())
        except AlreadyExistsError:
            raise RunTakenError(f"run {self._run_id!r}: another process took it at this very moment") from None
        self.renew()

    def renew(self) -> None:
        self._store.put(f"{self._prefix}{self.number:06d}.alive", datetime.now(UTC).isoformat().encode())

    def is_mine(self) -> bool:
        return self._last_number() == self.number

    def release(self) -> None:
        self._store.put(f"{self._prefix}{self.number:06d}.released", b"")

    def has_live_owner(self) -> bool:
        """For the reaper: does anyone look after this run?"""
        last = self._last_number()
        return bool(last) and bool(self._why_alive(last))

    def _last_number(self) -> int:
        keys = [info.key for info in self._store.list(self._prefix) if info.key.endswith(".json")]
        return max((int(key.removeprefix(self._prefix).removesuffix(".json")) for key in keys), default=0)

    def _why_alive(self, number: int) -> str:
        """In words; empty when the owner is dead or has let go."""
        if self._exists(f"{number:06d}.released"):
            return ""
        owner: dict[str, Any] = json.loads(self._store.get(f"{self._prefix}{number:06d}.json"))
        where = f"process {owner['process']['pid']} on {owner['host']}, since {owner['claimed_at']}"
        if owner["host"] == socket.gethostname():
            return f"{where}; end it, or wait for it" if lives(owner["process"]) else ""
        try:
            alive_at = datetime.fromisoformat(self._store.get(f"{self._prefix}{number:06d}.alive").decode())
        except NotFoundError:
            alive_at = datetime.fromisoformat(owner["claimed_at"])
        age = datetime.now(UTC) - alive_at
        if age < timedelta(seconds=ALIVE_SECONDS):
            return (
                f"{where}, heard of {age.total_seconds():.0f} s ago; if it is dead, try again in {ALIVE_SECONDS:.0f} s"
            )
        return ""

    def _exists(self, name: str) -> bool:
        return any(info.key == self._prefix + name for info in self._store.list(self._prefix + name))
