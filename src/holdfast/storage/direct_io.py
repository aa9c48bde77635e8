"""Large blocks past the page cache: half the processor time of a buffered write, and no gigabyte of cache thrown out.

Direct I/O (open(2), O_DIRECT) takes whole blocks from memory that begins at one. What is crooked, small, or on a file
system that refuses goes the usual way.
"""

from __future__ import annotations

import ctypes
import fcntl
import os

from holdfast.storage.protocol import Data

BLOCK_BYTES = 4096
SMALLEST_BYTES = 1024 * 1024
O_DIRECT = getattr(os, "O_DIRECT", 0)  # not on macOS


def write_direct(file: int, chunk: Data) -> None:
    """Append all of it."""
    rest = memoryview(chunk).cast("B")
    straight = _straight_bytes(rest, os.lseek(file, 0, os.SEEK_CUR))
    if straight and _set_direct(file, True):
        try:
            while straight:
                count = os.write(file, rest[:straight])
                rest, straight = rest[count:], straight - count
                if count % BLOCK_BYTES:
                    break
        except OSError:
            if not _set_direct(file, False):
                raise
            # Refused after all (some network file systems): the rest the usual way, which also tells a full disk.
        finally:
            _set_direct(file, False)
    while rest:
        rest = rest[os.write(file, rest) :]


def read_direct(file: int, start: int, buffer: memoryview) -> int:
    """Fill `buffer` from `start`; how many bytes there were."""
    filled = 0
    if _straight_bytes(buffer, start) == len(buffer) and _set_direct(file, True):
        try:
            filled = os.preadv(file, [buffer], start)
        except OSError:
            filled = 0
        finally:
            _set_direct(file, False)
    while filled < len(buffer) and (count := os.preadv(file, [buffer[filled:]], start + filled)):
        filled += count
    return filled


def _straight_bytes(view: memoryview, position: int) -> int:
    """How much from the view's begin may go directly; 0: nothing."""
    if not O_DIRECT or len(view) < SMALLEST_BYTES or position % BLOCK_BYTES or view.readonly:
        return 0  # bytes don't tell their address, and don't begin at a block
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    return 0 if address % BLOCK_BYTES else len(view) - len(view) % BLOCK_BYTES


def _set_direct(file: int, on: bool) -> bool:
    """Did the file system agree?"""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | O_DIRECT if on else flags & ~O_DIRECT)
    except OSError:
        return False
    return True
