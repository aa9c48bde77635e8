"""Will a notice be long enough? The store's upload speed, tried, against the size of the job's checkpoints so far."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from holdfast.checkpoint.planner import WINDOWS_SECONDS, size_text, window_bytes, window_warning
from holdfast.drivers.protocol import Finding
from holdfast.errors import HoldfastError, NotFoundError
from holdfast.model import Job
from holdfast.runtime.contract import journal_prefix
from holdfast.storage import ObjectStore

PIECE_BYTES = 256 * 1024
PROBE_BYTES = (PIECE_BYTES, 8 * PIECE_BYTES, 64 * PIECE_BYTES, 128 * PIECE_BYTES)
"""Tried one after another up to 32 MiB: small ones tell of a slow link how slow it is without waiting long."""
PROBE_SECONDS = 3.0
CHECKPOINT_KEY = re.compile(r"runs/([a-z0-9-]+)/checkpoints/(\d+-\d+)/(.+)")


@dataclass(frozen=True, slots=True)
class KnownCheckpoint:
    run_id: str
    name: str
    size_bytes: int


def examine_windows(store: ObjectStore, clouds: str, job: Job | None) -> Iterator[Finding]:
    """`clouds`: the driver's name. Windows of clouds that are not in it are left out; of the local one all are told."""
    windows = {
        cloud: seconds for cloud, seconds in WINDOWS_SECONDS.items() if cloud.lower() in clouds.split("+")
    } or WINDOWS_SECONDS
    try:
        speed = upload_bytes_per_second(store)
        known = last_checkpoint(store, job.name) if job else None
    except (HoldfastError, OSError) as error:
        yield Finding(subject="store speed", ok=False, detail=str(error))
        return
    enough = ", ".join(
        f"{seconds:.0f} s ({cloud}) is enough for {size_text(window_bytes(speed, seconds))}"
        for cloud, seconds in windows.items()
    )
    detail = f"{size_text(speed)}/s from this computer, a machine's may differ; a notice of {enough}"
    yield Finding(subject="store speed", ok=True, detail=detail)
    if not known:
        return
    warnings = [text for seconds in windows.values() if (text := window_warning(known.size_bytes, speed, seconds))]
    which = f"as {known.name} of run {known.run_id}"
    fits = f"{size_text(known.size_bytes)} fits every notice"
    detail = f"{'; '.join(warnings) or fits}; {which}"
    yield Finding(subject="checkpoint size", ok=True, warning=bool(warnings), detail=detail)


def upload_bytes_per_second(store: ObjectStore) -> float:
    """Of one upload, tried with an object that is deleted again. Raises HoldfastError, OSError."""
    key = f"probes/{secrets.token_hex(8)}"
    piece = os.urandom(PIECE_BYTES)  # nothing on the way can make it smaller
    began, speed = time.monotonic(), 0.0
    try:
        for size in PROBE_BYTES:
            if speed and time.monotonic() - began + size / speed > PROBE_SECONDS:
                break
            put_at = time.monotonic()
            store.put(key, (piece for _ in range(size // PIECE_BYTES)))
            speed = size / max(time.monotonic() - put_at, 1e-6)
    finally:
        store.delete(key)
    return speed


def last_checkpoint(store: ObjectStore, job_name: str) -> KnownCheckpoint | None:
    """The newest one of the run that was begun last, of those whose id begins with the job's name."""
    sizes: dict[tuple[str, str], int] = {}
    complete: dict[str, list[str]] = {}
    for info in store.list(f"runs/{job_name}"):
        if match := CHECKPOINT_KEY.fullmatch(info.key):
            run_id, name, part = match.groups()
            sizes[run_id, name] = sizes.get((run_id, name), 0) + info.size_bytes
            if part == "manifest.json":
                complete.setdefault(run_id, []).append(name)
    begun = {run_id: at for run_id in complete if (at := _begun_at(store, run_id, job_name))}
    if not begun:
        return None
    run_id = max(begun, key=lambda run_id: begun[run_id])
    name = max(complete[run_id])
    return KnownCheckpoint(run_id, name, sizes[run_id, name])


def _begun_at(store: ObjectStore, run_id: str, job_name: str) -> datetime | None:
    """None for another job's run: names may begin alike, and the run's journal knows whose it is."""
    try:
        first = json.loads(store.get(f"{journal_prefix(run_id)}000001.json"))
        return datetime.fromisoformat(first["at"]) if first["job"]["name"] == job_name else None
    except (NotFoundError, ValueError, KeyError, TypeError):
        return None
