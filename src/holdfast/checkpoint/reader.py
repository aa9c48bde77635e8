"""A run's checkpoints and metrics, for whoever looks from outside. Standard library only."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.folders import FILES
from holdfast.errors import HoldfastError
from holdfast.runtime.contract import metrics_prefix
from holdfast.storage import ObjectStore


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    id: CheckpointId
    size_bytes: int
    metadata: dict[str, Any]
    problem: str
    """Empty when its manifest can be read."""


def list_checkpoints(store: ObjectStore, run_id: str) -> list[CheckpointInfo]:
    """Oldest first."""
    checkpoints = Checkpoints(store, run_id)
    found = []
    for checkpoint in checkpoints.committed():
        try:
            manifest = checkpoints.manifest(checkpoint)
            size = sum(entry["size_bytes"] for entry in manifest["objects"].values())
            found.append(CheckpointInfo(checkpoint, size, manifest, ""))
        except HoldfastError as error:
            found.append(CheckpointInfo(checkpoint, 0, {}, str(error)))
    return found


def tensor_digest(store: ObjectStore, run_id: str) -> str | None:
    """SHA-256 over the checksums of the newest checkpoint's tensors (or files), names, shapes and types included; None
    without one.
    """
    infos = [info for info in list_checkpoints(store, run_id) if not info.problem]
    if not infos:
        return None
    manifest = infos[-1].metadata
    # An image's own name has a random number in it.
    ranks = {rank["state"]: f"rank {number}" for number, rank in enumerate(manifest.get("ranks") or [])}
    parts = {
        ranks.get(name, name): entry.get("sha256") or entry["crc32"]
        for name, entry in sorted(manifest["objects"].items())
        if name.startswith(FILES) or not name.endswith(".json")  # trees have times and versions in them
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_metrics(store: ObjectStore, run_id: str) -> dict[int, dict[str, float]]:
    """Step -> name -> value, of every committed step. A step that two attempts trained has the later one's, and where
    that ended earlier, what the one before did beyond never came to a checkpoint.
    """
    metrics: dict[int, dict[str, float]] = {}
    attempt = None
    for info in store.list(metrics_prefix(run_id)):  # in the order of (attempt, step)
        for line in store.get(info.key).splitlines():
            record = json.loads(line)
            if record["attempt"] != attempt:
                attempt = record["attempt"]
                metrics = {step: values for step, values in metrics.items() if step < record["step"]}
            metrics[record["step"]] = record["metrics"]
    return metrics
