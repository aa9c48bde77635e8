"""Apply a function to every record of a data set on a spot fleet: each record once, however many machines are taken."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.transactions import CommitMode, transaction

from blocks import load_budget, load_driver, load_store
from flows.fleet import keep_the_fleet_until_it_is_done, settled_and_published
from holdfast.errors import HoldfastError
from holdfast.model import BatchJob
from holdfast.supervision.batch_opening import open_batch_run
from holdfast.supervision.batch_run import BatchRun
from holdfast.supervision.preflight import check_reachable
from tasks.batch import audit_results, enqueue_batches, plan_batches
from tasks.costs import load_notification
from tasks.fleet import settle_fleet
from tasks.progress import Watcher


@flow(name="batch-inference", flow_run_name="batch-{job.name}")
def batch_inference(
    job: BatchJob,
    account: str | list[str] = "local",
    store: str = "local",
    budget: str = "",
    run_id: str = "",
    notify: str = "",
) -> dict[str, Any]:
    """Turn every record of the inputs into a result, exactly once; end with an audit and a cost summary.

    Args:
        job: Which function, over which inputs, on how many machines, and within which limits.
        account: Name of the account block that machines come from, or several. `local` is the cloud in a box.
        store: Name of the checkpoint-store block: plan and results go there. `local` is the folder .holdfast.
        budget: Name of the spending-budget block that caps the cost. Empty: only the job's own caps.
        run_id: Name of the run. The same name again goes on with that run: no batch that has a result is done again.
        notify: A notification block, as type/name, that gets the summary. Empty: none.
    """
    if notify:
        load_notification(notify)
    driver, objects = load_driver(account), load_store(store).store()
    check_reachable(objects.url, driver.name)
    run = open_batch_run(  # refuses everything that can be known to be wrong; nothing is launched before it returns
        job,
        driver,
        objects,
        load_budget(budget) if budget else None,
        run_id or f"{job.name}-{str(flow_run.id)[:8]}",
    )
    summary = carry_out_batch(run, notify)
    get_run_logger().info(run.headline(summary))
    return summary


def carry_out_batch(run: BatchRun, notify: str = "") -> dict[str, Any]:
    """Run to the end, settle, publish: whatever happens, no machine is left and the summary is there."""

    def to_the_end(watchers: list[Watcher]) -> None:
        work_through_the_batches(run, watchers)

    return settled_and_published(run, to_the_end, notify)


def work_through_the_batches(run: BatchRun, watchers: list[Watcher]) -> None:
    """Plan, queue, a fleet until every batch has its result, and the audit that proves it."""
    # What the tasks have done stays done: else Prefect would name them RolledBack once the run fails.
    with transaction(commit_mode=CommitMode.EAGER):
        plan_batches(run)
        enqueue_batches(run)
        keep_the_fleet_until_it_is_done(run, watchers)
        settle_fleet(run)
        found = audit_results(run)
    if not found["whole"]:
        raise HoldfastError(
            f"the audit of {run.prefix!r} found {found['missing']} records missing, {found['duplicates']} twice, "
            f"{found['out_of_order']} out of order and {found['foreign']} objects of others; its objects were changed from "
            "outside, or this is an error of ours: keep them, and report it"
        )
