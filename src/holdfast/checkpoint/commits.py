"""The commit protocol: data first, then a manifest, created conditionally. A checkpoint exists when its manifest does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import ConfigError, DamagedCheckpointError, NotFoundError, TransientError
from holdfast.runtime.contract import checkpoint_prefix, lease_key
from holdfast.storage import ObjectStore
from holdfast.storage.protocol import Data

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUM = "manifest_sha256"  # of the manifest without it: nothing else would notice a changed step or kind


@dataclass(frozen=True, slots=True, order=True)
class CheckpointId:
    """Ordered as checkpoints are: a later attempt's come after all of an earlier one's."""

    attempt: int
    step: int

    def __str__(self) -> str:
        return f"{self.attempt:04d}-{self.step:012d}"

    @classmethod
    def parse(cls, name: str) -> CheckpointId:
        attempt, _, step = name.partition("-")
        return cls(int(attempt), int(step))


class Checkpoints:
    """The checkpoints of one run in a store."""

    def __init__(self, store: ObjectStore, run_id: str) -> None:
        self._store, self._run_id = store, run_id
        self._prefix = checkpoint_prefix(run_id)

    def committed(self) -> list[CheckpointId]:
        """Oldest first."""
        return sorted(self._ids(lambda key: key.endswith("/" + MANIFEST)))

    def commit(
        self, checkpoint: CheckpointId, objects: Mapping[str, Iterable[Data]], manifest: Mapping[str, Any]
    ) -> int:
        """Write every object, then the manifest that lists them; bytes written.

        Raises TransientError (nothing visible has changed then) and AlreadyExistsError (this step is committed).
        """
        listed = {}
        for name, chunks in objects.items():
            digest = _Digest(chunks)
            self._store.put(f"{self._prefix}{checkpoint}/{name}", digest.chunks())
            listed[name] = {"size_bytes": digest.size_bytes, "sha256": digest.hexdigest()}
        body = {**manifest, "format_version": FORMAT_VERSION, "objects": listed}
        body[CHECKSUM] = _checksum(json.loads(json.dumps(body)))  # as a reader will see it
        # The manifest goes last: a machine cut off mid-commit leaves data that nobody reads, never half a checkpoint.
        self._store.create(f"{self._prefix}{checkpoint}/{MANIFEST}", json.dumps(body, indent=1).encode())
        return sum(entry["size_bytes"] for entry in listed.values())

    def manifest(self, checkpoint: CheckpointId) -> dict[str, Any]:
        """Raises DamagedCheckpointError, NotFoundError, ConfigError for one that a newer version wrote."""
        try:
            manifest = json.loads(self._store.get(f"{self._prefix}{checkpoint}/{MANIFEST}"))
            said = manifest.pop(CHECKSUM, None)
            if said is not None and said != _checksum(manifest):
                raise ValueError("its checksum is another than it says")
            version = int(manifest["format_version"])
            for entry in manifest["objects"].values():
                _ = entry["size_bytes"], entry["sha256"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{checkpoint}/{MANIFEST} can't be read: {error!r}") from error
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"checkpoint {checkpoint} of run {self._run_id!r} has format {version}, this Holdfast reads up to "
                f"{FORMAT_VERSION}; use the version that wrote it, or a later one"
            )
        return manifest

    def read(self, checkpoint: CheckpointId, manifest: Mapping[str, Any], name: str) -> bytes:
        """One object, proven to be what the manifest says. Raises DamagedCheckpointError."""
        expected = manifest["objects"][name]
        try:
            data = self._store.get(f"{self._prefix}{checkpoint}/{name}")
        except NotFoundError:
            raise DamagedCheckpointError(f"{checkpoint}/{name} is missing") from None
        if len(data) != expected["size_bytes"]:
            raise DamagedCheckpointError(f"{checkpoint}/{name} has {len(data)} bytes, not {expected['size_bytes']}")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise DamagedCheckpointError(f"{checkpoint}/{name} has another SHA-256 than its manifest says")
        return data

    def prune(self, attempt: int, max_to_keep: int) -> list[CheckpointId]:
        """Delete all but the newest, and what interrupted commits of earlier attempts left; what was deleted.

        Manifest first, then data: an interrupted deletion leaves no checkpoint that lacks a part.
        """
        committed = self.committed()
        doomed = committed[:-max_to_keep]
        for checkpoint in doomed:
            self._store.delete(f"{self._prefix}{checkpoint}/{MANIFEST}")
        abandoned = self._ids(lambda key: True) - set(committed)
        for checkpoint in [*doomed, *(one for one in abandoned if one.attempt < attempt)]:
            for info in self._store.list(f"{self._prefix}{checkpoint}/"):
                self._store.delete(info.key)
        return doomed

    def superseded(self, attempt: int) -> bool:
        """Has a later attempt begun? Then this one is a zombie, and must neither commit nor delete.

        The run's lease names the attempt, and is written before a machine is asked for. An orchestrator that was
        suspended may write an old one over it for a moment, so what later attempts have stored counts too. Both are
        small however long the run is.
        """
        try:
            leased = json.loads(self._store.get(lease_key(self._run_id))).get("attempt") or 0
        except NotFoundError:
            leased = 0
        except (ValueError, AttributeError) as error:
            raise TransientError(f"the lease of run {self._run_id!r} can't be read: {error!r}") from error
        return leased > attempt or any(one.attempt > attempt for one in self._ids(lambda key: True))

    def newest_valid(
        self, use: Callable[[CheckpointId, dict[str, Any]], Any], damaged: Callable[[CheckpointId, str], None]
    ) -> Any:
        """What `use` makes of the newest checkpoint that is whole; None when there is no checkpoint at all.

        `damaged` is told of each one that is not. Raises ConfigError when there are checkpoints, but no whole one.
        """
        committed = self.committed()
        for checkpoint in reversed(committed):
            try:
                return use(checkpoint, self.manifest(checkpoint))
            except DamagedCheckpointError as error:
                damaged(checkpoint, str(error))
            except NotFoundError:
                continue  # pruned since it was listed
        if not committed:
            return None
        if self.committed() != committed:
            return self.newest_valid(use, damaged)
        raise ConfigError(
            f"run {self._run_id!r} has {len(committed)} checkpoints and none is whole ({', '.join(map(str, committed))}): "
            "restore them, or begin again under another run id"
        )

    def _ids(self, wanted: Callable[[str], bool]) -> set[CheckpointId]:
        found = set()
        for info in self._store.list(self._prefix):
            name, slash, _ = info.key.removeprefix(self._prefix).partition("/")
            if slash and wanted(info.key) and name.replace("-", "").isdigit():
                found.add(CheckpointId.parse(name))
        return found


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class _Digest:
    """Sums up what flows through it."""

    def __init__(self, chunks: Iterable[Data]) -> None:
        self._chunks = chunks
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    def chunks(self) -> Iterator[Data]:
        for chunk in self._chunks:
            self._hash.update(chunk)
            self.size_bytes += memoryview(chunk).nbytes
            yield chunk

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
