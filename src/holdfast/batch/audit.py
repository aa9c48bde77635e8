"""The proof at the end: the plan and the results read back, record by record, a thousand batches at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from holdfast.batch import records, results
from holdfast.batch.plan import read_plan
from holdfast.batch.spec import BatchSpec
from holdfast.errors import ConfigError, NotFoundError
from holdfast.storage.protocol import ObjectStore


@dataclass(slots=True, kw_only=True)
class Audit:
    """Counted from the objects themselves. Whole when nothing is missing, double, out of order or foreign."""

    batches: int = 0
    records_in: int = 0
    records_out: int = 0
    records_failed: int = 0
    blank: int = 0
    """Lines of JSONL files with nothing on them."""
    missing: int = 0
    duplicates: int = 0
    out_of_order: int = 0
    foreign: int = 0
    """Result objects that are no batch's of the plan."""
    missing_batches: list[str] = field(default_factory=list)
    """The first hundred."""

    @property
    def whole(self) -> bool:
        return not (self.missing or self.duplicates or self.out_of_order or self.foreign)


def audit(store: ObjectStore, prefix: str) -> Audit:
    """Raises ConfigError without a plan, TransientError when the store can't be read."""
    counted = Audit()
    for _ in _checked(store, prefix, counted):
        pass
    return counted


def finish(store: ObjectStore, prefix: str) -> Audit:
    """The audit, and in the same pass PREFIX/manifest.json (the parts of the dataset) and PREFIX/failed.jsonl.

    Both are streamed, and replaced when they are there. Results of batches that are missing are not listed.
    """
    counted = Audit()
    store.put(f"{prefix}/manifest.json", _manifest(store, prefix, counted))
    failed = _failed_rows(store, prefix) if counted.records_failed else iter([b""])
    store.put(f"{prefix}/failed.jsonl", failed)
    return counted


def _manifest(store: ObjectStore, prefix: str, counted: Audit) -> Iterator[bytes]:
    plan = read_plan(store, prefix)
    yield b'{"kind": "holdfast-batch-results", "version": 1, "parts": ['
    comma = b"\n"
    for part in _checked(store, prefix, counted):
        yield (
            comma
            + json.dumps({name: part[name] for name in ("key", "bytes", "first_record", "records", "failed")}).encode()
        )
        comma = b",\n"
    words: dict[str, Any] = {
        "audit": {**asdict(counted), "whole": counted.whole},
        "plan": {**asdict(plan), "parts": None},
    }
    yield b"\n], " + json.dumps(words).removeprefix("{").encode() + b"\n"


def _failed_rows(store: ObjectStore, prefix: str) -> Iterator[bytes]:
    for part in _checked(store, prefix, Audit()):
        if part["failed"]:
            rows = store.get(part["failed_key"]).splitlines(keepends=True)
            yield b"".join(row for row in rows if b'"blank":true' not in row[:60])


def _checked(store: ObjectStore, prefix: str, counted: Audit) -> Iterator[dict[str, Any]]:
    """Counts into `counted`; the parts of the dataset, in order."""
    for specs, found in results.by_group(store, prefix):
        for spec in specs:
            counted.batches += 1
            counted.records_in += spec.records
            names = [name for name in (f"{spec.name}.jsonl", f"{spec.name}.parquet") if name in found]
            if not names:
                counted.missing += spec.records
                if len(counted.missing_batches) < 100:
                    counted.missing_batches.append(spec.name)
                continue
            sizes = [found.pop(name) for name in names]
            for name in names[1:]:
                counted.duplicates += len(_read(store, f"{prefix}/results/{name}"))
            key = f"{prefix}/results/{names[0]}"
            numbers = _read(store, key)
            part = {
                "key": key,
                "bytes": sizes[0],
                "first_record": spec.first_record,
                "records": len(numbers),
                "failed": 0,
            }
            _count(store, prefix, spec, numbers, counted, part)
            yield part
        counted.foreign += len(found)


def _read(store: ObjectStore, key: str) -> list[int]:
    try:
        return results.numbers_in(key.rpartition(".")[2], store.get(key))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{key} in {store.url} is no result of a batch: {error}; delete it and do its batch again"
        ) from error


def _count(
    store: ObjectStore, prefix: str, spec: BatchSpec, numbers: list[int], counted: Audit, part: dict[str, Any]
) -> None:
    expected = range(spec.first_record, spec.first_record + spec.records)
    counted.records_out += len(numbers)
    if len(numbers) == spec.records and numbers == list(expected):
        return
    distinct = set(numbers)
    counted.duplicates += len(numbers) - len(distinct & set(expected))
    counted.out_of_order += sum(later < earlier for earlier, later in pairwise(numbers))
    rest = [number for number in expected if number not in distinct]
    if not rest:
        return
    failed_key = results.failed_key(prefix, spec, [number - spec.first_record for number in rest])
    lines: list[bytes] = []
    with contextlib.suppress(NotFoundError):
        lines = store.get(failed_key).splitlines()
    told = [number for line in lines for number in records.numbers(line)]
    blank = sum(b'"blank":true' in line[:60] for line in lines)
    counted.blank += blank
    counted.records_failed += len(told) - blank
    counted.missing += len(set(rest) - set(told))
    part |= {"failed": len(told) - blank, "failed_key": failed_key}
