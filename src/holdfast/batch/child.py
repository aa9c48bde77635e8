"""The model's process: `python -m holdfast.batch.child`, started by the worker and by nobody else.

It imports the function, calls it on one batch after another in its main thread, and says in shared memory which records
it is at: a call that hangs or dies then tells the worker where. It knows no queue and no store, so it may be killed at
any instant, and no thread of the worker's takes the interpreter from the model.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import mmap
import os
import queue
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from holdfast.batch import records
from holdfast.batch.results import empty, to_parquet
from holdfast.batch.spec import BatchSpec, parse_spec
from holdfast.errors import ConfigError

CALL = struct.Struct("=qqqdq")
"""Number of the task, first and last + 1 place in the batch, when the call began (monotonic), again the number."""
TRACEBACK_CHARACTERS = 8000


class WrongCountError(Exception):
    """The function returned another number of results than it was given records."""


class Function:
    """The user's function, called the way it wants to be."""

    def __init__(self, function: str, setup: str) -> None:
        """Raises ConfigError, and whatever the module or the setup raises."""
        self._call = _find(function)
        if inspect.iscoroutinefunction(self._call):
            raise ConfigError(f"function {function} is async: give a plain one (it may call asyncio.run)")
        self._more: tuple[Any, ...] = ()
        if setup:
            made = _find(setup)()
            if _takes_two(self._call):
                self._more = (made,)

    def __call__(self, batch: list[Any]) -> list[Any]:
        count = len(batch)
        returned = self._call(batch, *self._more)
        try:
            results = list(returned)
        except TypeError:
            raise WrongCountError(
                f"the function returned {type(returned).__name__}, no list of {count} results"
            ) from None
        if len(results) != count:
            raise WrongCountError(f"the function returned {len(results)} results for {count} records")
        return results


def _find(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{name}: module {module} has no {part!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{name} is {type(found).__name__}, which can't be called")
    return found  # type: ignore[no-any-return]


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    places = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return len(places) >= 2 or any(one.kind == one.VAR_POSITIONAL for one in parameters)


class Batch:
    """One piece of a batch on its way through the function."""

    def __init__(self, spec: BatchSpec, data: bytes, start: int, stop: int, mark: Callable[[int, int], None]) -> None:
        self._spec, self._data, self._mark = spec, data, mark
        self._first = start
        self._records = records.parse(spec, data, start, stop)
        self._fresh = True
        good = [
            place
            for place, one in enumerate(self._records, start)
            if not isinstance(one, records.Broken | records.Blank)
        ]
        self._good = good
        self.failed: list[tuple[int, bytes]] = []
        self.rows: list[tuple[int, Any, Any]] = []
        self.calls = 0
        for place, one in enumerate(self._records, start):
            if isinstance(one, records.Broken):
                self.failed.append((place, records.failed_row(spec, place, one, one.error)))
            elif isinstance(one, records.Blank):
                self.failed.append((place, records.failed_row(spec, place, one, "")))

    def infer(self, function: Function, encoded: bool) -> None:
        if self._good:
            self._infer(function, self._good, encoded)

    def _infer(self, function: Function, places: list[int], encoded: bool) -> None:
        given = self._take(places)
        keys = [records.key_of(record) for record in given]
        self._mark(places[0], places[-1] + 1)
        self.calls += 1
        failure: BaseException | None = None
        try:
            results = function(given)
        except (Exception, SystemExit) as error:
            failure = error
        if failure is not None and len(places) == 1:
            self._fail(places[0], failure)
            return
        if failure is not None:  # not within the handler: a record's traceback is to show its own error alone
            middle = len(places) // 2
            self._infer(function, places[:middle], encoded)
            self._infer(function, places[middle:], encoded)
            return
        for place, key, result in zip(places, keys, results, strict=True):
            number = self._spec.first_record + place
            if not encoded:
                self.rows.append((number, key, result))
                continue
            try:
                self.rows.append((number, None, records.result_row(number, key, result)))
            except (TypeError, ValueError, RecursionError) as error:
                self._fail(place, error)

    def _take(self, places: Sequence[int]) -> list[Any]:
        """The function may change what it is given: the first call has the records, every other one fresh ones."""
        first = self._first
        if self._fresh:
            self._fresh = False
            return [self._records[place - first] for place in places]
        fresh = records.parse(self._spec, self._data, places[0], places[-1] + 1)
        return [fresh[place - places[0]] for place in places]

    def _fail(self, place: int, error: BaseException) -> None:
        said = "".join(traceback.format_exception(error))[-TRACEBACK_CHARACTERS:]
        record = records.parse(self._spec, self._data, place, place + 1)[0]
        self.failed.append(
            (place, records.failed_row(self._spec, place, record, f"{type(error).__name__}: {error}", said))
        )


def main() -> None:
    function_name, setup_name, results_format, receive, send, shared = sys.argv[1:7]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the machine's agent signals the group; the worker decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    for number in (receive, send, shared):
        os.set_inheritable(int(number), False)
    tasks = Connection(int(receive), writable=False)
    answers = Connection(int(send), readable=False)
    memory = mmap.mmap(int(shared), mmap.PAGESIZE)
    sys.path.insert(0, os.getcwd())
    try:
        function = Function(function_name, setup_name)
        if results_format == "parquet":
            empty("parquet")
    except BaseException:
        answers.send(("unusable", traceback.format_exc()))
        raise SystemExit(1) from None
    answers.send(("ready",))
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(tasks, waiting), daemon=True).start()
    while (task := waiting.get()) is not None:
        number, body, data, pieces = task
        spec = parse_spec(body)
        for start, stop in pieces:
            answers.send(_piece(function, results_format, memory, number, spec, data, start, stop))


def _piece(
    function: Function,
    results_format: str,
    memory: mmap.mmap,
    number: int,
    spec: BatchSpec,
    data: bytes,
    start: int,
    stop: int,
) -> tuple[Any, ...]:
    def mark(first: int, end: int) -> None:
        CALL.pack_into(memory, 0, number, first, end, time.monotonic(), number)

    began = time.monotonic()
    encoded = results_format == "jsonl"
    mark(start, stop)
    try:
        batch = Batch(spec, data, start, stop, mark)
        batch.infer(function, encoded)
        if encoded:
            batch.rows.sort(key=lambda row: row[0])
            result = b"".join(row + b"\n" for _, _, row in batch.rows)
        else:
            result = to_parquet(batch.rows)
    except ConfigError as error:  # results that fit no column
        return "unusable", str(error)
    except ValueError as error:  # another number of lines than planned
        rows = [(place, records.failed_row(spec, place, None, str(error))) for place in range(start, stop)]
        return "piece", number, start, stop, empty(results_format), rows, 0, 0.0
    finally:
        CALL.pack_into(memory, 0, 0, 0, 0, 0.0, 0)
    return "piece", number, start, stop, result, batch.failed, len(batch.rows), time.monotonic() - began


def _receive(tasks: Connection, waiting: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            waiting.put(tasks.recv())
    except (EOFError, OSError):
        waiting.put(None)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == 1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
