"""Large blocks past the page cache: half the processor time of a buffered write, and no gigabyte of cache thrown out.

Direct I/O (open(2), O_DIRECT) takes whole blocks from memory that begins at one. What is crooked, small, or on a file
system that refuses goes the usual way.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

from holdfast.storage.protocol import Data

BLOCK_BYTES = 4096
SMALLEST_BYTES = 1024 * 1024
STAGED_BYTES = 16 * 1024 * 1024
O_DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS


def write_direct(file: int, chunk: Data) -> None:
    """Append all of it."""
    data = memoryview(chunk).cast("B")
    begin = os.lseek(file, 0, os.SEEK_CUR)
    if len(data) >= SMALLEST_BYTES and begin % BLOCK_BYTES == 0 and _set_direct(file, True):
        try:
            _write_blocks(file, data[: len(data) - len(data) % BLOCK_BYTES])
        except OSError:
            pass  # refused after all (some network file systems): the rest the usual way, which also tells a full disk
        finally:
            _set_direct(file, False)
    rest = data[os.lseek(file, 0, os.SEEK_CUR) - begin :]
    while rest:
        rest = rest[os.write(file, rest) :]


def _write_blocks(file: int, blocks: memoryview) -> None:
    # By way of huge pages: out of shared memory's ordinary ones a device takes half as long again.
    buffer = huge_buffer(min(STAGED_BYTES, len(blocks)))
    for start in range(0, len(blocks), STAGED_BYTES):
        piece = blocks[start : start + STAGED_BYTES]
        buffer[: len(piece)] = piece
        if os.write(file, buffer[: len(piece)]) < len(piece):
            return


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
