"""What the local cloud offers. Names and prices follow well-known machines, so that dollars mean something; there is no
such hardware behind them: every machine is a process group on this computer.

On-demand prices are list prices of November 2026, rounded (AWS us-east-1, GCP us-central1); spot prices and
interruption rates are typical, not current.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from holdfast.drivers.protocol import CapacityPool

Dialect = Literal["aws", "gcp"]
CLOUD = "local"
NOTICE_SECONDS: dict[Dialect, float] = {"aws": 120.0, "gcp": 30.0}


@dataclass(frozen=True, slots=True)
class InstanceType:
    name: str
    vcpus: int
    memory_gib: float
    on_demand_usd_per_hour: float
    spot_share: float
    """Typical spot price as a share of the on-demand price."""
    interruptions_per_hour: float
    gpus: int = 0
    gpu_name: str = ""


@dataclass(frozen=True, slots=True)
class Zone:
    name: str
    region: str
    dialect: Dialect
    spot_factor: float
    """Spot prices differ a little between zones."""


AWS_TYPES = (
    InstanceType("c7i.large", 2, 4, 0.0893, 0.38, 0.02),
    InstanceType("m7i.2xlarge", 8, 32, 0.4032, 0.37, 0.03),
    InstanceType("g5.xlarge", 4, 16, 1.006, 0.40, 0.08, 1, "A10G"),
    InstanceType("g5.12xlarge", 48, 192, 5.672, 0.38, 0.10, 4, "A10G"),
    InstanceType("p4d.24xlarge", 96, 1152, 21.958, 0.45, 0.15, 8, "A100"),
    InstanceType("p5.48xlarge", 192, 2048, 55.04, 0.42, 0.15, 8, "H100"),
)
GCP_TYPES = (
    InstanceType("n2-standard-2", 2, 8, 0.0971, 0.30, 0.02),
    InstanceType("n2-standard-8", 8, 32, 0.3885, 0.30, 0.03),
    InstanceType("g2-standard-4", 4, 16, 0.7068, 0.40, 0.08, 1, "L4"),
    InstanceType("a2-highgpu-1g", 12, 85, 3.6733, 0.40, 0.12, 1, "A100"),
    InstanceType("a3-highgpu-8g", 208, 1872, 88.25, 0.36, 0.15, 8, "H100"),
)
ZONES = (
    Zone("local-1a", "local-1", "aws", 1.00),
    Zone("local-1b", "local-1", "aws", 1.03),
    Zone("local-1c", "local-1", "aws", 1.07),
    Zone("local-2a", "local-2", "gcp", 1.00),
    Zone("local-2b", "local-2", "gcp", 1.05),
)
TYPES_OF_DIALECT: dict[Dialect, tuple[InstanceType, ...]] = {"aws": AWS_TYPES, "gcp": GCP_TYPES}


def find_zone(name: str) -> Zone | None:
    return next((zone for zone in ZONES if zone.name == name), None)


def find_type(zone: Zone, name: str) -> InstanceType | None:
    return next((kind for kind in TYPES_OF_DIALECT[zone.dialect] if kind.name == name), None)


def pools() -> list[tuple[CapacityPool, Zone, InstanceType]]:
    return [
        (CapacityPool(CLOUD, zone.region, zone.name, kind.name, model), zone, kind)
        for zone in ZONES
        for kind in TYPES_OF_DIALECT[zone.dialect]
        for model in ("spot", "on-demand")
    ]


def typical_usd_per_hour(pool: CapacityPool, zone: Zone, kind: InstanceType) -> float:
    if pool.provisioning_model == "on-demand":
        return kind.on_demand_usd_per_hour
    return round(kind.on_demand_usd_per_hour * kind.spot_share * zone.spot_factor, 4)
