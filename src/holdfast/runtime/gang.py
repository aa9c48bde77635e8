"""A member's view of its gang: which formation there is, whether it is over, and saying that one waits for the next.

A formation is one torchrun rendezvous with a number and fixed members. The orchestrator alone makes and ends them; the
number is the attempt of every commit in it, so that all ranks have the same, and a later formation's is higher.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from holdfast.clock import Clock
from holdfast.errors import NotFoundError
from holdfast.runtime import contract
from holdfast.storage import ObjectStore

PORTS = (20000, 32000)
"""Below what Linux gives to connections that ask for any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Formation:
    number: int
    members: tuple[str, ...]
    host: str
    """The member that torchrun's store is on."""
    meeting: str
    """Its `address:port`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Over:
    gracious: bool
    """All are there, and may commit before they leave; else some are gone."""
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """How a member left its last formation."""

    outcome: contract.Outcome | None = None
    """None: it was in none."""
    exit_status: int | None = None
    log_tail: str = ""
    report: Mapping[str, Any] = field(default_factory=dict)
    """The last of it."""


class Membership:
    def __init__(self, store: ObjectStore, run_id: str, member: str, address: str, clock: Clock) -> None:
        self._store, self._run_id, self._clock = store, run_id, clock
        self.member, self.address = member, address

    def newest(self) -> int:
        """Number of the newest formation; 0: there was none."""
        prefix, found = contract.gang_prefix(self._run_id), 0
        for info in self._store.list(prefix):
            number, _, name = info.key.removeprefix(prefix).partition("/")
            if name == "formation.json":
                found = max(found, int(number))
        return found

    def wait_for(self, number: int, left: Left) -> None:
        """Tell that this member is ready for formation `number`."""
        ready = {
            "address": self.address,
            "port": free_port(),
            "at": self._clock.now().isoformat(),
            "outcome": left.outcome,
            "exit_status": left.exit_status,
            "log_tail": left.log_tail,
            "report": dict(left.report),
        }
        self._store.put(contract.ready_key(self._run_id, number - 1, self.member), json.dumps(ready).encode())

    def formation(self, number: int) -> Formation | None:
        """None: not yet."""
        try:
            told = json.loads(self._store.get(contract.formation_key(self._run_id, number)))
        except NotFoundError:
            return None
        return Formation(
            number=number,
            members=tuple(told["members"]),
            host=told["host"],
            meeting=f"{told['address']}:{told['port']}",
        )

    def over(self, number: int) -> Over | None:
        """None: formation `number` goes on."""
        try:
            told = json.loads(self._store.get(contract.over_key(self._run_id, number)))
        except NotFoundError:
            return None
        return Over(gracious=told["gracious"], why=told["why"])


def free_port() -> int:
    """One that is free now, and that the system gives to no outgoing connection before torchrun has it."""
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
