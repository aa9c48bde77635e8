"""What can be said about a Google Cloud project: where its machines may live, of which kinds, from which image."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holdfast.drivers.gcp.catalogue import CURATED

PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Usd = Annotated[float, Field(gt=0, allow_inf_nan=False)]

DEEP_LEARNING_IMAGE = (
    "projects/deeplearning-platform-release/global/images/family/pytorch-2-7-cu128-ubuntu-2204-nvidia-570"
)
STORAGE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttachedGpus(Strict):
    """GPUs that are attached to a machine type that has none of its own (N1)."""

    type: str = Field(title="Accelerator type", description="For example nvidia-tesla-t4.")
    count: int = Field(ge=1, title="Count")


class UsdPerHour(Strict):
    """A machine type's price, everything but its disk included."""

    spot: Usd = Field(title="Spot (dollars per hour)")
    on_demand: Usd = Field(title="On demand (dollars per hour)")


class GcpConfig(Strict):
    project: str = Field(title="Project", description="The project's id.", pattern=r"^[a-z][a-z0-9.:-]{2,61}[a-z0-9]$")
    regions: list[str] = Field(title="Regions", description="For example us-central1.", min_length=1)
    zones: list[str] = Field([], title="Zones", description="Only these; empty: every zone of the regions.")
    machine_types: list[str] = Field(
        list(CURATED),
        title="Machine types",
        description="What machines may be. Zones that lack a type do not offer it.",
    )
    image: str = Field(
        DEEP_LEARNING_IMAGE,
        title="Image",
        description="projects/PROJECT/global/images/NAME, or .../images/family/FAMILY for the newest of a family.",
    )
    network: str = Field("default", title="Network", description="A network's name, or its path for a shared one.")
    subnetwork: str = Field(
        "", title="Subnetwork", description="Its name, the same in every region, or a path. Empty: the network's own."
    )
    external_address: bool = Field(
        True,
        title="External address",
        description="Machines get one to reach the store and package indexes; no port is opened. Off: through Cloud NAT.",
    )
    service_account: str = Field(
        "default",
        title="Service account",
        description="The machines' own, by its email; it reads and writes the checkpoint store and needs nothing else.",
    )
    scopes: list[str] = Field(
        [STORAGE_SCOPE], title="Scopes", description="What the machines' service account may do at most."
    )
    disk_gib: int = Field(100, ge=10, title="Disk (GiB)", description="Of the boot disk, where a job asks for less.")
    disk_type: str = Field("pd-balanced", title="Disk type", description="For example pd-balanced, pd-ssd.")
    gpus: dict[str, AttachedGpus] = Field(
        {}, title="Attached GPUs", description="By N1 machine type. G2, A2, A3 and A4 carry GPUs of their own."
    )
    preemption_notice_seconds: Literal[0, 120] = Field(
        0,
        title="Preemption notice (seconds)",
        description="120 where Compute Engine offers the longer notice; 0: the usual 30 s, best effort.",
    )
    health_check: str = Field(
        "", title="Health check", description="Its path; members of a maintained fleet that fail it are made anew."
    )
    health_check_delay_seconds: int = Field(
        600, ge=0, le=3600, title="Health check delay (seconds)", description="Not asked before a machine is so old."
    )
    console_logging: bool = Field(
        True,
        title="Console in Cloud Logging",
        description="Keeps what machines print readable after their end. Billed by Cloud Logging above 50 GiB a month.",
    )
    api_endpoint: str = Field(
        "", title="API endpoint", description="Instead of Google's, for all of its APIs: a private one, or an emulator."
    )
    poll_seconds: PositiveSeconds = Field(
        5.0, title="Poll (seconds)", description="Between two looks into the store at a running machine."
    )
    describe_seconds: PositiveSeconds = Field(
        30.0, title="Describe (seconds)", description="Between two descriptions of all machines, while nothing changes."
    )
    usd_per_hour: dict[str, UsdPerHour] = Field(
        {}, title="Prices", description="By machine type; they override what the billing catalogue says."
    )

    @model_validator(mode="after")
    def _agree(self) -> GcpConfig:
        for region in self.regions:
            if not re.fullmatch(r"[a-z]+-[a-z]+[0-9]+", region):
                raise ValueError(f"regions: {region!r} is no region's name; write one such as 'us-central1'")
        for zone in self.zones:
            if region_of(zone) not in self.regions:
                raise ValueError(
                    f"zones: {zone!r} lies in none of the regions {', '.join(self.regions)}; add its region or drop it"
                )
        if not self.machine_types:
            raise ValueError("machine_types is empty: no machine could ever be had; name one, or drop the field")
        for machine_type in self.gpus:
            if not machine_type.startswith("n1-"):
                raise ValueError(
                    f"gpus: {machine_type!r} takes no attached GPUs, only N1 does; other families carry their own: drop it"
                )
        if "/images/" not in self.image:
            raise ValueError(
                f"image: {self.image!r} is no image's path; write projects/PROJECT/global/images/NAME, or "
                "projects/PROJECT/global/images/family/FAMILY"
            )
        if self.api_endpoint and not re.match(r"https?://", self.api_endpoint):
            raise ValueError(f"api_endpoint: {self.api_endpoint!r} is no URL; begin it with https://")
        return self


def region_of(zone: str) -> str:
    return zone.rpartition("-")[0]
