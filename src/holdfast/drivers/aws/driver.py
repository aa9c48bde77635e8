"""Amazon EC2's driver. It does what it is told: which pool, how often and for how long is decided elsewhere."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.clock import Clock, WallClock
from holdfast.drivers.aws.account import Account
from holdfast.drivers.aws.config import AwsConfig
from holdfast.drivers.aws.describe import machine_of
from holdfast.drivers.aws.errors import REPEATED, UNKNOWN_MACHINE, code_of
from holdfast.drivers.aws.examination import examine, prove
from holdfast.drivers.aws.fleets import Fleets
from holdfast.drivers.aws.inventory import Inventory
from holdfast.drivers.aws.launching import RUN_TAG, TAG_VALUE_CHARACTERS, TOKEN_TAG, run_parameters
from holdfast.drivers.aws.offers import Market
from holdfast.drivers.aws.places import Places
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
from holdfast.errors import CapacityError, ConfigError, TransientError

if TYPE_CHECKING:
    import boto3

log = logging.getLogger(__name__)

CONSOLE_BYTES = 64 * 1024
ADOPTION_SECONDS = 10.0
"""How long a launch waits for the machine of an earlier one to be shown."""
WITHOUT_LATEST = {
    "UnsupportedOperation",
    "InvalidParameterCombination",
    "IncorrectInstanceState",
    "InvalidInstanceState",
}


class AwsDriver:
    """Implements `holdfast.drivers.protocol.Driver`.

    EC2 has no maximum run time of its own: a `max_run_seconds` is left to the machine's own watchdog. Nor has it a
    shutdown script: the machine hears notices from the metadata service, and SIGTERM when it is terminated.
    """

    name = "aws"
    image_python: Path | None = None

    def __init__(self, config: AwsConfig, session: boto3.Session) -> None:
        self.config = config
        self.clock: Clock = WallClock()
        self.poll_seconds = config.poll_seconds
        self.describe_seconds = config.describe_seconds
        self._account = Account(config, session)
        self._places = Places(self._account)
        self._market = Market(self._account, self._places)
        self._inventories = {
            region: Inventory(region, self.clock, lambda region=region: self._ask(region))  # type: ignore[misc]
            for region in config.regions
        }
        self._fleets = Fleets(self._account, self._places, self._inventories)

    @property
    def account(self) -> Account:
        """For what else of it a run uses, such as its load balancers."""
        return self._account

    def check(self) -> None:
        prove(self._account, self._places)

    def examine(self) -> Iterator[Finding]:
        return examine(self._account, self._places, self._market)

    def offers(self) -> Sequence[Offer]:
        return self._market.offers()

    def price_history(self, pool: CapacityPool, start: datetime, end: datetime) -> Sequence[PricePoint]:
        self._own(pool)
        return self._market.history(pool, start, end)

    def launch(self, request: LaunchRequest) -> Machine:
        from botocore.exceptions import ClientError

        pool = request.pool
        inventory = self._own(pool)
        parameters = run_parameters(self.config, self._places, request, self._market.max_usd_per_hour(pool))
        answer, repeated = None, ""
        with self._account.calling("ec2", pool):
            try:
                answer = self._account.client("ec2", pool.region).run_instances(**parameters)
            except ClientError as error:
                repeated = code_of(error)
                if repeated not in REPEATED:
                    raise
        machine = machine_of(answer["Instances"][0], pool.region) if answer else self._adopt(request, repeated)
        machine = inventory.launched(machine)
        log.info("machine=%s launched pool=%s token=%s", machine.id, pool, request.token)
        return machine

    def launch_fleet(self, request: FleetRequest) -> Sequence[Machine]:
        for pool in request.pools:
            self._own(pool)
        return self._fleets.launch(request)

    def fleets(self, tags: Mapping[str, str]) -> Sequence[Fleet]:
        return self._fleets.described(tags)

    def end_fleet(self, token: str, region: str) -> None:
        if region not in self._inventories:
            raise ConfigError(f"aws account: region {region!r} of fleet {token!r} is not one of its regions; add it")
        for machine in self._fleets.end(token, region):
            self.terminate(machine.id, machine.pool)

    def machines(self, tags: Mapping[str, str], max_age_seconds: float = 0.0, cloud: str = "") -> Sequence[Machine]:
        if cloud and cloud != self.name:
            return []
        inventories = list(self._inventories.values())
        with contextlib.ExitStack() as stack:
            asking = map
            if len(inventories) > 1:
                asking = stack.enter_context(ThreadPoolExecutor(len(inventories))).map  # type: ignore[assignment]
            found = [
                machine for some in asking(lambda one: one.machines(max_age_seconds), inventories) for machine in some
            ]
        return [machine for machine in found if all(machine.tags.get(name) == value for name, value in tags.items())]

    def terminate(self, machine_id: str, pool: CapacityPool) -> None:
        from botocore.exceptions import ClientError

        inventory = self._own(pool)
        known = inventory.known(machine_id)
        if known and known.state == "terminated":
            return
        client = self._account.client("ec2", pool.region)
        with self._account.calling("ec2", pool):
            try:
                try:
                    client.terminate_instances(InstanceIds=[machine_id])
                except ClientError as error:
                    if code_of(error) != "OperationNotPermitted":
                        raise
                    client.modify_instance_attribute(InstanceId=machine_id, DisableApiTermination={"Value": False})
                    log.info("machine=%s is no longer protected from termination", machine_id)
                    client.terminate_instances(InstanceIds=[machine_id])
            except ClientError as error:
                if code_of(error) not in UNKNOWN_MACHINE:
                    raise
                if inventory.may_be_hidden(machine_id):
                    raise TransientError(
                        f"machine {machine_id} was launched a moment ago and EC2 does not know it yet; terminate it again"
                    ) from error
                return
        inventory.changed()
        log.info("machine=%s told to terminate pool=%s", machine_id, pool)

    def console(self, machine_id: str, pool: CapacityPool) -> str:
        from botocore.exceptions import ClientError

        self._own(pool)
        client = self._account.client("ec2", pool.region)
        with self._account.calling("ec2", pool):
            try:
                try:
                    answer = client.get_console_output(InstanceId=machine_id, Latest=True)
                except ClientError as error:
                    # Types that are not of the Nitro system keep only what was written at boot and at the end.
                    if code_of(error) not in WITHOUT_LATEST:
                        raise
                    answer = client.get_console_output(InstanceId=machine_id)
            except ClientError as error:
                if code_of(error) not in UNKNOWN_MACHINE:
                    raise
                return ""
        return answer.get("Output", "").encode()[-CONSOLE_BYTES:].decode(errors="replace")

    # -----------------------------------------------------------------------------------------------------------------

    def _own(self, pool: CapacityPool) -> Inventory:
        if pool.cloud != self.name or pool.region not in self._inventories:
            raise ConfigError(
                f"pool {pool} is of cloud {pool.cloud!r}, region {pool.region!r}; this AWS account has "
                f"{', '.join(self._inventories)}: add the region, or use another account"
            )
        return self._inventories[pool.region]

    def _ask(self, region: str) -> list[Machine]:
        return self._described(region, [{"Name": "tag-key", "Values": [RUN_TAG]}])

    def _described(self, region: str, filters: list[dict[str, object]]) -> list[Machine]:
        with self._account.calling("ec2"):
            paginator = self._account.client("ec2", region).get_paginator("describe_instances")
            pages = list(paginator.paginate(Filters=filters, PaginationConfig={"PageSize": 1000}))
        return [
            machine_of(instance, region)
            for page in pages
            for reservation in page["Reservations"]
            for instance in reservation["Instances"]
        ]

    def _adopt(self, request: LaunchRequest, code: str) -> Machine:
        """The machine of an earlier launch with this token, whose parameters were not quite the same."""
        filters: list[dict[str, object]] = [
            {"Name": f"tag:{TOKEN_TAG}", "Values": [request.token[:TAG_VALUE_CHARACTERS]]}
        ]
        give_up_at = time.monotonic() + ADOPTION_SECONDS
        while True:
            found = self._described(request.pool.region, filters)
            if found:
                return min(found, key=lambda machine: (machine.state == "terminated", machine.launched_at))
            if code == "IdempotentInstanceTerminated":
                raise CapacityError(f"the machine of {request.token!r} ended so long ago that EC2 shows it no longer")
            if time.monotonic() > give_up_at:
                raise TransientError(
                    f"EC2 has launched a machine for {request.token!r} before and does not show it yet; launch again"
                )
            time.sleep(1.0)
