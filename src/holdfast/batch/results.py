"""What workers leave in the store: one result object for each batch, created once and never changed.

A batch with failed records has a second object, written first, whose name is made of which records failed. Two workers
may disagree about that; the result that exists says which of their two objects counts, for it holds exactly the other
records. So one conditional create decides about both.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Literal

from holdfast.batch import records
from holdfast.batch.plan import batches
from holdfast.batch.spec import GROUP, BatchSpec, parse_spec
from holdfast.errors import AlreadyExistsError, ConfigError, NotFoundError
from holdfast.storage.protocol import ObjectStore

ResultFormat = Literal["jsonl", "parquet"]


def result_key(prefix: str, spec: BatchSpec, format: str) -> str:
    return f"{prefix}/results/{spec.name}.{format}"


def failed_key(prefix: str, spec: BatchSpec, places: Sequence[int]) -> str:
    """`places`: in the batch, of the records without a result, ascending."""
    digest = hashlib.blake2b(repr(list(places)).encode(), digest_size=6).hexdigest()
    return f"{prefix}/failed/{spec.name}-{digest}.jsonl"


def exists(store: ObjectStore, prefix: str, spec: BatchSpec, format: str) -> bool:
    try:
        store.get_range(result_key(prefix, spec, format), 0, 0)
    except NotFoundError:
        return False
    return True


def publish(
    store: ObjectStore, prefix: str, spec: BatchSpec, format: str, result: bytes, failed: Sequence[tuple[int, bytes]]
) -> bool:
    """Create the batch's result; `failed`: (place, row) of every record that has none. False: another worker was first."""
    if failed:
        ordered = sorted(failed)
        key = failed_key(prefix, spec, [place for place, _ in ordered])
        with contextlib.suppress(AlreadyExistsError):  # another's, with the same records
            store.create(key, b"\n".join(row for _, row in ordered) + b"\n")
    try:
        store.create(result_key(prefix, spec, format), result)
    except AlreadyExistsError:
        return False
    return True


def give_up(store: ObjectStore, prefix: str, body: bytes, reason: str, format: str = "jsonl") -> bool:
    """All records of the batch to the dead letters. False: it has a result after all."""
    spec = parse_spec(body)
    rows = list(enumerate(records.lost_rows(spec, reason)))
    return publish(store, prefix, spec, format, empty(format), rows)


def undone(store: ObjectStore, prefix: str, format: str = "jsonl") -> Iterator[BatchSpec]:
    """Batches without a result, in order."""
    for specs, found in by_group(store, prefix):
        yield from (spec for spec in specs if f"{spec.name}.{format}" not in found)


def by_group(store: ObjectStore, prefix: str) -> Iterator[tuple[list[BatchSpec], dict[str, int]]]:
    """A thousand batches at a time, with the names of the results below them and their bytes."""
    place = f"{prefix}/results/"
    for number, specs in groupby(batches(store, prefix), key=lambda spec: spec.index // GROUP):
        found = {info.key[len(place) :]: info.size_bytes for info in store.list(f"{place}{number:05d}/")}
        yield list(specs), found


# -- one batch's rows as one object ---------------------------------------------------------------------------------------


def empty(format: str) -> bytes:
    return b"" if format == "jsonl" else to_parquet([])


def joined(format: str, pieces: Sequence[bytes]) -> bytes:
    """Objects of the pieces of a batch, in order, as one."""
    if format == "jsonl" or len(pieces) == 1:
        return b"".join(pieces)
    import pyarrow
    from pyarrow import parquet

    tables = [parquet.read_table(io.BytesIO(piece)) for piece in pieces]
    try:
        table = pyarrow.concat_tables(
            [one for one in tables if one.num_rows] or tables[:1], promote_options="permissive"
        )
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ConfigError(f"results of one batch are of several types: {error}; use results_format: jsonl") from error
    return _parquet_bytes(table)


def to_parquet(rows: Sequence[tuple[int, Any, Any]]) -> bytes:
    """(number, key, result) as a Parquet file: columns record, key (text) and result. Raises ConfigError.

    A result that is a dict becomes a struct, a list or an array a list.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(f"results_format parquet needs pyarrow: pip install 'holdfast[batch]' ({error})") from error
    columns = {
        "record": pyarrow.array([number for number, _, _ in rows], pyarrow.int64()),
        "key": pyarrow.array([_text(key) for _, key, _ in rows], pyarrow.string()),
    }
    if rows:
        try:
            values = [result.tolist() if hasattr(result, "tolist") else result for _, _, result in rows]
            columns["result"] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError) as error:
            raise ConfigError(
                f"results of one batch do not fit one column: {error}; use results_format: jsonl"
            ) from error
    return _parquet_bytes(pyarrow.table(columns))


def _text(key: Any) -> str | None:
    return key if key is None or isinstance(key, str) else records.encode(key).decode()


def _parquet_bytes(table: Any) -> bytes:
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def numbers_in(format: str, data: bytes) -> list[int]:
    """The numbers of the records in a result object, in its order."""
    if format == "jsonl":
        return list(records.numbers(data))
    from pyarrow import parquet

    return parquet.read_table(io.BytesIO(data), columns=["record"]).column("record").to_pylist()
