"""Ending a machine's processes, every one of them."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

from holdfast.drivers.local.machine_files import HOST_MARK, MARK

TRIES_SECONDS = 5.0


def kill_marked(machine_id: str, group: int | None = None) -> bool:
    """SIGKILL the group, this process's descendants and whatever carries the machine's mark, until none is left.

    False when some are left after a while: nothing is proven then, and the caller must ask again. Without a `group`
    the machine's host is ended too: it may be one that was given up, and is only now coming up.
    """
    give_up_at = time.monotonic() + TRIES_SECONDS
    me = os.getpid()
    marks = [MARK] if group else [MARK, HOST_MARK]
    if group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    while time.monotonic() < give_up_at:
        living = [process for process in marked(machine_id, *marks) if process.pid != me]
        if group:  # we are the host: what it adopted is its machine's, whatever became of the mark
            living += [child for child in psutil.Process().children(recursive=True) if _alive(child)]
        if not living:
            return True
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process.kill()
        if group:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        time.sleep(0.005)
    return False


def marked(machine_id: str, *marks: str) -> list[psutil.Process]:
    """Living processes whose environment carries the machine's id under one of `marks` (by default the machine's)."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            environment = process.environ()
            if any(environment.get(mark) == machine_id for mark in marks or (MARK,)) and _alive(process):
                found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
