"""The ledger held against the provider's bill, run by run, on a schedule: what differs is told, and a leak fails it."""

from __future__ import annotations

import dataclasses
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.events import emit_event
from prefect.states import Completed, Failed, State

from blocks import load_store
from blocks.billing import load_bill_access
from holdfast.market.reconciliation import Reconciliation, Tolerance, cells, to_markdown
from tasks.reconciling import reconcile_with


@flow(name="reconcile", flow_run_name="reconcile-{account}")
def reconcile(
    account: str = "aws",
    store: str = "s3",
    bill: str = "cost-explorer",
    days: int = 14,
    tolerance_usd: float = 0.05,
    tolerance_share: float = 0.05,
) -> State[Any]:
    """Hold what the ledger says of the last days against the provider's own bill. It reads, and changes nothing.

    Args:
        account: Name of the account block whose bill it is, and whose credentials may read it.
        store: Name of the checkpoint-store block whose runs are looked at.
        bill: cost-explorer, s3://bucket/prefix of a Cost and Usage Report, or bigquery://project.dataset.table.
        days: Whole days in UTC, up to the last one of which the bill should be complete: two days ago.
        tolerance_usd: What a run's difference may be in dollars.
        tolerance_share: Or as a share of the run's dollars; the larger of both counts.

    The state is Failed when a run differs by more, is missing on the bill, or is unknown to the ledger.
    """
    tolerance = Tolerance(usd=tolerance_usd, share=tolerance_share)
    found = reconcile_with(load_bill_access(account), load_store(store).store(), bill, days, tolerance)
    _show(found, account)
    if found.alarming:
        return Failed(message=found.headline, data=to_json(found))
    return Completed(message=found.headline, data=to_json(found))


def _show(found: Reconciliation, account: str) -> None:
    log = get_run_logger()
    for one in found.alarming:
        log.warning("run=%s %s by $%+.4f: %s", one.run, one.verdict, one.difference_usd, one.why)
        emit_event(
            "holdfast.bill.differs",
            resource={"prefect.resource.id": f"holdfast.bill.{found.cloud}", "prefect.resource.name": found.source},
            related=[{"prefect.resource.id": f"holdfast.run.{one.run}", "prefect.resource.role": "run"}],
            payload=dataclasses.asdict(one),
        )
    log.info("%s", found.headline)
    if found.differences:
        create_table_artifact(cells(found), key=f"bill-{account}", description=found.headline)
    create_markdown_artifact(to_markdown(found), key=f"reconciliation-{account}", description=found.headline)


def to_json(found: Reconciliation) -> dict[str, Any]:
    return {
        "headline": found.headline,
        "start": found.start.isoformat(),
        "end": found.end.isoformat(),
        "ledger_usd": found.ledger_usd,
        "bill_usd": found.bill_usd,
        "markdown": to_markdown(found),
        "differences": [dataclasses.asdict(one) for one in found.differences],
    }
