"""The program's output: shipped in chunks, rotated, and its last lines remembered."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from holdfast.runtime import logs
from holdfast.runtime.logs import CHUNK_BYTES, LogShipper
from holdfast.storage import DirectoryStore, ObjectStore
from tests.unit.failing_store import FailingStore, unreachable

PREFIX = "runs/a/attempts/0001/logs/"


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


@pytest.fixture
def pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as source, os.fdopen(writer, "wb", buffering=0) as sink:
        yield source, sink


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "timed out"
        time.sleep(0.005)


def shipped(store: ObjectStore) -> bytes:
    return b"".join(store.get(info.key) for info in store.list(PREFIX))


def printing(program: str) -> BinaryIO:
    process = subprocess.Popen([sys.executable, "-uc", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout
    return process.stdout


def test_everything_a_program_prints_is_in_the_store_in_order(store: DirectoryStore) -> None:
    shipper = LogShipper(
        printing("import sys\nfor n in range(100_000): print('line', n)\nprint('end', file=sys.stderr)"), store, PREFIX
    )
    shipper.finish(20)
    text = "".join(f"line {number}\n" for number in range(100_000)) + "end\n"
    assert shipped(store).decode() == text
    keys = [info.key for info in store.list(PREFIX)]
    assert keys == [f"{PREFIX}{number:06d}.txt" for number in range(1, len(text) // CHUNK_BYTES + 2)]
    assert max(info.size_bytes for info in store.list(PREFIX)) == CHUNK_BYTES


def test_lines_can_be_read_while_the_program_runs(
    store: DirectoryStore, pipe: tuple[BinaryIO, BinaryIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SHIP_SECONDS", 0.0)
    source, sink = pipe
    shipper = LogShipper(source, store, PREFIX)
    for line, there in ((b"one\n", b"one\n"), (b"two\n", b"one\ntwo\n")):
        sink.write(line)
        wait_until(lambda: shipper.tail().endswith(line.decode().strip()))  # noqa: B023
        shipper.ship()
        assert shipped(store) == there
    shipper.ship()  # nothing new: no empty object
    assert len(store.list(PREFIX)) == 1


def test_asking_often_sends_seldom_and_the_number_of_objects_does_not_grow_with_time(
    store: DirectoryStore, pipe: tuple[BinaryIO, BinaryIO]
) -> None:
    source, sink = pipe
    told = FailingStore(store)
    shipper = LogShipper(source, told, PREFIX)
    for number in range(50):
        sink.write(b"line %d\n" % number)
        wait_until(lambda: shipper.tail().endswith(f"line {number}"))  # noqa: B023
        shipper.ship()
    assert len(told.calls) == 1  # the first line at once, the others when it is time
    shipper.ship_all()
    shipper.ship_all()
    assert len(told.calls) == 2
    assert shipped(store) == b"".join(b"line %d\n" % number for number in range(50))
    assert len(store.list(PREFIX)) == 1


def test_a_whole_chunk_does_not_wait(store: DirectoryStore, pipe: tuple[BinaryIO, BinaryIO]) -> None:
    source, sink = pipe
    shipper = LogShipper(source, store, PREFIX)
    sink.write(b"first\n")
    wait_until(shipper.tail)
    shipper.ship()
    sink.write(b"x" * CHUNK_BYTES + b"\nafter")
    wait_until(lambda: shipper.tail().endswith("after"))
    shipper.ship()
    assert shipped(store) == b"first\n" + b"x" * CHUNK_BYTES + b"\nafter"
    assert [info.size_bytes for info in store.list(PREFIX)] == [CHUNK_BYTES, len(b"first\n\nafter")]


def test_the_last_50_lines_are_remembered(store: DirectoryStore) -> None:
    shipper = LogShipper(printing("for n in range(1, 201): print('line', n)"), store, PREFIX)
    shipper.finish(20)
    assert shipper.tail().splitlines() == [f"line {number}" for number in range(151, 201)]


def test_one_endless_line_of_bytes_that_are_no_text_is_remembered_in_part(store: DirectoryStore) -> None:
    shipper = LogShipper(
        printing("import sys; sys.stdout.buffer.write(b'\\xff' * 100_000 + b'the end')"), store, PREFIX
    )
    shipper.finish(20)
    assert shipper.tail().endswith("the end")
    assert len(shipper.tail()) == logs.TAIL_BYTES


def test_only_the_newest_logs_are_kept(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEEP_BYTES", 4 * CHUNK_BYTES)
    shipper = LogShipper(printing(f"print('x' * {3 * CHUNK_BYTES})\nprint('y' * {3 * CHUNK_BYTES - 2})"), store, PREFIX)
    for _ in range(2):
        shipper.finish(20)
    sizes = [info.size_bytes for info in store.list(PREFIX)]
    assert sum(sizes) <= 5 * CHUNK_BYTES  # and the one that grows
    assert shipped(store).endswith(b"y\n")
    assert shipped(store).count(b"y") == 3 * CHUNK_BYTES - 2


def test_what_the_store_did_not_take_is_sent_again_in_order(store: DirectoryStore) -> None:
    failing = FailingStore(store, at=[1, 2, 4], fail=unreachable)
    shipper = LogShipper(printing(f"print('a' * {CHUNK_BYTES} + 'b' * 10)"), failing, PREFIX)
    shipper.finish(20)
    for calls, kept in ((2, 0), (4, 1), (5, 2)):
        shipper.ship()
        assert (len(failing.calls), len(store.list(PREFIX))) == (calls, kept)
    assert shipped(store) == b"a" * CHUNK_BYTES + b"b" * 10 + b"\n"


def test_a_store_that_is_down_for_long_costs_the_oldest_lines_not_the_memory(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "KEEP_BYTES", 2 * CHUNK_BYTES)
    failing = FailingStore(store, at=[1], fail=unreachable)
    shipper = LogShipper(printing(f"print('x' * {5 * CHUNK_BYTES})\nprint('the end')"), failing, PREFIX)
    shipper.finish(20)
    shipper.ship()
    assert shipped(store).endswith(b"x\nthe end\n")
    assert len(shipped(store)) == 2 * CHUNK_BYTES


def test_a_daemon_that_holds_the_pipe_open_does_not_hold_the_end_up(
    store: DirectoryStore, pipe: tuple[BinaryIO, BinaryIO]
) -> None:
    source, sink = pipe
    shipper = LogShipper(source, store, PREFIX)
    sink.write(b"said before it left\n")
    wait_until(shipper.tail)
    shipper.finish(0.05)
    assert shipped(store) == b"said before it left\n"
