"""Which process is meant: a number alone does not say, because the system gives it to another one later."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import psutil

PROC = Path("/proc")
# Fields of /proc/<pid>/stat after the command's name in brackets, which may hold anything. See proc(5).
STATE, START_TICKS = 0, 19


def identify(pid: int) -> dict[str, Any]:
    """As much of a process as tells it from every other one on this computer; plain JSON. Raises psutil.NoSuchProcess.

    On Linux the ticks from boot to its start: the time of day that psutil computes from them moves with the clock.
    """
    stat = _stat(pid)
    if stat:
        return {"pid": pid, "boot": _boot(), "start_ticks": int(stat[START_TICKS])}
    return {"pid": pid, "created_at": psutil.Process(pid).create_time()}


def lives(process: dict[str, Any]) -> bool:
    """Is it still there, and not just waiting to be collected by its parent?"""
    if "start_ticks" in process:
        stat = _stat(process["pid"])
        return (
            stat is not None
            and stat[STATE] not in ("Z", "X")
            and int(stat[START_TICKS]) == process["start_ticks"]
            and _boot() == process["boot"]
        )
    try:
        found = psutil.Process(process["pid"])
        return abs(found.create_time() - process["created_at"]) < 0.5 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _stat(pid: int) -> list[str] | None:
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return None


def _boot() -> str:
    with contextlib.suppress(OSError):  # some containers hide it; the ticks are there all the same
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    return ""
