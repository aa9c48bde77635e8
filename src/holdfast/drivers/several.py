"""Several accounts as one cloud: a run that was refused in one goes on in another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

from holdfast.clock import Clock
from holdfast.drivers.protocol import (
    CapacityPool,
    Driver,
    Finding,
    Fleet,
    FleetRequest,
    LaunchRequest,
    Machine,
    Offer,
    PricePoint,
)
from holdfast.errors import ConfigError, TransientError


class SomeOffers(list[Offer]):
    """What some of the clouds offer, while another did not answer: what they lack may be had there."""

    def __init__(self, found: Sequence[Offer], missing: TransientError) -> None:
        super().__init__(found)
        self.missing = missing


class SeveralDrivers:
    """Implements `holdfast.drivers.protocol.Driver`; every call goes to the cloud that the pool names."""

    def __init__(self, drivers: Sequence[Driver]) -> None:
        names = [driver.name for driver in drivers]
        if len(set(names)) < len(names):
            raise ConfigError(f"account: {names} names a cloud twice; one account of each cloud is what a run can use")
        speeds = {driver.name: driver.clock.speed for driver in drivers}
        if len(set(speeds.values())) > 1:
            raise ConfigError(f"account: the clocks of {speeds} differ, so their bills can't be added; use one speed")
        self._drivers = {driver.name: driver for driver in drivers}
        self.name = "+".join(names)
        self.clock: Clock = drivers[0].clock
        self.poll_seconds = min(driver.poll_seconds for driver in drivers)
        self.describe_seconds = max(driver.describe_seconds for driver in drivers)
        pythons = {driver.image_python for driver in drivers}
        self.image_python: Path | None = pythons.pop() if len(pythons) == 1 else None

    def check(self) -> None:
        for driver in self._drivers.values():
            driver.check()

    def examine(self) -> Iterator[Finding]:
        for name, driver in self._drivers.items():
            for found in driver.examine():
                yield Finding(subject=f"{name} {found.subject}", ok=found.ok, detail=found.detail)

    def offers(self) -> Sequence[Offer]:
        """Of every cloud that answers, as SomeOffers where one does not. Raises TransientError when none does."""
        found: list[Offer] = []
        errors: list[TransientError] = []
        with ThreadPoolExecutor(len(self._drivers)) as pool:
            for asked in [pool.submit(driver.offers) for driver in self._drivers.values()]:
                try:
                    found += asked.result()
                except TransientError as error:  # one cloud that is away must not keep the run from the other
                    errors.append(error)
        if not found and errors:
            raise errors[0]
        return SomeOffers(found, errors[0]) if errors else found

    def price_history(self, pool: CapacityPool, start: datetime, end: datetime) -> Sequence[PricePoint]:
        return self._of(pool.cloud).price_history(pool, start, end)

    def launch(self, request: LaunchRequest) -> Machine:
        return self._of(request.pool.cloud).launch(request)

    def launch_fleet(self, request: FleetRequest) -> Sequence[Machine]:
        return self._of(request.pools[0].cloud).launch_fleet(request)

    def fleets(self, tags: Mapping[str, str]) -> Sequence[Fleet]:
        return [fleet for driver in self._drivers.values() for fleet in driver.fleets(tags)]

    def end_fleet(self, token: str, region: str) -> None:
        refusals: list[ConfigError] = []
        for driver in self._drivers.values():
            try:
                driver.end_fleet(token, region)
            except ConfigError as error:  # the region is another cloud's
                refusals.append(error)
        if len(refusals) == len(self._drivers):
            raise refusals[0]

    def machines(self, tags: Mapping[str, str], max_age_seconds: float = 0.0, cloud: str = "") -> Sequence[Machine]:
        asked = [self._of(cloud)] if cloud else list(self._drivers.values())
        return [machine for driver in asked for machine in driver.machines(tags, max_age_seconds)]

    def terminate(self, machine_id: str, pool: CapacityPool) -> None:
        self._of(pool.cloud).terminate(machine_id, pool)

    def console(self, machine_id: str, pool: CapacityPool) -> str:
        return self._of(pool.cloud).console(machine_id, pool)

    def _of(self, cloud: str) -> Driver:
        try:
            return self._drivers[cloud]
        except KeyError:
            raise ConfigError(
                f"account: the run has used cloud {cloud!r}, which is none of {sorted(self._drivers)}; name its account too"
            ) from None
