"""Train one job on many machines at once, and on fewer while those that were taken are replaced."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.fleet import open_and_carry_out
from holdfast.model import GangJob


@flow(name="gang", flow_run_name="gang-{job.name}")
def gang(
    job: GangJob,
    account: str | list[str] = "local",
    store: str = "local",
    budget: str = "",
    run_id: str = "",
    notify: str = "",
) -> dict[str, Any]:
    """Train one job on many machines at once: torchrun starts the ranks, the run replaces what is taken.

    Args:
        job: What to train, on how many machines, on how few, and within which limits.
        account: Name of the account block that machines come from, or several. `local` is the cloud in a box.
        store: Name of the checkpoint-store block. `local` is the folder .holdfast.
        budget: Name of the spending-budget block that caps the cost. Empty: only the job's own max_run_hours.
        run_id: Name of the run. The same name again goes on with that run, from its journal. Empty: a new run.
        notify: A notification block, as type/name, that gets the summary. Empty: none.
    """
    return open_and_carry_out(job, account, store, budget, run_id, notify)
