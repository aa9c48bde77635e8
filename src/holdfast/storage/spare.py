"""The blocks of a deleted large file for the next one: written over in place, they need no allocation and no discard.

A new gigabyte on ext4 costs several times what writing over an old one does (more so on disks mounted with `discard`).
One file is kept at most, under a name that no listing shows; the process's end deletes it, or whoever lists after a kill.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import stat
import threading
import weakref
from pathlib import Path

from holdfast.storage.keys import STAGED_SUFFIX

SMALLEST_BYTES = 16 * 1024 * 1024


class Spare:
    """Of one store; `root` is its folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kept: list[tuple[Path, int]] = []
        """At most one: where it lies, and the open file, which is locked as every file is that is being written."""
        self._lock = threading.Lock()
        weakref.finalize(self, _remove, self._kept)

    def keep(self, path: Path) -> bool:
        """Take a file in place of deleting it. False: it is left as it was. Raises nothing."""
        with self._lock, contextlib.suppress(OSError):
            if self._kept or not _is_large(path):
                return False
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            hidden = self._root / f"spare.{secrets.token_hex(6)}{STAGED_SUFFIX}"
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(path, hidden)
            except OSError:
                os.close(file)
                return False
            if _is_ours_alone(file):
                self._kept.append((hidden, file))
            else:  # somebody reads it: it stays whole for as long as that takes
                os.close(file)
                hidden.unlink()
            return True
        return False

    def take(self, path: Path) -> int | None:
        """An open file at `path`, longer or shorter than what will be in it; None: there is none."""
        with self._lock:
            if not self._kept:
                return None
            hidden, file = self._kept.pop()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.rename(hidden, path)
            return file
        except OSError:
            os.close(file)
            return None


def _is_large(path: Path) -> bool:
    facts = os.stat(path, follow_symlinks=False)
    return stat.S_ISREG(facts.st_mode) and facts.st_size >= SMALLEST_BYTES and facts.st_nlink == 1


def _is_ours_alone(file: int) -> bool:
    """Has nobody else this file open, or mapped? Only then Linux grants a lease for writing; elsewhere: unknown, False."""
    try:
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # what its breaking would send; SIGIO would end the process
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except (AttributeError, OSError):
        return False
    return True


def _remove(kept: list[tuple[Path, int]]) -> None:
    for path, file in kept:
        with contextlib.suppress(OSError):
            os.close(file)
            path.unlink()
