"""Large objects past the page cache: whatever the pieces are, the file holds their bytes."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.storage.direct_io import BLOCK_BYTES, STAGED_BYTES, huge_buffer, read_direct, write_chunks
from holdfast.storage.protocol import Data

KINDS = ("bytes", "bytearray", "snapshot", "crooked view")
SIZES = (1, BLOCK_BYTES, 300 * BLOCK_BYTES, 300 * BLOCK_BYTES + 1, STAGED_BYTES, STAGED_BYTES + BLOCK_BYTES)


def chunk(kind: str, size: int, seed: int) -> Data:
    content = (seed.to_bytes(4, "little") * (size // 4 + 1))[:size]
    if kind == "bytes":
        return content
    if kind == "bytearray":
        return bytearray(content)
    memory = mmap.mmap(-1, size + 8)
    begin = 0 if kind == "snapshot" else 8
    memory[begin : begin + size] = content
    return memoryview(memory)[begin : begin + size]


def write(chunks: list[Data]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "object")
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            assert write_chunks(file, iter(chunks)) == sum(memoryview(one).nbytes for one in chunks)
        finally:
            os.close(file)
        return path.read_bytes()


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(SIZES)), max_size=7))
@settings(max_examples=40, deadline=None)
def test_a_file_holds_what_was_written_whatever_the_pieces_are(pieces: list[tuple[str, int]]) -> None:
    chunks = [chunk(kind, size, seed) for seed, (kind, size) in enumerate(pieces, start=1)]
    assert write(chunks) == b"".join(chunks)


def test_a_small_piece_between_large_ones_is_no_hindrance() -> None:
    chunks = [chunk("bytes", size, seed) for seed, size in enumerate((3 * STAGED_BYTES, BLOCK_BYTES, STAGED_BYTES))]
    assert write(chunks) == b"".join(chunks)


def test_after_a_failure_nothing_more_is_written() -> None:
    """What has been made waits in a line for the disk, here a pipe that takes a first piece late."""
    size = 2 * 1024 * 1024
    outlet, inlet = os.pipe()
    drained = bytearray()

    def drain() -> None:
        time.sleep(0.3)
        while data := os.read(outlet, size):
            drained.extend(data)

    reader = threading.Thread(target=drain)

    def source() -> Iterator[Data]:
        yield from (chunk("snapshot", size, seed) for seed in range(8))
        reader.start()
        raise FileNotFoundError("the snapshot is gone")

    with pytest.raises(FileNotFoundError, match="snapshot is gone"):
        write_chunks(inlet, source())
    os.close(inlet)
    reader.join()
    os.close(outlet)
    assert len(drained) == size


def test_a_full_disk_is_told_whichever_piece_meets_it() -> None:
    file = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="No space left"):
            write_chunks(file, (chunk("snapshot", 2 * 1024 * 1024, seed) for seed in range(8)))
    finally:
        os.close(file)


@pytest.mark.parametrize("start", [0, BLOCK_BYTES, 17])
def test_a_part_is_read_from_wherever_it_begins(tmp_path: Path, start: int) -> None:
    whole = os.urandom(2 * 1024 * 1024 + 100)
    path = tmp_path / "object"
    path.write_bytes(whole)
    buffer = huge_buffer(2 * 1024 * 1024)
    file = os.open(path, os.O_RDONLY)
    try:
        count = read_direct(file, start, buffer)
    finally:
        os.close(file)
    assert bytes(buffer[:count]) == whole[start : start + len(buffer)]
