"""What serving asks of a load balancer: take a replica in, send it nothing new, let it go, say how they all stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from holdfast.drivers.protocol import CapacityPool

SETTLE_SECONDS = {"haproxy": 2.0, "target-group": 20.0, "endpoint-groups": 20.0}
"""Wall seconds until a load balancer whose orchestrator is dead has certainly seen the health check's 503, by kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One replica, as a load balancer reaches it."""

    machine: str
    zone: str
    address: str
    port: int
    health_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One replica as the load balancer sees it."""

    state: Literal["up", "down", "draining"]
    """`down`: registered, and not (yet) found healthy. `draining`: it gets no new request."""
    in_flight: int | None = None
    """Requests that it works on; None where the load balancer doesn't tell."""


class LoadBalancer(Protocol):
    """Every method may raise TransientError, and ConfigError when a call can never succeed. Doing it again is no error."""

    def check(self, pools: Sequence[CapacityPool]) -> None:
        """Prove, before anything is spent, that it can be used, and that machines of these pools can join it.

        Raises ConfigError naming what is wrong and the remedy.
        """

    def open(self) -> None:
        """Before the first replica. Where it is ours to run, it runs from here on, and outlives this process."""

    def register(self, endpoint: Endpoint) -> None: ...

    def drain(self, endpoint: Endpoint) -> None:
        """No new request; those in flight go on."""

    def remove(self, endpoint: Endpoint) -> None:
        """Of a machine that is gone. What could still wait for its answer is told that none comes."""

    def standings(self) -> dict[str, Standing]:
        """By machine. Of others that share the load balancer it may tell too."""

    def close(self) -> None:
        """The run is over. What is ours to run ends; what is the user's stays."""
