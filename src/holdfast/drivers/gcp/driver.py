"""Compute Engine behind the driver's protocol."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.clock import WallClock
from holdfast.drivers.gcp import examination, fleets, names, specification
from holdfast.drivers.gcp.api import ComputeApi
from holdfast.drivers.gcp.config import GcpConfig, region_of
from holdfast.drivers.gcp.console import read_logged, read_serial_port
from holdfast.drivers.gcp.errors import PROTECTED, is_gone, translated, words_of
from holdfast.drivers.gcp.machines import CLOUD, Machines, name_of
from holdfast.drivers.gcp.operations_log import parse_time
from holdfast.drivers.gcp.prices import Market
from holdfast.drivers.protocol import (
    CapacityPool,
    Finding,
    Fleet,
    FleetRequest,
    LaunchRequest,
    Machine,
    Offer,
    PricePoint,
)
from holdfast.errors import ConfigError, HoldfastError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials
    from google.cloud import compute_v1

log = logging.getLogger(__name__)


class GcpDriver:
    """Implements `holdfast.drivers.protocol.Driver`.

    `Machine.id` is the instance's name, which follows from the launch's token; members of a maintained fleet have the
    instance's number behind it. Threads may share a driver: they share its description of the machines too.
    """

    name = CLOUD
    image_python: Path | None = None

    def __init__(self, config: GcpConfig, credentials: Credentials) -> None:
        self.config = config
        self.clock = WallClock()
        self.poll_seconds = config.poll_seconds
        self.describe_seconds = config.describe_seconds
        self.api = ComputeApi(config, credentials)
        self.market = Market(self.api, self.clock)
        self._machines = Machines(self.api, self.clock)
        self._warned_of_logging = False

    def check(self) -> None:
        """Two calls: the first region, which also proves project and credentials, and the image."""
        examination.check_region(self.api, self.config.regions[0])
        examination.find_image(self.api)

    def examine(self) -> Iterator[Finding]:
        return examination.examine(self)

    def offers(self) -> Sequence[Offer]:
        return self.market.offers(self.zones)

    def price_history(self, pool: CapacityPool, start: datetime, end: datetime) -> Sequence[PricePoint]:
        """One point: there is no price history to be had, and a Spot price changes at most once a day.

        Source: https://cloud.google.com/spot-vms/pricing
        """
        return [PricePoint(at=start, usd_per_hour=self.market.usd_per_hour(pool, self.zones))]

    @cached_property
    def zones(self) -> list[str]:
        """Those of the account, asked for once where the account does not name them."""
        if self.config.zones:
            return self.config.zones
        found = []
        for region in self.config.regions:
            found += [zone.rpartition("/")[2] for zone in examination.check_region(self.api, region).zones]
        return sorted(found)

    # -- one machine --------------------------------------------------------------------------------------------------

    def launch(self, request: LaunchRequest) -> Machine:
        """`request.environment` is in the start-up script already: instances have no other way to be told."""
        pool = self._known_pool(request.pool)
        name = names.instance_name(request.token, request.tags, pool)
        if over := self._machines.over(name, pool, request.tags):
            return over
        properties = specification.properties(
            self.config,
            token=request.token,
            pool=pool,
            tags=request.tags,
            startup_script=request.startup_script,
            shutdown_script=request.shutdown_script,
            max_run_seconds=request.max_run_seconds,
            disk_gib=request.disk_gib,
        )
        operation = self.api.create(
            # The unary form: the other wraps the operation in a future that asks Google's own address.
            self.api.instances.insert_unary,
            f"launching {pool.instance_type} ({pool.provisioning_model}) in {pool.zone}",
            "compute.instances.create",
            once=(pool.zone, name),
            zone=pool.zone,
            instance_resource=specification.instance(properties, name, pool.zone),
        )
        instance = self._find(name, pool.zone)
        if instance and instance.labels.get(names.TOKEN_LABEL) != names.digest(request.token, 16):
            raise ConfigError(
                f"instance {name} in {pool.zone} exists and is not of this launch: its label {names.TOKEN_LABEL} is "
                f"{instance.labels.get(names.TOKEN_LABEL)!r}; delete it"
            )
        asked_at = parse_time(operation.insert_time) if operation and operation.insert_time else self.clock.now()
        instance_id = str(operation.target_id) if operation and operation.target_id else ""
        machine = self._machines.launched(instance, name, pool, request.tags, instance_id, asked_at)
        log.info("machine=%s pool=%s state=%s", machine.id, pool, machine.state)
        return machine

    def _find(self, name: str, zone: str) -> compute_v1.Instance | None:
        """None for one that is not there, or not there yet."""
        try:
            return self.api.ask(self.api.instances.get, project=self.api.project, zone=zone, instance=name)
        except Exception as error:
            if is_gone(error):
                return None
            with translated(f"describing {name}", "compute.instances.get"):
                raise

    def _known_pool(self, pool: CapacityPool) -> CapacityPool:
        if (
            pool.cloud != CLOUD
            or region_of(pool.zone) not in self.config.regions
            or pool.region != region_of(pool.zone)
        ):
            raise ConfigError(
                f"pool {pool}: the account covers the regions {', '.join(self.config.regions)} of Google Cloud; "
                "add its region to the account, or drop the pool"
            )
        return pool

    # -- fleets -------------------------------------------------------------------------------------------------------

    def launch_fleet(self, request: FleetRequest) -> Sequence[Machine]:
        for pool in request.pools:
            self._known_pool(pool)
        return fleets.launch(self.api, self._machines, request)

    def fleets(self, tags: Mapping[str, str]) -> Sequence[Fleet]:
        return fleets.find(self.api, tags)

    def end_fleet(self, token: str, region: str) -> None:
        fleets.end(self.api, self._machines, token, region)

    # -- all machines -------------------------------------------------------------------------------------------------

    def machines(self, tags: Mapping[str, str], max_age_seconds: float = 0.0, cloud: str = "") -> Sequence[Machine]:
        if cloud not in ("", CLOUD):
            return []
        return self._machines.with_tags(tags, max_age_seconds)

    def terminate(self, machine_id: str, pool: CapacityPool) -> None:
        name = name_of(machine_id)
        known = self._machines.known(machine_id)
        if known and known.over and not known.shown:
            return
        doing, permission = f"terminating {machine_id}", "compute.instances.delete"
        with translated(doing, permission):
            try:
                self._delete(name, pool.zone)
            except Exception as error:
                if is_gone(error):
                    return
                if not PROTECTED.search(words_of(error)):
                    raise
                operation = self.api.ask(
                    self.api.instances.set_deletion_protection_unary,
                    project=self.api.project,
                    zone=pool.zone,
                    resource=name,
                    deletion_protection=False,
                )
                self.api.wait(operation, doing)
                self._delete(name, pool.zone)
        self._machines.asked_to_end(machine_id)

    def _delete(self, name: str, zone: str) -> None:
        self.api.ask(self.api.instances.delete_unary, project=self.api.project, zone=zone, instance=name)

    def console(self, machine_id: str, pool: CapacityPool) -> str:
        known = self._machines.known(machine_id)
        ended = known is not None and known.over
        said = "" if ended else read_serial_port(self.api, name_of(machine_id), pool.zone)
        if said or (known and not ended):
            return said
        remembered = known.console if known else ""
        if not known or not known.instance_id or not self.config.console_logging:
            return remembered
        try:
            logged = read_logged(self.api, known.instance_id, known.machine.launched_at)
        except HoldfastError as error:
            # A comfort, and often not permitted: a run does not wait for it.
            if not self._warned_of_logging:
                log.warning("consoles of ended machines are not to be had from Cloud Logging: %s", error)
                self._warned_of_logging = True
            return remembered
        return max(remembered, logged, key=len)
