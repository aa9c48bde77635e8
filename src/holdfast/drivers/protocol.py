"""What a cloud can do for us. A driver does what it is told and chooses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from holdfast.clock import Clock

ProvisioningModel = Literal["spot", "on-demand"]
MachineState = Literal["pending", "running", "stopping", "terminated"]
TerminationReason = Literal["", "preempted", "terminated-by-user", "ended-itself", "host-failed"]


@dataclass(frozen=True, slots=True, order=True)
class CapacityPool:
    """What runs out and gets priced."""

    cloud: str
    region: str
    zone: str
    instance_type: str
    provisioning_model: ProvisioningModel

    def __str__(self) -> str:
        return f"{self.zone}/{self.instance_type}/{self.provisioning_model}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A capacity pool as the market shows it now, full or empty."""

    pool: CapacityPool
    usd_per_hour: float
    on_demand_usd_per_hour: float
    vcpus: int
    memory_gib: float
    gpus: int = 0
    gpu_name: str = ""
    interruptions_per_hour: float = 0.0
    """Expected, per running hour. A prior until there is history."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BillingTerms:
    """How a cloud turns running time into billed time."""

    minimum_seconds: float = 60.0
    free_if_preempted_within_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PricePoint:
    at: datetime
    usd_per_hour: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    token: str
    """Run id and attempt. A repeated launch with the same token returns the same machine."""
    pool: CapacityPool
    tags: Mapping[str, str]
    """`holdfast-run`, `holdfast-attempt`, `holdfast-job`, `holdfast-store`."""
    environment: Mapping[str, str]
    """Plain facts the start-up script and the agent need (`HOLDFAST_STORE`, `HOLDFAST_BUNDLE` ...); never a secret."""
    startup_script: str
    """Run by the machine at boot, as user data."""
    shutdown_script: str = ""
    """Run by clouds that offer it when the machine is told to stop."""
    max_run_seconds: float | None = None
    """The cloud's own dead-man's switch, where it has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as the cloud describes it. Terminated ones stay visible for a while."""

    id: str
    pool: CapacityPool
    state: MachineState
    tags: Mapping[str, str] = field(default_factory=dict)
    launched_at: datetime
    """When billing began."""
    terminated_at: datetime | None = None
    reason: TerminationReason = ""
    detail: str = ""
    """The cloud's own words, for people."""


class Driver(Protocol):
    """Every method may raise TransientError; what else it raises is said there."""

    name: str
    clock: Clock
    poll_seconds: float
    """Wall seconds between two looks at a running machine that the cloud's API bears."""
    billing: BillingTerms
    image_python: Path | None
    """The interpreter that machines will use, where it is this computer's; None where it can't be asked."""

    def check(self) -> None:
        """Prove that the account works. Raises ConfigError naming what is missing."""

    def offers(self) -> Sequence[Offer]:
        """Every pool of the account, with its price now."""

    def price_history(self, pool: CapacityPool, start: datetime, end: datetime) -> Sequence[PricePoint]:
        """Prices that held from `start` to `end`, oldest first; the first point is at or before `start`."""

    def launch(self, request: LaunchRequest) -> Machine:
        """Raises CapacityError, QuotaError, ConfigError. Idempotent by `request.token`, refusals included."""

    def machines(self, tags: Mapping[str, str]) -> Sequence[Machine]:
        """Every machine that carries all of `tags`, terminated ones included, in one batched call."""

    def terminate(self, machine_id: str) -> None:
        """Begin an orderly shutdown that ends in power off. Terminating what is gone is no error."""

    def console(self, machine_id: str) -> str:
        """The last 64 KiB of what the machine wrote to its console; readable after its end too.

        As much as the clouds keep. A program that prints more than that within one step hides its last steps here;
        how far it came is then known as of its last heartbeat.
        """
