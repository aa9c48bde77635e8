"""The provider's bill, and the ledger beside it."""

from __future__ import annotations

from datetime import UTC, datetime

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.billing import BillAccess
from holdfast.errors import ConfigError
from holdfast.market.bills import Asked, read_bill
from holdfast.market.history import History
from holdfast.market.reconciliation import (
    Reconciler,
    Reconciliation,
    Tolerance,
    known_runs,
    tag_on_bill,
    told_by_ledger,
    whole_days,
)
from holdfast.runtime.contract import store_tag
from holdfast.storage import ObjectStore
from tasks.placement import API_RETRIES


@task(cache_policy=NO_CACHE, **API_RETRIES)
def reconcile_with(access: BillAccess, store: ObjectStore, url: str, days: int, tolerance: Tolerance) -> Reconciliation:
    """Raises ConfigError, TransientError."""
    if days < 1:
        raise ConfigError(f"days is {days}; at least one day must be looked at")
    now = datetime.now(UTC)
    start, end = whole_days(now, days)
    bill = read_bill(url, Asked(start=start, end=end, store=store_tag(store.url)), access.session, access.bigquery)
    ledger = told_by_ledger(History(store).lives(start), bill.cloud, start, end)
    tags = {line.tag for line in bill.lines} | {tag_on_bill(bill.cloud, run) for run in ledger}
    return Reconciler(bill=bill, start=start, end=end, now=now, tolerance=tolerance).against(
        ledger, known_runs(store, tags, bill.cloud)
    )
