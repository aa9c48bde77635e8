"""Ending what a program has started: torchrun's ranks have sessions of their own, and outlive a torchrun that is killed."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def kill_marked(variable: str, value: str) -> int:
    """SIGKILL every process whose environment has `variable` with this value; how many there were. Linux only: elsewhere 0."""
    mark = f"{variable}={value}".encode()
    killed = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)
                killed += 1
    return killed
