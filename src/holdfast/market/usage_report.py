"""AWS's bill by a Cost and Usage Report in S3: CSV or Parquet, of the old kind or of Data Exports (CUR 2.0).

https://docs.aws.amazon.com/cur/latest/userguide/table-dictionary-cur2.html
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from holdfast.errors import ConfigError
from holdfast.market.bills import RUN_TAG, STORE_TAG, Asked, Bill, Part, lines_of
from holdfast.storage import ObjectStore, open_store

USAGE = {"Usage", "DiscountedUsage", "SavingsPlanCoveredUsage", "SavingsPlanNegation"}
REDUCTIONS = {"Credit", "Refund", "EdpDiscount", "PrivateRateDiscount", "BundledDiscount"}
# USW2-SpotUsage:g5.xlarge, BoxUsage:c7i.large. Volumes, addresses and traffic have other words.
MACHINES = re.compile(r"(^|-)(BoxUsage|SpotUsage|DedicatedUsage|HostBoxUsage)(:|$)")
BATCH_ROWS = 65536
PERIODS = (
    re.compile(r"(?P<from>\d{8})-\d{8}/"),
    re.compile(r"BILLING_PERIOD=(?P<year>\d{4})-(?P<month>\d{1,2})/"),
    re.compile(r"year=(?P<year>\d{4})/month=(?P<month>\d{1,2})/"),
)
COLUMNS = {
    "usd": "line_item_unblended_cost",
    "type": "line_item_line_item_type",
    "usage": "line_item_usage_type",
    "product": "line_item_product_code",
    "start": "line_item_usage_start_date",
    "end": "line_item_usage_end_date",
    "currency": "line_item_currency_code",
}


def read_usage_report(url: str, session: Any, asked: Asked) -> Bill:
    """`url`: where the report's files lie, as of a store. Raises ConfigError, TransientError."""
    store = open_store(url, session)
    amounts: list[tuple[str, Part, float]] = []
    reaches = None
    keys = _data_keys(store, asked)
    if not keys:
        raise ConfigError(
            f"bill {url!r}: no report of {asked.start:%Y-%m} lies there; name the prefix that its export was given, and "
            "mind that the first comes within a day"
        )
    for key in keys:
        for row in _rows(key, store.get(key)):
            start = _time(row["start"])
            if row["store"] != asked.store or not row["run"] or not asked.start <= start < asked.end:
                continue
            if row["currency"] not in ("USD", "", None):
                raise ConfigError(f"bill {url!r}: {key} is in {row['currency']!r}, and the ledger is in USD")
            if row["type"] in USAGE:
                machine = row["product"] == "AmazonEC2" and MACHINES.search(row["usage"] or "")
                amounts.append((row["run"], "machines" if machine else "other", float(row["usd"] or 0)))
                end = _time(row["end"] or row["start"])
                reaches = max(reaches or end, end)
            elif row["type"] in REDUCTIONS:
                amounts.append((row["run"], "credits", float(row["usd"] or 0)))
    place = url.partition("?")[0]
    return Bill(cloud="aws", source=f"Cost and Usage Report {place}", lines=lines_of(amounts), reaches=reaches)


def _data_keys(store: ObjectStore, asked: Asked) -> list[str]:
    """Data files of the periods asked for. A manifest says which count where every delivery leaves new ones."""
    found = [info.key for info in store.list("") if _is_asked_for(info.key, asked)]
    manifests: dict[Any, str] = {}
    for key in sorted(found):
        if key.endswith("Manifest.json") and (period := _period(key)):
            # The one in the period's own folder is the newest; where there is none, deliveries are named by their time.
            newest = manifests.get(period[0], "")
            if not newest or "/" in _period(newest)[1]:  # type: ignore[index]
                manifests[period[0]] = key
    listed = {month: _files(json.loads(store.get(key))) for month, key in manifests.items()}

    def counts(key: str) -> bool:
        period = _period(key)
        names = listed.get(period[0]) if period else None
        return not names or any(name == key or name.endswith(f"/{key}") for name in names)

    return [key for key in sorted(found) if key.endswith((".parquet", ".csv", ".csv.gz")) and counts(key)]


def _files(manifest: dict[str, Any]) -> list[str]:
    return manifest.get("reportKeys") or manifest.get("dataFiles") or []


def _period(key: str) -> tuple[tuple[int, int], str] | None:
    """(year, month) that a key is of, and what follows in it."""
    for pattern in PERIODS:
        if found := pattern.search(key):
            if "from" in found.groupdict():
                return (int(found["from"][:4]), int(found["from"][4:6])), key[found.end() :]
            return (int(found["year"]), int(found["month"])), key[found.end() :]
    return None


def _is_asked_for(key: str, asked: Asked) -> bool:
    period = _period(key)
    if period is None:
        return True
    first, last = (asked.start.year, asked.start.month), (asked.end.year, asked.end.month)
    return first <= period[0] <= last


# -- rows -------------------------------------------------------------------------------------------------------------


def _rows(key: str, body: bytes) -> Iterator[dict[str, Any]]:
    """Of every line that carries a run's tag: the fields of COLUMNS, `run` and `store`."""
    for batch in _batches(key, body):
        names = {_plain(name): number for number, name in enumerate(batch.schema.names)}
        if missing := [name for name in COLUMNS.values() if name not in names and name != COLUMNS["currency"]]:
            raise ConfigError(
                f"{key}: has no column {missing[0]!r}; let the export have the columns of docs/reconciliation.md"
            )
        run = _tag(batch, names, RUN_TAG)
        store = _tag(batch, names, STORE_TAG)
        columns = {field: batch.column(names[name]) for field, name in COLUMNS.items() if name in names}
        for number, value in enumerate(run):
            if value:
                fields = {field: column[number].as_py() for field, column in columns.items()}
                yield {"currency": None, **fields, "run": value, "store": store[number]}


def _batches(key: str, body: bytes) -> Iterator[Any]:
    if key.endswith(".parquet"):
        import pyarrow.parquet

        yield from pyarrow.parquet.ParquetFile(io.BytesIO(body)).iter_batches(BATCH_ROWS)
        return
    import pyarrow
    import pyarrow.csv

    names = next(csv.reader(io.TextIOWrapper(_opened(key, body), "utf-8-sig")), [])
    as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    yield from pyarrow.csv.open_csv(_opened(key, body), convert_options=as_text)


def _opened(key: str, body: bytes) -> Any:
    return gzip.GzipFile(fileobj=io.BytesIO(body)) if key.endswith(".gz") else io.BytesIO(body)


def _plain(name: str) -> str:
    """`lineItem/UnblendedCost` and `line_item_unblended_cost` are one column, of the old kind's CSV and of the rest."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", words.lower())


def _tag(batch: Any, names: dict[str, int], tag: str) -> list[str]:
    """The tag's value in every row, empty where it has none."""
    wanted = f"user_{_plain(tag)}"
    if (number := names.get(f"resource_tags_{wanted}")) is not None:
        return [value or "" for value in batch.column(number).to_pylist()]
    number = names.get("resource_tags")
    if number is None:
        return [""] * batch.num_rows  # a report of a time when the tag was not activated has no column for it
    return [_of_map(value, wanted) for value in batch.column(number).to_pylist()]


def _of_map(value: Any, wanted: str) -> str:
    if not value:
        return ""
    pairs = json.loads(value).items() if isinstance(value, str) else value.items() if isinstance(value, dict) else value
    return next((str(held) for name, held in pairs if _plain(str(name)) == wanted and held), "")


def _time(value: Any) -> datetime:
    found = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    return found if found.tzinfo else found.replace(tzinfo=UTC)
