"""Every cloud that has a driver, under one handle, for the contract that all of them pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.drivers.protocol import CapacityPool, Driver
from tests.contract.machines import driver_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """A cloud that lives as long as the test, empty at first."""

    driver: Callable[[], Driver]
    """A new driver object of the same account, as another process would make it."""
    spot: CapacityPool
    on_demand: CapacityPool
    other_zone: CapacityPool
    """Spot, of the same region and type as `spot`."""


Open = Callable[[Path, Sequence[Fate], Sequence[Fate]], AbstractContextManager[Cloud]]
"""Of a folder, the fates of spot machines and those of on-demand machines, in the order of their launches."""


@contextmanager
def local_cloud(folder: Path, spot_fates: Sequence[Fate], on_demand_fates: Sequence[Fate]) -> Iterator[Cloud]:
    market = ScriptedMarket(spot=list(spot_fates), on_demand=list(on_demand_fates))
    # Its notice of 120 s lasts 3 s of the wall.

    def pool(zone: str, model: str) -> CapacityPool:
        return CapacityPool("local", "local-1", zone, "c7i.large", model)  # type: ignore[arg-type]

    yield Cloud(
        driver=lambda: driver_of(folder / "cloud", market=market, clock_speed=40.0),
        spot=pool("local-1a", "spot"),
        on_demand=pool("local-1a", "on-demand"),
        other_zone=pool("local-1b", "spot"),
    )


CLOUDS: dict[str, Open] = {"local": local_cloud}


@contextmanager
def aws_cloud(folder: Path, spot_fates: Sequence[Fate], on_demand_fates: Sequence[Fate]) -> Iterator[Cloud]:
    # Here, not above: the tests of other clouds need no moto.
    from tests.emulated.aws import AwsEmulator

    def pool(zone: str, model: str) -> CapacityPool:
        return CapacityPool("aws", "us-east-1", zone, "c7i.large", model)  # type: ignore[arg-type]

    with AwsEmulator(folder / "aws", spot_fates=spot_fates, on_demand_fates=on_demand_fates) as aws:
        yield Cloud(
            driver=aws.driver,
            spot=pool("us-east-1a", "spot"),
            on_demand=pool("us-east-1a", "on-demand"),
            other_zone=pool("us-east-1b", "spot"),
        )


CLOUDS["aws"] = aws_cloud


@contextmanager
def gcp_cloud(folder: Path, spot_fates: Sequence[Fate], on_demand_fates: Sequence[Fate]) -> Iterator[Cloud]:
    # Here, not above: the tests of other clouds need no client of Google's.
    from tests.emulated.gce import GceEmulator

    def pool(zone: str, model: str) -> CapacityPool:
        return CapacityPool("gcp", "us-central1", zone, "n2-standard-2", model)  # type: ignore[arg-type]

    with GceEmulator(folder / "gce", spot_fates=spot_fates, on_demand_fates=on_demand_fates) as gce:
        yield Cloud(
            driver=gce.driver,
            spot=pool("us-central1-a", "spot"),
            on_demand=pool("us-central1-a", "on-demand"),
            other_zone=pool("us-central1-b", "spot"),
        )


CLOUDS["gcp"] = gcp_cloud
