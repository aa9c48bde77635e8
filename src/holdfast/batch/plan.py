"""The plan: inputs cut into batches, in one pass and in constant memory.

Parts are written first, under a name of their planner's own; the manifest that names them is created conditionally, so of
two planners at once one's plan holds for both. What a plan is of (inputs, batch size, format) is in its manifest: a second
job in the same place is refused.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.batch.sources import Reader, Source, SourceChangedError, find_sources
from holdfast.batch.spec import BatchSpec, batch_id, parse_spec, spec_body
from holdfast.errors import AlreadyExistsError, ConfigError, NotFoundError
from holdfast.storage.protocol import ObjectStore

CHUNK_BYTES = 8 * 1024 * 1024
READ_AHEAD = 3
PART_BATCHES = 10_000
LEAP_SHARE = 0.93


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    batches: int
    records: int
    input_bytes: int
    sources: int
    empty_sources: tuple[str, ...]
    """Files without a record; the first hundred."""
    batch_size: int
    parts: tuple[str, ...]
    """Keys, in order."""


def manifest_key(prefix: str) -> str:
    return f"{prefix}/plan/manifest.json"


def make_plan(
    store: ObjectStore,
    prefix: str,
    inputs: Sequence[str],
    batch_size: int = 100,
    format: str = "auto",
    credentials: Any = None,
) -> PlanSummary:
    """Cut `inputs` into batches of `batch_size` records; a batch never spans files or row groups.

    A plan that is there already is taken as it is. `credentials`: of inputs in the cloud, as `open_store` takes them.
    Raises ConfigError: no input, one that has no records at all, a format that is unknown; a prefix that has another
    job's plan, or results without a plan.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size {batch_size}: at least 1")
    request = {"inputs": list(inputs), "batch_size": batch_size, "format": format}
    there = _existing(store, prefix, request)
    if there:
        return there
    if store.list(f"{prefix}/results/"):
        raise ConfigError(f"{store.url}/{prefix} has results and no plan: they are another job's; use another place")
    planner = _Planner(store, prefix, batch_size)
    for source in find_sources(inputs, format, credentials):
        planner.add(source, credentials)
    summary = planner.finish()
    if not summary.records:
        raise ConfigError(f"the inputs {', '.join(inputs)} have no records: {summary.sources} files, all of them empty")
    try:
        store.create(manifest_key(prefix), json.dumps({"request": request, **asdict(summary)}, indent=1).encode())
    except AlreadyExistsError:  # another planner was faster; ours is litter
        for part in summary.parts:
            store.delete(part)
        there = _existing(store, prefix, request)
        assert there
        return there
    return summary


def _existing(store: ObjectStore, prefix: str, request: dict[str, Any]) -> PlanSummary | None:
    try:
        content = json.loads(store.get(manifest_key(prefix)))
    except NotFoundError:
        return None
    theirs = content.pop("request")
    if theirs != request:
        differs = next(name for name in request if theirs.get(name) != request[name])
        raise ConfigError(
            f"{store.url}/{prefix} is another job's: its {differs} is {theirs.get(differs)!r}, this job's "
            f"{request[differs]!r}; use another run id or place"
        )
    return _summary(content)


def read_plan(store: ObjectStore, prefix: str) -> PlanSummary:
    """Raises ConfigError when there is none."""
    try:
        content = json.loads(store.get(manifest_key(prefix)))
    except NotFoundError:
        raise ConfigError(f"{store.url}/{prefix} has no plan; make one first") from None
    content.pop("request")
    return _summary(content)


def _summary(content: dict[str, Any]) -> PlanSummary:
    lists = {"empty_sources": tuple(content["empty_sources"]), "parts": tuple(content["parts"])}
    return PlanSummary(**{**content, **lists})


def bodies(store: ObjectStore, prefix: str) -> Iterator[bytes]:
    """Every batch as it goes into the queue, in order. One part is in memory."""
    for part in read_plan(store, prefix).parts:
        yield from store.get(part).splitlines()


def batches(store: ObjectStore, prefix: str) -> Iterator[BatchSpec]:
    """Every batch, in order."""
    return map(parse_spec, bodies(store, prefix))


class _Planner:
    def __init__(self, store: ObjectStore, prefix: str, batch_size: int) -> None:
        self._store, self._batch_size = store, batch_size
        self._place = f"{prefix}/plan/{secrets.token_hex(4)}"
        self._lines: list[bytes] = []
        self._parts: list[str] = []
        self._batches = self._records = self._bytes = self._sources = 0
        self._empty: list[str] = []

    def add(self, source: Source, credentials: Any) -> None:
        self._sources += 1
        self._bytes += source.size_bytes
        before = self._records
        reader = Reader(credentials)
        try:
            if source.format == "parquet":
                ranges = row_ranges(reader, source, self._batch_size)
            else:
                ranges = line_ranges(_chunks(reader, source), self._batch_size)
            name, version, line = json.dumps(source.url), json.dumps(source.version), 1
            for row_group, start, stop, records in ranges:
                body = spec_body(
                    source=name,
                    version=version,
                    source_bytes=source.size_bytes,
                    format=source.format,
                    index=self._batches,
                    start=start,
                    stop=stop,
                    row_group=row_group,
                    first_record=self._records,
                    first_line=line,
                    records=records,
                    batch_id=batch_id(source.url, source.version, source.format, row_group, start, stop),
                )
                self._lines.append(body)
                self._batches += 1
                self._records += records
                line += records
                if len(self._lines) >= PART_BATCHES:
                    self._write_part()
        except SourceChangedError as error:
            raise ConfigError(f"while it was planned: {error}") from error
        if self._records == before and len(self._empty) < 100:
            self._empty.append(source.url)

    def finish(self) -> PlanSummary:
        if self._lines:
            self._write_part()
        return PlanSummary(
            batches=self._batches,
            records=self._records,
            input_bytes=self._bytes,
            sources=self._sources,
            empty_sources=tuple(self._empty),
            batch_size=self._batch_size,
            parts=tuple(self._parts),
        )

    def _write_part(self) -> None:
        key = f"{self._place}/{len(self._parts) + 1:05d}.jsonl"
        self._store.put(key, b"\n".join(self._lines) + b"\n")
        self._parts.append(key)
        self._lines = []


def _chunks(reader: Reader, source: Source) -> Iterator[bytes]:
    """The source from its beginning; the next pieces are on their way while one is looked at."""
    starts = iter(range(0, source.size_bytes, CHUNK_BYTES))
    if source.size_bytes <= CHUNK_BYTES:
        yield from (reader.range(source.url, source.version, start, source.size_bytes) for start in starts)
        return

    def read(start: int) -> bytes:
        return reader.range(source.url, source.version, start, min(start + CHUNK_BYTES, source.size_bytes))

    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="plan-read") as pool:
        coming = deque(pool.submit(read, start) for _, start in zip(range(READ_AHEAD), starts, strict=False))
        while coming:
            yield coming.popleft().result()
            for start in starts:
                coming.append(pool.submit(read, start))
                break


def line_ranges(chunks: Iterable[bytes], batch_size: int) -> Iterator[tuple[int, int, int, int]]:
    """(-1, start, stop, lines) of every batch: byte ranges that end with a line."""
    begin = position = lines = 0
    leap = 0  # most of a batch, by the last one's length: to count lines is three times as fast as to find them
    last = b"\n"
    for chunk in chunks:
        at, find = 0, chunk.find
        while True:
            if leap and not lines and (found := chunk.count(b"\n", at, at + leap)) < batch_size:
                at, lines = min(at + leap, len(chunk)), found
            for _ in range(batch_size - lines):
                end = find(b"\n", at)
                if end < 0:
                    break
                at = end + 1
                lines += 1
            else:
                yield -1, begin, position + at, lines
                leap = int(LEAP_SHARE * (position + at - begin))
                begin, lines = position + at, 0
                continue
            break
        position += len(chunk)
        last = chunk[-1:]
    if position > begin:
        yield -1, begin, position, lines + (last != b"\n")


def row_ranges(reader: Reader, source: Source, batch_size: int) -> Iterator[tuple[int, int, int, int]]:
    """(row group, first row, last row + 1, rows): from the footer alone."""
    if not source.size_bytes:
        return
    metadata = reader.open_parquet(source.url, source.version, source.size_bytes).metadata
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        for start in range(0, rows, batch_size):
            stop = min(start + batch_size, rows)
            yield group, start, stop, stop - start
