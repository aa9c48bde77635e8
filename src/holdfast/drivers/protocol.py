"""What a cloud can do for us. A driver does what it is told and chooses nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    capacity_advice: str = ""
    """What the cloud itself says of this pool's capacity, in words; it is in the rate already."""
    cooled: str = ""
    """Why this pool comes after the others just now: too many machines were taken from it, or from its like."""


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
    disk_gib: float = 0.0
    """Size of the root volume at least; 0: the image's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRequest:
    """Machines that are all alike, some of them spot."""

    token: str
    """A repeated launch with the same token adds no machine."""
    kind: Literal["instant", "maintained"]
    """`instant`: asked for once. `maintained`: the cloud replaces what is taken, until the fleet is ended."""
    pools: Sequence[CapacityPool]
    """Any of these, all in one region; of both provisioning models where `spot_share` lies between 0 and 1."""
    machines: int
    spot_share: float
    """0.8: of ten machines, eight are spot."""
    tags: Mapping[str, str]
    """As of a `LaunchRequest`. The driver adds `holdfast-fleet`, the token, to every machine."""
    startup_script: str
    shutdown_script: str = ""
    max_run_seconds: float | None = None
    disk_gib: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A maintained fleet as the cloud describes it, with or without machines."""

    token: str
    cloud: str
    region: str
    machines: int
    """Wanted."""
    tags: Mapping[str, str] = field(default_factory=dict)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of an account's or a store's examination."""

    subject: str
    """For example `credentials`, `quota`, `image`."""
    ok: bool
    detail: str
    """What was found, in words; of what is not ok, also the remedy."""
    warning: bool = False
    """It works, and is worth knowing all the same before money is spent."""


class Driver(Protocol):
    """Every method may raise TransientError (CredentialsError is one); what else it raises is said there."""

    name: str
    clock: Clock
    poll_seconds: float
    """Wall seconds between two looks into the store at what a running machine says."""
    describe_seconds: float
    """Wall seconds for which one description of the machines will do while nothing points to a change."""
    image_python: Path | None
    """The interpreter that machines will use, where it is this computer's; None where it can't be asked."""

    def check(self) -> None:
        """Prove with a call or two that the account works. Raises ConfigError naming what is missing."""

    def examine(self) -> Iterator[Finding]:
        """Everything the account needs, one line each: credentials, permissions, images, quotas, prices. Never raises."""

    def offers(self) -> Sequence[Offer]:
        """Every pool of the account, with its price now."""

    def price_history(self, pool: CapacityPool, start: datetime, end: datetime) -> Sequence[PricePoint]:
        """Prices that held from `start` to `end`, oldest first; the first point is at or before `start`."""

    def launch(self, request: LaunchRequest) -> Machine:
        """Raises CapacityError, QuotaError, ConfigError. Idempotent by `request.token`, refusals included."""

    def launch_fleet(self, request: FleetRequest) -> Sequence[Machine]:
        """What could be had of the fleet. Raises CapacityError when that is nothing, QuotaError, ConfigError."""

    def fleets(self, tags: Mapping[str, str]) -> Sequence[Fleet]:
        """Every maintained fleet that carries all of `tags`."""

    def end_fleet(self, token: str, region: str) -> None:
        """Replace nothing any more, and terminate the machines. Ending what is gone is no error."""

    def machines(self, tags: Mapping[str, str], max_age_seconds: float = 0.0, cloud: str = "") -> Sequence[Machine]:
        """Every machine that carries all of `tags`, terminated ones included, from batched calls.

        A description that is no older than `max_age_seconds` will do. `cloud`: only machines of that one are asked for.
        """

    def terminate(self, machine_id: str, pool: CapacityPool) -> None:
        """Begin an orderly shutdown that ends in power off. Terminating what is gone is no error."""

    def console(self, machine_id: str, pool: CapacityPool) -> str:
        """The last 64 KiB of what the machine wrote to its console; readable after its end too.

        As much as the clouds keep. A program that prints more than that within one step hides its last steps here;
        how far it came is then known as of its last heartbeat.
        """
