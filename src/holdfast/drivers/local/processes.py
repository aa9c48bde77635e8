"""Ending a machine's processes, every one of them."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

from holdfast.drivers.local.machine_files import MARK

TRIES_SECONDS = 10.0


def kill_marked(machine_id: str, group: int | None = None) -> None:
    """SIGKILL the group, this process's descendants and whatever carries the machine's mark, until none is left."""
    give_up_at = time.monotonic() + TRIES_SECONDS
    me = os.getpid()
    if group:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    while time.monotonic() < give_up_at:
        living = [process for process in marked(machine_id) if process.pid != me]
        if group:  # we are the host: what it adopted is its machine's, whatever became of the mark
            living += [child for child in psutil.Process().children(recursive=True) if _alive(child)]
        if not living:
            return
        for process in living:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                process.kill()
        if group:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        time.sleep(0.005)


def marked(machine_id: str) -> list[psutil.Process]:
    """Living processes whose environment carries the machine's mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            if process.environ().get(MARK) == machine_id and _alive(process):
                found.append(process)
    return found


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
