"""Serve a model from replicas on interruptible machines behind a load balancer, however often some are taken away."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from blocks import load_budget, load_driver, load_store
from flows.fleet import carry_out_fleet
from holdfast.model import ServeJob
from holdfast.supervision.preflight import check_reachable
from holdfast.supervision.serve_opening import open_serve_run
from tasks.costs import load_notification


@flow(name="serve", flow_run_name="serve-{job.name}")
def serve(
    job: ServeJob,
    account: str | list[str] = "local",
    store: str = "local",
    budget: str = "",
    run_id: str = "",
    notify: str = "",
) -> dict[str, Any]:
    """Keep a model server up on many machines; drain what is about to be taken, and register what takes its place.

    Args:
        job: Which server, how many replicas, behind which load balancer, and within which limits.
        account: Name of the account block that machines come from, or several. `local` is the cloud in a box.
        store: Name of the checkpoint-store block. `local` is the folder .holdfast.
        budget: Name of the spending-budget block that caps the cost. Empty: only the job's own max_run_hours.
        run_id: Name of the run. The same name again goes on with that run, from its journal. Empty: a new run.
        notify: A notification block, as type/name, that gets the summary. Empty: none.
    """
    if notify:
        load_notification(notify)
    driver, objects = load_driver(account), load_store(store).store()
    check_reachable(objects.url, driver.name)
    run = open_serve_run(  # refuses everything that can be known to be wrong; nothing is launched before it returns
        job,
        driver,
        objects,
        load_budget(budget) if budget else None,
        run_id or f"{job.name}-{str(flow_run.id)[:8]}",
    )
    summary = carry_out_fleet(run, notify)
    get_run_logger().info(run.headline(summary))
    return summary
