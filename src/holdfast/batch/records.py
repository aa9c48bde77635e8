"""Records out of a batch's bytes, and rows of results and failures into JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from holdfast.batch.spec import BatchSpec

try:  # ten times as fast with lists of floats, which embeddings are
    import orjson
except ImportError:  # the machine's image may not have it; the rows are the same
    orjson = None  # type: ignore[assignment]

KEYS = ("id", "key")
"""Of the fields of a record, the first that there is names it in the results."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A line that is no record."""

    error: str
    text: str


@dataclass(frozen=True, slots=True)
class Blank:
    """A line of a JSONL file with nothing on it: no record, and no fault."""


BLANK = Blank()


def parse(spec: BatchSpec, data: bytes, start: int = 0, stop: int | None = None) -> list[Any]:
    """The records at places `start` to `stop` of the batch, in order; Broken and Blank stand in for those that are none.

    Parsed anew at every call: a function may change the records it is given. Raises ValueError when the batch has
    another number of lines than the plan says.
    """
    stop = spec.records if stop is None else stop
    if spec.format == "parquet":
        import pyarrow

        table = pyarrow.ipc.open_stream(io.BytesIO(data)).read_all()
        _check_count(spec, table.num_rows)
        return table.slice(start, stop - start).to_pylist()
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    _check_count(spec, len(lines))
    if spec.start == 0 and lines and lines[0].startswith(b"\xef\xbb\xbf"):
        lines[0] = lines[0][3:]
    one = _json_line if spec.format == "jsonl" else _text_line
    return [one(line) for line in lines[start:stop]]


def _check_count(spec: BatchSpec, found: int) -> None:
    if found != spec.records:
        raise ValueError(
            f"{spec.source}: {found} records where the plan counted {spec.records}; it was changed, plan anew"
        )


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.strip():
            return BLANK
        return Broken(f"{type(error).__name__}: no JSON: {error}", line.decode(errors="replace"))


def _text_line(line: bytes) -> Any:
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        return Broken(f"UnicodeDecodeError: no UTF-8: {error}", line.decode(errors="replace"))


def key_of(record: Any) -> Any:
    """None: it has none. Its number is its name then."""
    if isinstance(record, dict):
        for name in KEYS:
            if name in record:
                return record[name]
    return None


def encode(value: Any) -> bytes:
    """One line of JSON. Arrays and tensors become lists; numbers that are none (NaN, infinity) become null.

    Raises TypeError or ValueError for what JSON has no word for.
    """
    if orjson is not None:
        try:
            return orjson.dumps(value, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
        except TypeError:  # integers beyond 64 bits, keys that are no text: the slower encoder knows more
            pass
    try:
        return json.dumps(value, default=_plain, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()
    except ValueError:
        return json.dumps(
            _finite(value), default=_plain, allow_nan=False, ensure_ascii=False, separators=(",", ":")
        ).encode()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    raise TypeError(f"a result of type {type(value).__name__} is no JSON: return numbers, text, lists or dicts")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return value


def result_row(number: int, key: Any, result: Any) -> bytes:
    return encode({"record": number, "key": key, "result": result})


def failed_row(spec: BatchSpec, place: int, record: Any, error: str, traceback: str = "") -> bytes:
    """`place`: in the batch. A blank line has a row too, which says that it is no failure."""
    row: dict[str, Any] = {"record": spec.first_record + place}
    where = {"source": spec.source, "line": spec.first_line + place}
    if isinstance(record, Blank):
        return encode({**row, "blank": True, **where})
    text = isinstance(record, Broken)
    row |= {"key": None if text else key_of(record), "error": error, **where, "traceback": traceback}
    shown = record.text if text else record
    try:
        return encode({**row, "input": shown})
    except (TypeError, ValueError):  # Parquet has types that JSON has not
        return encode({**row, "input": repr(shown)})


def lost_rows(spec: BatchSpec, error: str) -> Iterable[bytes]:
    """Rows for all records of a batch whose input can't be read."""
    return (failed_row(spec, place, None, error) for place in range(spec.records))


def numbers(lines: bytes) -> Iterator[int]:
    """The record's number of every row, as `result_row` and `failed_row` begin them."""
    for line in lines.splitlines():
        head, _, _ = line[10:40].partition(b",")
        yield int(head)
