"""Large blocks past the page cache: half the processor time of a buffered write, and no gigabyte of cache thrown out.

Direct I/O (open(2), O_DIRECT) takes whole blocks from memory that begins at one. What is crooked, small, or on a file
system that refuses goes the usual way.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from holdfast.storage.protocol import Data

BLOCK_BYTES = 4096
SMALLEST_BYTES = 1024 * 1024
STAGED_BYTES = 16 * 1024 * 1024
BUFFERS = 2
O_DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS


def write_chunks(file: int, chunks: Iterable[Data]) -> int:
    """Write them one after another from the file's beginning; how many bytes they were.

    Large ones are on their way to the disk while the next are being made, however many: whoever sums them up is through
    soon, and then leaves the memory's whole speed to others. The disk takes a large one from where it lies, if it can: it must
    stay as it is.
    """
    written = 0
    with _Writer(file) as writer:
        for chunk in chunks:
            data = memoryview(chunk).cast("B")
            whole = len(data) - len(data) % BLOCK_BYTES if written % BLOCK_BYTES == 0 else 0
            if whole >= SMALLEST_BYTES:
                writer.write_blocks(data[:whole])
            else:
                whole = 0
            if whole < len(data):
                writer.settle()
                _write(file, data[whole:])
            written += len(data)
    return written


class _Writer:
    """Writes whole blocks in a thread of its own: what begins at one from where it lies, the rest by way of two buffers."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._buffers: list[memoryview] = []
        self._writing: deque[Future[None]] = deque()
        self._pool: ThreadPoolExecutor | None = None
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._failed |= kind is not None
        try:
            self.settle()
        finally:
            if self._pool:
                self._pool.shutdown()

    def write_blocks(self, blocks: memoryview) -> None:
        """Returns when they are on their way. Raises OSError, also for what was written before."""
        if _is_straight(blocks, 0):
            self._write(blocks)
            return
        for start in range(0, len(blocks), STAGED_BYTES):
            while len(self._writing) >= BUFFERS:
                self._writing.popleft().result()
            if len(self._buffers) < BUFFERS:
                self._buffers.append(huge_buffer(STAGED_BYTES))
            else:
                self._buffers.append(self._buffers.pop(0))
            piece = blocks[start : start + STAGED_BYTES]
            buffer = self._buffers[-1][: len(piece)]
            buffer[:] = piece
            self._write(buffer)

    def _write(self, blocks: memoryview) -> None:
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="holdfast-write")
        self._writing.append(self._pool.submit(self._write_next, blocks))

    def _write_next(self, blocks: memoryview) -> None:
        if self._failed:  # a disk that fails slowly would do so once for each
            return
        try:
            _write(self._file, blocks, direct=True)
        except OSError:
            self._failed = True
            raise

    def settle(self) -> None:
        """Wait until all is written. Raises OSError."""
        while self._writing:
            self._writing.popleft().result()


def _write(file: int, data: memoryview, direct: bool = False) -> None:
    """All of it, past the page cache where the file system agrees."""
    if direct and _set_direct(file, True):
        try:
            while data:
                data = data[os.write(file, data) :]
        except OSError:
            pass  # refused after all (some network file systems): the usual way, which also tells a full disk
        finally:
            _set_direct(file, False)
    while data:
        data = data[os.write(file, data) :]


def read_direct(file: int, start: int, buffer: memoryview) -> int:
    """Fill `buffer` from `start`; how many bytes there were. Fastest into a `huge_buffer`."""
    filled = 0
    if len(buffer) >= SMALLEST_BYTES and _is_straight(buffer, start) and _set_direct(file, True):
        try:
            filled = os.preadv(file, [buffer], start)
        except OSError:
            filled = 0
        finally:
            _set_direct(file, False)
    while filled < len(buffer) and (count := os.preadv(file, [buffer[filled:]], start + filled)):
        filled += count
    return filled


def huge_buffer(size_bytes: int) -> memoryview:
    """Memory of its own in huge pages where the system has them; it begins at a block."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, size_bytes))
    block = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)


def _is_straight(buffer: memoryview, position: int) -> bool:
    if position % BLOCK_BYTES or len(buffer) % BLOCK_BYTES or buffer.readonly:
        return False  # bytes don't tell their address, and don't begin at a block
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % BLOCK_BYTES == 0


def _set_direct(file: int, on: bool) -> bool:
    """Did the file system agree?"""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | O_DIRECT if on else flags & ~O_DIRECT)
    except OSError:
        return False
    return True
