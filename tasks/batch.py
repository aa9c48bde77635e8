"""Batch inference: the plan, the queue and the audit, each a row in Prefect's UI with its progress."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from holdfast.supervision.batch_run import BatchRun, Tally
from tasks.placement import API_RETRIES
from tasks.progress import ProgressArtifact, Publisher


@task(cache_policy=NO_CACHE, **API_RETRIES)
def plan_batches(run: BatchRun) -> dict[str, Any]:
    plan = run.plan()
    get_run_logger().info("planned %s batches of %s records", plan["batches"], plan["records"])
    return plan


@task(cache_policy=NO_CACHE, **API_RETRIES)
def enqueue_batches(run: BatchRun) -> Tally:
    """What there is to do, once all of it is in the queue."""
    total = run.state.plan["batches"]
    progress = ProgressArtifact(Publisher(), f"queue-{run.run_id}", f"Batches of {run.run_id} that are in the queue")
    for number in run.put_batches():
        progress.show(100.0 * number / total)
    return run.look()


@task(cache_policy=NO_CACHE, **API_RETRIES)
def audit_results(run: BatchRun) -> dict[str, Any]:
    """Plan and results, read back and compared."""
    return run.audit()
