"""The load balancer that a job names."""

from __future__ import annotations

from typing import TypeVar

from holdfast.drivers.aws.driver import AwsDriver
from holdfast.drivers.gcp.driver import GcpDriver
from holdfast.drivers.protocol import Driver
from holdfast.errors import ConfigError
from holdfast.model import EndpointGroups, ServeJob, TargetGroup
from holdfast.serving.balancer import LoadBalancer
from holdfast.serving.endpoint_groups import EndpointGroupsBalancer
from holdfast.serving.haproxy import HaproxyBalancer
from holdfast.serving.target_group import TargetGroupBalancer

AnyDriver = TypeVar("AnyDriver")


def open_balancer(job: ServeJob, driver: Driver, run_id: str, store_url: str) -> LoadBalancer:
    """Raises ConfigError when the load balancer is of a cloud that the account is not of."""
    match job.load_balancer:
        case TargetGroup() as group:
            return TargetGroupBalancer(group, job, _insist_on(driver, AwsDriver, "aws", group.arn).account)
        case EndpointGroups() as groups:
            return EndpointGroupsBalancer(groups, job, _insist_on(driver, GcpDriver, "gcp", groups.name).api)
        case haproxy:
            return HaproxyBalancer(haproxy, run_id, store_url)


def _insist_on(driver: Driver, kind: type[AnyDriver], cloud: str, named: str) -> AnyDriver:
    if isinstance(driver, kind):
        return driver
    raise ConfigError(
        f"load_balancer {named!r} takes machines of {cloud} only, and the account's are of {driver.name}; name an account of "
        f"{cloud}, or haproxy"
    )
