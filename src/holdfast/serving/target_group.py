"""A target group of Elastic Load Balancing as the load balancer. Needs boto3.

Source: https://docs.aws.amazon.com/elasticloadbalancing/latest/application/load-balancer-target-groups.html
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from holdfast.drivers.aws.account import Account
from holdfast.drivers.aws.errors import code_of
from holdfast.drivers.protocol import CapacityPool
from holdfast.errors import ConfigError, TransientError
from holdfast.model import ServeJob, TargetGroup
from holdfast.serving.balancer import SETTLE_SECONDS, Endpoint, Standing
from holdfast.serving.health import HEALTH_PATH

SERVICE = "elbv2"
INVALID = "InvalidTarget"
DELAY = "deregistration_delay.timeout_seconds"


class TargetGroupBalancer:
    """Implements `holdfast.serving.balancer.LoadBalancer`.

    A target that was deregistered is `draining` until its requests are done or the group's deregistration delay is over.
    """

    def __init__(self, config: TargetGroup, job: ServeJob, account: Account) -> None:
        self._arn, self._region = config.arn, config.region
        self._job, self._account = job, account
        self._by_address = False
        self._known_type = False
        self._machines: dict[str, str] = {}
        """Of a group by IP: whose address it is."""

    def check(self, pools: Sequence[CapacityPool]) -> None:
        group = self._group()
        with self._account.calling(SERVICE):
            said = self._client.describe_target_group_attributes(TargetGroupArn=self._arn)
        attributes = {one["Key"]: one["Value"] for one in said["Attributes"]}
        if problems := list(self._problems(group, attributes, pools)):
            raise ConfigError(f"load_balancer {self._arn}: " + "; ".join(problems))

    def _problems(
        self, group: dict[str, Any], attributes: dict[str, str], pools: Sequence[CapacityPool]
    ) -> Iterator[str]:
        if group["TargetType"] not in ("instance", "ip"):
            yield f"its targets are of type {group['TargetType']!r}; take a group of type instance or ip"
        if far := sorted({pool.region for pool in pools} - {self._region}):
            yield (
                f"it is in {self._region}, and machines may come from {', '.join(far)} too; write resources: "
                f"{{regions: [{self._region}]}}"
            )
        path, port = group.get("HealthCheckPath"), group.get("HealthCheckPort")
        if path != HEALTH_PATH or port != str(self._job.health_port):
            yield (
                f"its health check asks {path!r} at port {port!r}, which knows nothing of notices; set path {HEALTH_PATH} and "
                f"port {self._job.health_port} (health_port of the job)"
            )
        seconds = group["HealthCheckIntervalSeconds"] * group["UnhealthyThresholdCount"]
        limit = SETTLE_SECONDS["target-group"]
        if seconds > limit:
            yield (
                f"its health check needs {seconds} s to see that a machine drains, more than the {limit:g} s that a machine "
                "waits; set a shorter interval, such as 5 s, or a threshold of 2"
            )
        if (delay := float(attributes.get(DELAY, 300))) < self._job.drain_seconds:
            yield (
                f"it closes connections {delay:g} s after a target was deregistered, and drain_seconds is "
                f"{self._job.drain_seconds:g}; raise {DELAY}, or lower drain_seconds"
            )

    def open(self) -> None:
        self._by_ip()

    def register(self, endpoint: Endpoint) -> None:
        from botocore.exceptions import ClientError

        with self._account.calling(SERVICE):
            try:
                self._client.register_targets(TargetGroupArn=self._arn, Targets=[self._target(endpoint)])
            except ClientError as error:
                if code_of(error) != INVALID:
                    raise
                raise TransientError(
                    f"load_balancer: {endpoint.machine} is not taken in: {error}; it is no longer running, or not in the "
                    "network of the target group"
                ) from error

    def drain(self, endpoint: Endpoint) -> None:
        """Of a target that is not registered, too."""
        from botocore.exceptions import ClientError

        with self._account.calling(SERVICE):
            try:
                self._client.deregister_targets(TargetGroupArn=self._arn, Targets=[self._target(endpoint)])
            except ClientError as error:
                if code_of(error) != INVALID:
                    raise

    def remove(self, endpoint: Endpoint) -> None:
        """It is deregistered; the load balancer itself answers for what was in flight on it."""
        self.drain(endpoint)
        self._machines.pop(endpoint.address, None)

    def standings(self) -> dict[str, Standing]:
        with self._account.calling(SERVICE):
            said = self._client.describe_target_health(TargetGroupArn=self._arn)["TargetHealthDescriptions"]
        found = {}
        for one in said:
            target, state = one["Target"]["Id"], one["TargetHealth"]["State"]
            if machine := self._machines.get(target) if self._by_ip() else target:
                found[machine] = Standing(state=_state_of(state))
        return found

    def close(self) -> None:
        """It is the user's."""

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _client(self) -> Any:
        return self._account.client(SERVICE, self._region)

    def _group(self) -> dict[str, Any]:
        from botocore.exceptions import ClientError

        with self._account.calling(SERVICE):
            try:
                return self._client.describe_target_groups(TargetGroupArns=[self._arn])["TargetGroups"][0]
            except ClientError as error:
                if code_of(error) != "TargetGroupNotFound":
                    raise
        raise ConfigError(f"load_balancer: the account has no target group {self._arn}; name one that exists")

    def _by_ip(self) -> bool:
        if not self._known_type:
            self._by_address = self._group()["TargetType"] == "ip"
            self._known_type = True
        return self._by_address

    def _target(self, endpoint: Endpoint) -> dict[str, Any]:
        if not self._by_ip():
            return {"Id": endpoint.machine, "Port": endpoint.port}
        self._machines[endpoint.address] = endpoint.machine
        return {"Id": endpoint.address, "Port": endpoint.port}


def _state_of(state: str) -> Any:
    """Of `initial`, `healthy`, `unhealthy`, `unhealthy.draining`, `unused`, `draining`, `unavailable`."""
    if "draining" in state:
        return "draining"
    return "up" if state == "healthy" else "down"
