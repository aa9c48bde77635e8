"""The files of one machine's folder, by which its host and every driver process understand each other."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

MARK = "HOLDFAST_MACHINE_ID"  # in the environment of every process of a machine
HOST_MARK = "HOLDFAST_HOST_OF"  # in the environment of the machine's host, which must outlive the machine's processes
SPEC = "machine.json"  # written once, by the driver
RUNNING = "host.json"  # written once, by the host, when the machine has started
TERMINATE = "terminate"  # its existence asks the host for an orderly shutdown
END = "end.json"  # written once, by whoever proved that nothing of the machine is left
CONSOLE = "console.log"
DISKS = ("work", "home", "tmp")  # what a machine writes for itself, and what is gone with it


def write_json(path: Path, content: dict[str, Any]) -> bool:
    """Create the file in one step; False when it was there."""
    staged = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    staged.write_text(json.dumps(content))
    try:
        os.link(staged, path)
        return True
    except FileExistsError:
        return False
    finally:
        staged.unlink()


def record_end(folder: Path, reason: str, at: datetime) -> None:
    """The end is proven; the machine's disks go with it. Its console and its specification stay."""
    write_json(folder / END, {"reason": reason, "terminated_at": at.isoformat()})
    for name in DISKS:
        shutil.rmtree(folder / name, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError):
        return json.loads(path.read_text())
    return None
