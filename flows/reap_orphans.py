"""Terminate machines that no live run owns. Scheduled, it is the last net under a leaked machine."""

from __future__ import annotations

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event

from blocks import load_driver, load_store
from tasks.machines import reap_machines


@flow(name="reap-orphans", flow_run_name="reap-{account}")
def reap_orphans(account: str = "local", store: str = "local") -> int:
    """Terminate every machine of the account that carries this store's tag and whose run nobody owns any more.

    Args:
        account: Name of the account block whose machines are looked at.
        store: Name of the checkpoint-store block that their runs live in.

    Returns the number of machines that were terminated.
    """
    reaped = reap_machines(load_driver(account), load_store(store).store())
    log = get_run_logger()
    for orphan in reaped:
        log.warning(
            "terminated machine=%s run=%s pool=%s why=%s", orphan.machine, orphan.run_id, orphan.pool, orphan.why
        )
        emit_event(
            "holdfast.machine.reaped",
            resource={"prefect.resource.id": f"holdfast.machine.{orphan.machine}"},
            related=[{"prefect.resource.id": f"holdfast.run.{orphan.run_id}", "prefect.resource.role": "run"}],
            payload={"why": orphan.why},
        )
    if reaped:
        rows = [{"machine": o.machine, "run": o.run_id, "pool": o.pool, "why": o.why} for o in reaped]
        create_table_artifact(rows, key=f"reaped-{account}", description="Machines that no live run owned")
    else:
        log.info("no orphan among the machines of account=%s", account)
    return len(reaped)
