"""The load balancer that a job names."""

from __future__ import annotations

from typing import Any

from holdfast.drivers.protocol import Driver
from holdfast.errors import ConfigError
from holdfast.model import EndpointGroup, Haproxy, ServeJob, TargetGroup
from holdfast.serving.balancer import LoadBalancer
from holdfast.serving.haproxy import HaproxyBalancer

SETTLE_SECONDS = {"haproxy": 2.0, "target-group": 20.0, "endpoint-group": 10.0}
"""Wall seconds until a load balancer whose orchestrator is dead has certainly seen the health check's 503, at the intervals
that docs/serving.md asks for."""


def open_balancer(job: ServeJob, driver: Driver, run_id: str, store_url: str) -> LoadBalancer:
    """Raises ConfigError when the run has no account of the load balancer's cloud."""
    match job.load_balancer:
        case Haproxy() as config:
            return HaproxyBalancer(config, run_id, store_url)
        case TargetGroup(arn=arn):
            from holdfast.serving.target_group import TargetGroupBalancer

            return TargetGroupBalancer(arn, _account(driver, "aws", "target-group"), job)
        case EndpointGroup(name=name):
            from holdfast.serving.endpoint_group import EndpointGroupBalancer

            return EndpointGroupBalancer(name, _account(driver, "gcp", "endpoint-group"), job)


def _account(driver: Driver, cloud: str, kind: str) -> Any:
    if driver.name != cloud:
        raise ConfigError(
            f"load_balancer: a {kind} takes machines of {cloud}, and the account's are of {driver.name}; name an account "
            f"block of {cloud}, or use haproxy"
        )
    return driver
