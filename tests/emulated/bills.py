"""One week's bill, in every form in which the providers tell it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any


@dataclass(frozen=True)
class Item:
    """One line of a bill."""

    run: str
    usd: float
    at: datetime
    store: str
    usage: str = "USW2-SpotUsage:g5.xlarge"
    kind: str = "Usage"

    @property
    def service(self) -> str:
        return (
            "Amazon Elastic Compute Cloud - Compute"
            if "Usage:" in self.usage and "EBS" not in self.usage
            else "EC2 - Other"
        )


RECORD_TYPES = {"EdpDiscount": "Enterprise Discount Program Discount"}


def cost_explorer_answer(items: Sequence[Item], request: dict[str, Any]) -> dict[str, Any]:
    """Of GetCostAndUsage, as AWS shows it: days, groups with keys `holdfast-run$NAME`, amounts as text."""
    of_store, which = request["Filter"]["And"]
    negated = "Not" in which
    types = (which["Not"] if negated else which)["Dimensions"]["Values"]
    start, end = (datetime.fromisoformat(f"{request['TimePeriod'][name]}T00:00:00+00:00") for name in ("Start", "End"))
    by_service = len(request["GroupBy"]) > 1
    sums: dict[datetime, dict[tuple[str, ...], float]] = defaultdict(lambda: defaultdict(float))
    for item in items:
        if item.store not in of_store["Tags"]["Values"] or not start <= item.at < end:
            continue
        if (RECORD_TYPES.get(item.kind, item.kind) in types) == negated:
            continue
        key = (f"holdfast-run${item.run}", *([item.service] if by_service else []))
        sums[item.at.replace(hour=0, minute=0, second=0, microsecond=0)][key] += item.usd
    days = []
    for number in range((end - start).days):
        day = start + timedelta(days=number)
        groups = [
            {"Keys": list(keys), "Metrics": {"UnblendedCost": {"Amount": f"{usd:.10f}", "Unit": "USD"}}}
            for keys, usd in sorted(sums[day].items())
        ]
        period = {"Start": f"{day:%Y-%m-%d}", "End": f"{day + timedelta(days=1):%Y-%m-%d}"}
        days.append({"TimePeriod": period, "Total": {}, "Groups": groups, "Estimated": True})
    return {"GroupDefinitions": request["GroupBy"], "ResultsByTime": days, "DimensionValueAttributes": []}


def legacy_csv(items: Sequence[Item]) -> bytes:
    """A Cost and Usage Report of the old kind: gzipped CSV, `lineItem/UnblendedCost`, a column for each tag."""
    rows = [
        {
            "identity/LineItemId": f"id{number}",
            "lineItem/UsageStartDate": f"{item.at:%Y-%m-%dT%H:%M:%SZ}",
            "lineItem/UsageEndDate": f"{item.at + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}",
            "lineItem/LineItemType": item.kind,
            "lineItem/ProductCode": "AmazonEC2",
            "lineItem/UsageType": item.usage,
            "lineItem/CurrencyCode": "USD",
            "lineItem/UnblendedCost": f"{item.usd:.10f}",
            "resourceTags/user:holdfast-run": item.run,
            "resourceTags/user:holdfast-store": item.store,
        }
        for number, item in enumerate(items)
    ]
    return gzip.compress(_csv(rows))


def legacy_parquet(items: Sequence[Item]) -> bytes:
    return _parquet([{**_columns(item), **_flat_tags(item)} for item in items])


def export_parquet(items: Sequence[Item]) -> bytes:
    """Data Exports, CUR 2.0: tags are a map."""
    import pyarrow

    rows = [{**_columns(item), "resource_tags": list(_tag_map(item).items())} for item in items]
    return _parquet(rows, {"resource_tags": pyarrow.map_(pyarrow.string(), pyarrow.string())})


def export_csv(items: Sequence[Item]) -> bytes:
    """CUR 2.0: tags are JSON in one column."""
    rows = [
        {
            **_columns(item),
            "line_item_usage_start_date": f"{item.at:%Y-%m-%dT%H:%M:%S.000Z}",
            "line_item_usage_end_date": f"{item.at + timedelta(hours=1):%Y-%m-%dT%H:%M:%S.000Z}",
            "resource_tags": json.dumps(_tag_map(item)),
        }
        for item in items
    ]
    return gzip.compress(_csv(rows))


def _columns(item: Item) -> dict[str, Any]:
    return {
        "line_item_usage_start_date": item.at,
        "line_item_usage_end_date": item.at + timedelta(hours=1),
        "line_item_line_item_type": item.kind,
        "line_item_product_code": "AmazonEC2",
        "line_item_usage_type": item.usage,
        "line_item_currency_code": "USD",
        "line_item_unblended_cost": item.usd,
    }


def _flat_tags(item: Item) -> dict[str, Any]:
    return {
        "resource_tags_user_holdfast_run": item.run or None,
        "resource_tags_user_holdfast_store": item.store or None,
    }


def _tag_map(item: Item) -> dict[str, str]:
    tags = {"user_holdfast_run": item.run, "user_holdfast_store": item.store, "user_name": "x"}
    return {name: value for name, value in tags.items() if value}


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: Sequence[dict[str, Any]], kinds: dict[str, Any] | None = None) -> bytes:
    import pyarrow
    import pyarrow.parquet

    kinds = kinds or {}
    columns = {
        name: pyarrow.array([row[name] for row in rows], kinds.get(name))
        if name in kinds
        else pyarrow.array([row[name] for row in rows])
        for name in rows[0]
    }
    body = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), body, compression="snappy")
    return body.getvalue()


GCP_COLUMNS = {
    "service": "STRUCT(id VARCHAR, description VARCHAR)",
    "sku": "STRUCT(id VARCHAR, description VARCHAR)",
    "usage_start_time": "TIMESTAMPTZ",
    "usage_end_time": "TIMESTAMPTZ",
    "labels": "STRUCT(key VARCHAR, value VARCHAR)[]",
    "cost": "DOUBLE",
    "currency": "VARCHAR",
    "currency_conversion_rate": "DOUBLE",
    "credits": "STRUCT(name VARCHAR, amount DOUBLE, full_name VARCHAR, id VARCHAR, type VARCHAR)[]",
    "cost_type": "VARCHAR",
    "_PARTITIONTIME": "TIMESTAMPTZ",
}


def exported_row(
    run: str,
    store: str,
    sku: str,
    cost: float,
    at: datetime,
    *,
    credit: float = 0.0,
    rate: float = 1.0,
    cost_type: str = "regular",
) -> dict[str, Any]:
    """Of gcp_billing_export_v1: https://cloud.google.com/billing/docs/how-to/export-data-bigquery-tables/standard-usage"""
    labels = [{"key": "holdfast-machine", "value": "1"}, {"key": "holdfast-store", "value": store}]
    if run:
        labels.append({"key": "holdfast-run", "value": run})
    credits = [
        {"name": "Sustained use", "amount": credit, "full_name": "", "id": "s", "type": "SUSTAINED_USAGE_DISCOUNT"}
    ]
    return {
        "service": {"id": "6F81-5844-456A", "description": "Compute Engine"},
        "sku": {"id": "0000-0000-0000", "description": sku},
        "usage_start_time": at,
        "usage_end_time": at + timedelta(hours=1),
        "labels": labels,
        "cost": cost,
        "currency": "USD" if rate == 1 else "EUR",
        "currency_conversion_rate": rate,
        "credits": credits if credit else [],
        "cost_type": cost_type,
        "_PARTITIONTIME": (at + timedelta(hours=5)).replace(hour=0, minute=0, second=0, microsecond=0),
    }
