"""What no engine can beat: one copy of the memory, and the bytes straight to and from the disk; alone, and together
beside the training loop.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.support.workload import Workload, timed

PIECE_BYTES = 16 * 2**20
BLOCK_BYTES = 4096
"""O_DIRECT takes memory, places and lengths in multiples of it."""
SHARED_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class Image:
    """Memory for one copy of the state, written to before anything is timed."""

    def __init__(self, workload: Workload, memory_file: int | None = None) -> None:
        """`memory_file`: of shared memory to lie in (a model on the CPU); else it is this process's own."""
        self._workload = workload
        self.state_bytes = workload.state_bytes
        size = -(-self.state_bytes // BLOCK_BYTES) * BLOCK_BYTES
        if workload.device == "cpu":
            self._memory: mmap.mmap | torch.Tensor
            if memory_file is None:
                self._memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            else:
                os.ftruncate(memory_file, size)
                self._memory = mmap.mmap(memory_file, size)
            self._memory.madvise(mmap.MADV_HUGEPAGE)
            self.view = memoryview(self._memory)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        else:
            # Page-locked, as a copy from the device at full speed wants it.
            self._memory = torch.empty(size + BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
            skip = -self._memory.data_ptr() % BLOCK_BYTES
            self._memory = self._memory[skip : skip + size]
            self.view = memoryview(self._memory.numpy())
            self.address = self._memory.data_ptr()
        ctypes.memset(self.address, 1, size)
        self.copy()

    def copy(self) -> None:
        """The state into this memory, tensor by tensor as it lies."""
        self._copy(self._workload, into_image=True)

    def copy_to(self, workload: Workload) -> None:
        """The other way, into the state of one of the same kind."""
        self._copy(workload, into_image=False)

    def _copy(self, workload: Workload, into_image: bool) -> None:
        place = 0
        for tensor in workload.tensors():
            size = tensor.numel() * tensor.element_size()
            if tensor.device.type == "cpu":
                target, source = self.address + place, tensor.data_ptr()
                ctypes.memmove(*((target, source) if into_image else (source, target)), size)
            else:
                assert isinstance(self._memory, torch.Tensor)
                there = self._memory[place : place + size].view(tensor.dtype).view(tensor.shape)
                target, source = (there, tensor) if into_image else (tensor, there)
                target.copy_(source, non_blocking=True)
            place += size
        if self._workload.device != "cpu":
            torch.cuda.synchronize()

    def write(self, path: Path) -> float:
        """Seconds to a new file, durable."""
        path.unlink(missing_ok=True)
        file = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

        def write() -> None:
            place = 0
            while place < len(self.view):
                place += os.write(file, self.view[place : place + PIECE_BYTES])
            os.fsync(file)

        try:
            return timed(write)
        finally:
            os.close(file)

    def read(self, path: Path) -> float:
        """Seconds from a file whose pages are not in memory."""
        drop_pages(path)
        file = open_direct(path, os.O_RDONLY)

        def read() -> None:
            place = 0
            while place < len(self.view):
                got = os.preadv(file, [self.view[place : place + PIECE_BYTES]], place)
                if not got:
                    raise SystemExit(f"{path} ended after {place} of {len(self.view)} bytes")
                place += got

        try:
            return timed(read)
        finally:
            os.close(file)


class Limit:
    """What no saver can beat for whose copy the loop waits, and is none: one memcpy, then a process of its own writes the
    bytes over a file's earlier ones. No checksum, no manifest, no reader's thought.
    """

    def __init__(self, workload: Workload, folder: Path) -> None:
        file = os.memfd_create("limit")
        self._image = Image(workload, file)
        size = len(self._image.view)
        command = [sys.executable, str(Path(__file__).with_name("raw_writer.py")), str(file), str(size)]
        self._writer = subprocess.Popen(
            [*command, str(folder / "limit")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file]
        )
        os.close(file)
        assert self._writer.stdout
        os.set_blocking(self._writer.stdout.fileno(), False)

    def save(self) -> None:
        self._image.copy()
        assert self._writer.stdin
        self._writer.stdin.write(b"\n")
        self._writer.stdin.flush()
        self._durable_at: float | None = None

    def after_step(self) -> None:
        pass

    def durable_at(self) -> float | None:
        assert self._writer.stdout
        if self._durable_at is None and (line := self._writer.stdout.readline()):
            self._durable_at = float(line)
        elif self._writer.poll() is not None:
            raise SystemExit(f"the raw writer ended with status {self._writer.returncode}")
        return self._durable_at

    def catch_up(self) -> None:
        pass

    def close(self) -> None:
        assert self._writer.stdin
        self._writer.stdin.close()
        self._writer.wait()


@contextmanager
def shared_huge_pages() -> Iterator[bool]:
    """Allows them to shared memory meanwhile, as startup.sh does on the clouds' machines; False: they can't be had."""
    try:
        before = SHARED_HUGE_PAGES.read_text()
        if "[never]" in before:
            SHARED_HUGE_PAGES.write_text("advise\n")
            print(f"allowing huge pages in {SHARED_HUGE_PAGES}; forbidden again at the end", flush=True)
    except OSError:
        yield False
        return
    try:
        yield "[deny]" not in before
    finally:
        if "[never]" in before:
            SHARED_HUGE_PAGES.write_text("never\n")


def open_direct(path: Path, flags: int) -> int:
    """Without the page cache, where the file system can; tmpfs can't."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError:
        return os.open(path, flags & ~os.O_EXCL, 0o644)


def read_once(path: Path) -> None:
    """Past the page cache, and through one small buffer."""
    file = open_direct(path, os.O_RDONLY)
    try:
        with mmap.mmap(-1, PIECE_BYTES) as buffer:
            place = 0
            while got := os.preadv(file, [buffer], place):
                place += got
    finally:
        os.close(file)


def drop_pages(folder: Path) -> None:
    """Out of the page cache with a file, or all files below a folder."""
    for path in [folder] if folder.is_file() else [one for one in folder.rglob("*") if one.is_file()]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # what is not yet on the disk would stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
