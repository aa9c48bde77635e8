"""What replicas say of themselves, in the store: one small object for each change, so that one list shows what is new.

Keys are `runs/RUN/replicas/MACHINE/NUMBER-STATE.json`; the highest number holds.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from holdfast.errors import AlreadyExistsError, NotFoundError
from holdfast.storage import ObjectStore

ReplicaState = Literal["starting", "serving", "unhealthy", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    machine: str
    address: str
    port: int
    health_port: int
    state: ReplicaState
    at_risk: bool
    """Was a rebalance recommendation heard?"""
    why: str
    """For people: of the notice, or of the health check that failed."""
    at: str


def replicas_prefix(run_id: str) -> str:
    return f"runs/{run_id}/replicas/"


class ReplicaBook:
    """The replicas of a run as the store knows them."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self._store, self._prefix = store, replicas_prefix(run_id)
        self._number = 0
        self._read: dict[str, str] = {}

    def write(self, replica: Replica) -> None:
        """By its machine, which alone writes there. Raises TransientError, ConfigError."""
        data = json.dumps(asdict(replica)).encode()
        while True:
            key = f"{self._prefix}{replica.machine}/{self._number + 1:06d}-{replica.state}.json"
            try:
                self._store.create(key, data)
            except AlreadyExistsError:  # an earlier try that was not answered
                if self._store.get(key) != data:
                    self._number += 1
                    continue
            self._number += 1
            return

    def news(self) -> list[Replica]:
        """The present word of every machine that has spoken since the last call. Raises TransientError."""
        newest: dict[str, str] = {}
        for info in self._store.list(self._prefix):  # in the order of keys: the last one of a machine wins
            machine = info.key.removeprefix(self._prefix).partition("/")[0]
            newest[machine] = info.key
        news = []
        for machine, key in newest.items():
            if self._read.get(machine) != key:
                try:
                    news.append(Replica(**json.loads(self._store.get(key))))
                except NotFoundError:  # forgotten meanwhile
                    continue
                self._read[machine] = key
        return news

    def forget(self, machine: str) -> None:
        """Of a machine that is gone: lists stay short, however long the run. Raises TransientError."""
        for info in self._store.list(f"{self._prefix}{machine}/"):
            self._store.delete(info.key)
        self._read.pop(machine, None)
