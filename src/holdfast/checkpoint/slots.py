"""Shared memory that a training process fills and its persist process reads: two slots, each with a lock of its own.

The lock is the slot's: whoever holds it fills it or makes it durable. It is a lock of the kernel's, so a process
that is killed gives it back; a snapshot that was being written then has no number, and nobody takes it for one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import sys
import tempfile

LINUX = sys.platform == "linux"
# flock's lock belongs to an open file, and a file that was handed on is the same one: so each process opens it anew,
# which only Linux can do with nameless memory. Elsewhere the lock is the process's own (lockf).
lock = fcntl.flock if LINUX else fcntl.lockf

PAGE_BYTES = 4096
HEAD = struct.Struct("<QQQ")  # number of the snapshot (0: none), bytes of the image, bytes of the words
NUMBER = COPIED = struct.Struct("<Q")  # the first alone; and, after the head, how many bytes of the image are copied
MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23  # linux/mman.h


class Slot:
    """One snapshot: a page with its sizes, the image, and words (JSON). The image begins on a page: direct I/O wants it."""

    def __init__(self, file: int, capacity_bytes: int) -> None:
        """Takes the file over. Another process opens the same memory by `Slot(os.dup(file), capacity_bytes)`.

        Raises OSError when there is no memory for it; the file is closed then.
        """
        self.capacity_bytes = capacity_bytes
        self.closed, self.retired = True, False
        self._file = file
        self._lock = os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_CLOEXEC) if LINUX else file
        try:
            self._map = mmap.mmap(file, capacity_bytes)
        except OSError:
            for one in {self._file, self._lock}:
                os.close(one)
            raise
        self.memory = memoryview(self._map)
        self.closed = False

    @classmethod
    def make(cls, image_bytes: int, words_bytes: int) -> Slot:
        """Room for so much. Raises OSError when there is no memory for it."""
        capacity = PAGE_BYTES + _pages(image_bytes) + _pages(words_bytes)
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("holdfast-snapshot", os.MFD_CLOEXEC)
        else:  # macOS
            with tempfile.TemporaryFile() as made:
                file = os.dup(made.fileno())
        os.ftruncate(file, capacity)
        slot = cls(file, capacity)
        _advise(slot._map, MADV_HUGEPAGE)
        return slot

    def fileno(self) -> int:
        return self._file

    def fits(self, image_bytes: int, words_bytes: int) -> bool:
        return PAGE_BYTES + _pages(image_bytes) + words_bytes <= self.capacity_bytes

    def prefault(self) -> None:
        """Have the memory ready before it is needed: its first touch costs ten times the copy. Lets other threads run."""
        _advise(self._map, MADV_POPULATE_WRITE)

    def take(self, wait: bool = False) -> bool:
        """Lock it; False when the other process has it (never, with `wait`), or when it is closed."""
        if self.closed:
            return False
        try:
            lock(self._lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def give_back(self) -> None:
        if not self.closed:
            lock(self._lock, fcntl.LOCK_UN)

    # -- what is in it; only for whoever has taken it, or reads along up to `copied_bytes` -----------------------------------------------------------------

    @property
    def number(self) -> int:
        """Of the snapshot; 0 when there is none, or when it was never completed."""
        return int(HEAD.unpack_from(self._map)[0])

    def clear(self) -> None:
        HEAD.pack_into(self._map, 0, 0, 0, 0)
        self.copied_bytes = 0

    def begin(self, image_bytes: int, words: bytes) -> None:
        """From here on the image is being filled; until it is complete there is no snapshot here."""
        self.clear()
        start = PAGE_BYTES + _pages(image_bytes)
        self._map[start : start + len(words)] = words
        HEAD.pack_into(self._map, 0, 0, image_bytes, len(words))

    @property
    def copied_bytes(self) -> int:
        """How far the image is copied from its beginning on; also for who reads it while it is being filled."""
        return int(COPIED.unpack_from(self._map, HEAD.size)[0])

    @copied_bytes.setter
    def copied_bytes(self, count: int) -> None:
        COPIED.pack_into(self._map, HEAD.size, count)

    def image(self, size_bytes: int | None = None) -> memoryview:
        size = HEAD.unpack_from(self._map)[1] if size_bytes is None else size_bytes
        return self.memory[PAGE_BYTES : PAGE_BYTES + size]

    def words(self) -> bytes:
        _, image_bytes, words_bytes = HEAD.unpack_from(self._map)
        start = PAGE_BYTES + _pages(image_bytes)
        return bytes(self.memory[start : start + words_bytes])

    def complete(self, number: int) -> None:
        """The image is whole. The rest of the head is not written again: whoever reads along may be looking at it."""
        NUMBER.pack_into(self._map, 0, number)

    def close(self) -> None:
        """Views of its memory that are still in use keep it mapped."""
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(BufferError):
            self.memory.release()
            self._map.close()
        for file in {self._file, self._lock}:
            os.close(file)

    def __del__(self) -> None:
        """A program that attaches again and again keeps no memory of earlier times."""
        if not getattr(self, "closed", True):
            self.close()


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def _advise(memory: mmap.mmap, advice: int) -> None:
    anchor = ctypes.c_char.from_buffer(memory)
    try:
        advise(ctypes.addressof(anchor), len(memory), advice)
    finally:
        del anchor


def advise(address: int, size_bytes: int, advice: int) -> None:
    """Through ctypes: mmap.madvise does not know them all, and holds the interpreter's lock. A kernel that refuses is no
    error.
    """
    if LINUX:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), ctypes.c_int(advice))
