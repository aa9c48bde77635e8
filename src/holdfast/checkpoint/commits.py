"""The commit protocol: data first, then a manifest, created conditionally. A checkpoint exists when its manifest does."""

from __future__ import annotations

import hashlib
import itertools
import json
import queue
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from holdfast.checkpoint import compression
from holdfast.errors import ConfigError, DamagedCheckpointError, NotFoundError, TransientError
from holdfast.runtime.contract import checkpoint_prefix, lease_key
from holdfast.storage import ObjectStore
from holdfast.storage.direct_io import huge_buffer
from holdfast.storage.protocol import Data

try:
    from isal.isal_zlib import crc32  # the same sum, three times as fast
except ImportError:
    from zlib import crc32

FORMAT_VERSION = 2  # since 2: images have a checksum per piece, and a state may be of several ranks
ID = re.compile(r"[0-9]+-[0-9]+")
"""Other folders beside the checkpoints are none of ours."""
MANIFEST = "manifest.json"
PART = ".part"
TREE, STATE = "tree.json", "state.safetensors"
"""Objects of a state that one process saves."""
COMPRESSED = ".zst"
"""Ends the name of an image that is compressed."""
CHECKSUM = "manifest_sha256"  # of the manifest without it: nothing else would notice a changed step or kind


PIECE_BYTES = 16 * 1024 * 1024
"""An image is written, checked and read in pieces of so many bytes, each with a CRC-32 (RFC 1952): ten times as fast as
a SHA-256, finds every burst of 32 bits, and says which piece is damaged."""
READERS = 4
COMPRESSORS, COMPRESSED_AHEAD = 2, 3


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
        return sorted(self._ids(lambda name: name == MANIFEST))

    def commit(
        self, checkpoint: CheckpointId, objects: Mapping[str, Iterable[Data]], manifest: Mapping[str, Any]
    ) -> int:
        """Write every object, then the manifest that lists them; bytes written.

        Raises TransientError (nothing visible has changed then) and AlreadyExistsError (this step is committed).
        """
        listed = {name: self.write(checkpoint, name, chunks) for name, chunks in objects.items()}
        self.publish(checkpoint, listed, manifest)
        return sum(entry["size_bytes"] for entry in listed.values())

    def write(self, checkpoint: CheckpointId, name: str, chunks: Iterable[Data]) -> dict[str, Any]:
        """One object; its entry in the manifest. Raises TransientError."""
        digest = _Digest(chunks)
        self._store.put(f"{self._prefix}{checkpoint}/{name}", digest.chunks())
        return {"size_bytes": digest.size_bytes, "sha256": digest.hexdigest()}

    def write_image(
        self,
        checkpoint: CheckpointId,
        name: str,
        image: memoryview,
        compressed: bool = False,
        wait_for: Callable[[int], None] = lambda stop: None,
    ) -> dict[str, dict[str, Any]]:
        """The same for a large one that lies in memory, which must stay as it is: each piece is summed up, and compressed,
        while the ones before are on their way; the object's name and its entry. Raises TransientError.

        A compressed one has another name: written again, an image is the same to the bit or has a place of its own, so what
        is committed never changes.

        `wait_for(stop)`: called before the bytes below `stop` are looked at; what it raises ends the writing, and there is
        no such object.
        """
        sums: list[int] = []
        stored: list[int] = []

        def noted(piece: memoryview, data: Data) -> tuple[Data, int]:
            sums.append(crc32(piece))  # just before it is sent: the processor's cache still has it then
            stored.append(len(data))
            return data, sums[-1]

        def cut() -> Iterator[memoryview]:
            for start in range(0, len(image), PIECE_BYTES):
                piece = image[start : start + PIECE_BYTES]
                wait_for(start + len(piece))
                yield piece

        pieces, name = cut(), name + COMPRESSED if compressed else name
        with ThreadPoolExecutor(COMPRESSORS, thread_name_prefix="holdfast-compress") as pool:
            key = f"{self._prefix}{checkpoint}/{name}"
            if compressed:  # the sums are of what is inside
                self._store.put(key, (noted(*pair)[0] for pair in _compressed(pieces, pool)))
            else:
                self._store.put_summed(key, (noted(piece, piece) for piece in pieces))
        entry = {"size_bytes": sum(stored), "piece_bytes": PIECE_BYTES, "crc32": [f"{one:08x}" for one in sums]}
        if compressed:
            entry |= {"encoding": compression.ENCODING, "image_bytes": len(image), "stored_bytes": stored}
        return {name: entry}

    def publish(
        self, checkpoint: CheckpointId, objects: Mapping[str, Mapping[str, Any]], manifest: Mapping[str, Any]
    ) -> None:
        """The checkpoint exists from here on. Raises TransientError and AlreadyExistsError."""
        body = {**manifest, "format_version": FORMAT_VERSION, "objects": objects}
        body[CHECKSUM] = _checksum(json.loads(json.dumps(body)))  # as a reader will see it
        # The manifest goes last: a machine cut off mid-commit leaves data that nobody reads, never half a checkpoint.
        self._store.create(f"{self._prefix}{checkpoint}/{MANIFEST}", json.dumps(body, indent=1).encode())

    def write_part(self, checkpoint: CheckpointId, rank: str, objects: Mapping[str, Any]) -> None:
        """One rank's objects are durable; whoever publishes the checkpoint waits for all of them."""
        self._store.put(f"{self._prefix}{checkpoint}/{rank}{PART}", json.dumps(objects).encode())

    def read_parts(self, checkpoint: CheckpointId) -> dict[str, dict[str, Any]]:
        """Rank's name -> its objects, of the ranks whose part is there."""
        prefix = f"{self._prefix}{checkpoint}/"
        keys = [info.key for info in self._store.list(prefix) if info.key.endswith(PART)]
        return {key.removeprefix(prefix).removesuffix(PART): json.loads(self._store.get(key)) for key in keys}

    def exists(self, checkpoint: CheckpointId) -> bool:
        try:
            self._store.get_range(f"{self._prefix}{checkpoint}/{MANIFEST}", 0, 1)
        except NotFoundError:
            return False
        return True

    def manifest(self, checkpoint: CheckpointId) -> dict[str, Any]:
        """Raises DamagedCheckpointError, NotFoundError, ConfigError for one that a newer version wrote."""
        try:
            manifest = json.loads(self._store.get(f"{self._prefix}{checkpoint}/{MANIFEST}"))
            said = manifest.pop(CHECKSUM, None)
            if said is not None and said != _checksum(manifest):
                raise ValueError("its checksum is another than it says")
            version = manifest["format_version"]
            if float(version) > FORMAT_VERSION:  # before anything else is looked at: it may look otherwise
                raise ConfigError(
                    f"checkpoint {checkpoint} of run {self._run_id!r} has format {version}, this Holdfast reads up to "
                    f"{FORMAT_VERSION}; use the version that wrote it, or a later one"
                )
            for entry in manifest["objects"].values():
                _check_entry(entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(f"{checkpoint}/{MANIFEST} can't be read: {error!r}") from error
        return manifest

    def read(self, checkpoint: CheckpointId, manifest: Mapping[str, Any], name: str) -> bytes:
        """One object, proven to be what the manifest says. Raises DamagedCheckpointError."""
        expected = manifest["objects"][name]
        if "crc32" in expected:
            whole = bytearray(image_bytes(expected))

            def keep(start: int, piece: memoryview) -> None:
                whole[start : start + len(piece)] = piece

            self.read_pieces(checkpoint, manifest, name, keep)
            return bytes(whole)
        try:
            data = self._store.get(f"{self._prefix}{checkpoint}/{name}")
        except NotFoundError:
            raise DamagedCheckpointError(f"{checkpoint}/{name} is missing") from None
        if len(data) != expected["size_bytes"]:
            raise DamagedCheckpointError(f"{checkpoint}/{name} has {len(data)} bytes, not {expected['size_bytes']}")
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise DamagedCheckpointError(f"{checkpoint}/{name} has another SHA-256 than its manifest says")
        return data

    def read_pieces(
        self,
        checkpoint: CheckpointId,
        manifest: Mapping[str, Any],
        name: str,
        use: Callable[[int, memoryview], None],
        wanted: Iterable[int] | None = None,
    ) -> None:
        """Have `use(start, bytes)` called with every proven piece of an image, in any order, from several threads.

        `wanted`: numbers of pieces; None: all. The bytes are overwritten when `use` returns.
        Raises DamagedCheckpointError, naming the piece.
        """
        entry = manifest["objects"][name]
        size_bytes, piece_bytes, sums = image_bytes(entry), entry["piece_bytes"], entry["crc32"]
        ends = list(itertools.accumulate(entry.get("stored_bytes", ())))
        spare: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        numbers = range(len(sums)) if wanted is None else sorted(set(wanted))
        for _ in range(min(READERS, len(numbers))):
            spare.put(huge_buffer(piece_bytes))

        def read(number: int) -> None:
            start = number * piece_bytes
            buffer = spare.get()
            try:
                view = buffer[: min(piece_bytes, size_bytes - start)]
                where = f"{checkpoint}/{name}, bytes {start} to {start + len(view)} (piece {number})"
                key = f"{self._prefix}{checkpoint}/{name}"
                try:
                    if ends:
                        stored = entry["stored_bytes"][number]
                        found = self._store.get_range(key, ends[number] - stored, stored)
                        compression.decompress(found, view)
                    elif (count := self._store.read_into(key, start, view)) != len(view):
                        raise DamagedCheckpointError(f"it ends after {count} bytes")
                except NotFoundError:
                    raise DamagedCheckpointError(f"{checkpoint}/{name} is missing") from None
                except DamagedCheckpointError as error:
                    raise DamagedCheckpointError(f"{where}: {error}") from error
                if f"{crc32(view):08x}" != sums[number]:
                    raise DamagedCheckpointError(f"{where}: another CRC-32 than its manifest says")
                use(start, view)
            finally:
                spare.put(buffer)

        with ThreadPoolExecutor(READERS, thread_name_prefix="holdfast-read") as pool:
            pending = [pool.submit(read, number) for number in numbers]
            try:
                for one in pending:
                    one.result()
            finally:
                for one in pending:
                    one.cancel()

    def verify(
        self,
        checkpoint: CheckpointId,
        manifest: Mapping[str, Any],
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Read everything the manifest lists. `progress` is told every so many bytes. Raises DamagedCheckpointError."""
        for name, entry in manifest["objects"].items():
            if "crc32" in entry:
                self.read_pieces(checkpoint, manifest, name, lambda _, piece: progress(len(piece)))
            else:
                progress(len(self.read(checkpoint, manifest, name)))

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

    def discard(self, checkpoint: CheckpointId) -> None:
        """It is damaged, and another is to take its place: it exists no more. Its data stays for whoever prunes."""
        self._store.delete(f"{self._prefix}{checkpoint}/{MANIFEST}")

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
        """Of the checkpoints that have an object whose name is `wanted`."""
        found = set()
        for info in self._store.list(self._prefix):
            name, slash, inner = info.key.removeprefix(self._prefix).partition("/")
            if slash and wanted(inner) and ID.fullmatch(name):
                found.add(CheckpointId.parse(name))
        return found


def rank_name(rank: int, token: str) -> str:
    """What a rank's objects are called when several save together."""
    return f"rank-{rank:05d}-{token}"


def image_bytes(entry: Mapping[str, Any]) -> int:
    """Of an image as it lies in memory; in the store it may be compressed."""
    return int(entry.get("image_bytes", entry["size_bytes"]))


def _compressed(pieces: Iterator[memoryview], pool: ThreadPoolExecutor) -> Iterator[tuple[memoryview, bytes]]:
    """Each with itself compressed; a few are compressed ahead."""
    waiting: deque[tuple[memoryview, Future[bytes]]] = deque()
    while True:
        while len(waiting) < COMPRESSED_AHEAD and (piece := next(pieces, None)) is not None:
            waiting.append((piece, pool.submit(compression.compress, piece)))
        if not waiting:
            return
        piece, result = waiting.popleft()
        yield piece, result.result()


def _check_entry(entry: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError, ValueError for what no writer writes."""
    if "sha256" in entry:
        _ = entry["size_bytes"] + 0, entry["sha256"]
        return
    if len(entry["crc32"]) != -(-image_bytes(entry) // entry["piece_bytes"]):
        raise ValueError(f"{len(entry['crc32'])} pieces of {entry['piece_bytes']} bytes make no {image_bytes(entry)}")
    if "encoding" in entry:
        if entry["encoding"] != compression.ENCODING:
            raise ConfigError(f"an object is encoded as {entry['encoding']!r}, which this Holdfast does not know")
        if len(entry["stored_bytes"]) != len(entry["crc32"]) or sum(entry["stored_bytes"]) != entry["size_bytes"]:
            raise ValueError("the sizes of the compressed pieces don't agree")


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
