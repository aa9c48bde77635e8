"""The load balancer that a job names."""

from __future__ import annotations

from holdfast.model import ServeJob
from holdfast.serving.balancer import LoadBalancer
from holdfast.serving.haproxy import HaproxyBalancer

SETTLE_SECONDS = {"haproxy": 2.0}
"""Wall seconds until a load balancer whose orchestrator is dead has certainly seen the health check's 503."""


def open_balancer(job: ServeJob, run_id: str, store_url: str) -> LoadBalancer:
    return HaproxyBalancer(job.load_balancer, run_id, store_url)
