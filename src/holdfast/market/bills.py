"""What the provider's own bill says of each run: by Cost Explorer, a Cost and Usage Report, or BigQuery's billing export."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from holdfast.errors import ConfigError

Part = Literal["machines", "other", "credits"]
"""`machines`: what the ledger counts. `other`: disks, addresses, traffic. `credits`: below zero, discounts included."""

RUN_TAG, STORE_TAG = "holdfast-run", "holdfast-store"
COST_EXPLORER_REGION = "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Whole days in UTC, of one store's machines."""

    start: datetime
    end: datetime
    """Exclusive."""
    store: str
    """The value of the machines' tag `holdfast-store`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BillLine:
    """Of one run, in dollars."""

    tag: str
    """The run's tag as the bill has it; on GCP a label, which not every run's name can be."""
    machines_usd: float = 0.0
    other_usd: float = 0.0
    credits_usd: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    cloud: Literal["aws", "gcp"]
    source: str
    """In words, for people."""
    lines: tuple[BillLine, ...] = ()
    reaches: datetime | None = None
    """The end of the newest usage that is on it; None where the bill does not say."""


def lines_of(amounts: Iterable[tuple[str, Part, float]]) -> tuple[BillLine, ...]:
    """(tag, part, dollars) summed, by tag."""
    sums: dict[str, dict[Part, float]] = defaultdict(lambda: {"machines": 0.0, "other": 0.0, "credits": 0.0})
    for tag, part, usd in amounts:
        sums[tag][part] += usd
    return tuple(
        BillLine(tag=tag, machines_usd=of["machines"], other_usd=of["other"], credits_usd=of["credits"])
        for tag, of in sorted(sums.items())
    )


def read_bill(url: str, asked: Asked, session: Callable[[], Any], bigquery: Callable[[str], Any]) -> Bill:
    """`url`: `cost-explorer`, `s3://bucket/prefix` of a Cost and Usage Report, or `bigquery://project.dataset.table`.

    `session` makes a boto3 session, `bigquery` a google.cloud.bigquery client of a project. Raises ConfigError for what can
    never be read, CredentialsError, TransientError.
    """
    scheme, _, place = url.partition("://")
    if url == "cost-explorer":
        from holdfast.market.cost_explorer import read_cost_explorer

        return read_cost_explorer(session().client("ce", region_name=COST_EXPLORER_REGION), asked)
    if scheme == "s3":
        from holdfast.market.usage_report import read_usage_report

        return read_usage_report(url, session(), asked)
    if scheme == "bigquery":
        from holdfast.market.billing_export import read_billing_export

        return read_billing_export(place, bigquery, asked)
    raise ConfigError(
        f"bill {url!r}: nothing reads it; use cost-explorer, s3://bucket/prefix (a Cost and Usage Report), or "
        "bigquery://project.dataset.table (a billing export)"
    )
