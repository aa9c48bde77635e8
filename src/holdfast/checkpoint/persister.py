"""What the persist process does: makes snapshots durable out of shared memory, one at a time, always the newest."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.checkpoint import compression
from holdfast.checkpoint.commits import COMPRESSED, PIECE_BYTES, STATE, TREE, CheckpointId, Checkpoints, rank_name
from holdfast.checkpoint.folders import FILES, file_pieces, plain_files
from holdfast.checkpoint.reporting import Reporter
from holdfast.checkpoint.slots import Slot
from holdfast.errors import AlreadyExistsError, DamagedCheckpointError, HoldfastError, NotFoundError, TransientError
from holdfast.runtime.contract import metrics_prefix
from holdfast.storage import ObjectStore

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
ORPHAN_SECONDS = 60.0
"""How long it goes on trying when the training process is gone."""
PARTS_SECONDS = 600.0
"""How long the publishing rank waits for the others' parts."""
REMEASURE_IMAGES = 50
"""After so many images, what compression does to the state is measured again: weights are not what they were."""
OFFER_SECONDS = 10.0
"""A snapshot that is whole is offered at once; without that it only lacks how long it held the training up."""
LOOK_SECONDS = 0.001
"""How often it looks how far a snapshot is copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place among those that save one state together."""

    rank: int = 0
    world_size: int = 1
    token: str = ""
    """Drawn anew whenever the ranks start: objects of another start never mix with ours, or take their place."""
    tells: bool = True
    """Is it the one of its machine that reports?"""

    @property
    def publishes(self) -> bool:
        return self.rank == 0


@dataclass(slots=True)
class Offer:
    number: int
    slot: Slot
    step: int
    began: float
    """time.monotonic() when the snapshot was begun: one clock for all processes of a machine."""
    hold_seconds: float
    folder: Path | None = None
    is_copied: bool = True
    """False: it was announced; what is copied already may be written, and when all of it is, it is offered as well."""
    is_ours: bool = False
    """We have its slot."""
    commit_began: float = 0.0
    """time.monotonic() when its writing was begun: of an announced one that is before its copy ends. A plan for a notice's
    seconds then counts on more than such a save takes after its copy, and one that waits behind another does take it.
    """


class _GivenUpError(Exception):
    """An announced snapshot came to nothing: the training has said so, and has a newer one soon."""


@dataclass(slots=True)
class Orders:
    """What the training process says first."""

    ranks: Ranks
    max_to_keep: int
    compression: str
    """'auto' or 'off'."""
    budget_seconds: float
    """A save that takes longer (wall) is said to be late."""
    parent: CheckpointId | None = None


@dataclass
class Persister:
    store: ObjectStore
    run_id: str
    attempt: int
    orders: Orders
    reporter: Reporter
    speed: float
    tell: Callable[[dict[str, Any]], None]
    """Says to the training process what became of a snapshot; must not raise."""
    reads_along: bool = False
    """A snapshot is written while it is still being copied."""
    fenced: bool = False
    _may_be_committed: bool = True
    """What is next to be committed: the process before this one may have done it, or a try whose answer was lost."""
    _link_bytes_per_second: float = 0.0
    _gain: compression.Gain | None = None
    _images_since_gain: int = 0
    _waiting: Offer | None = None
    _in_work: Offer | None = None
    """Or the one that was, for as long as there is no other."""
    _works: bool = False
    _orphaned_at: float | None = None
    _unconfirmed: list[tuple[CheckpointId, float, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._checkpoints = Checkpoints(self.store, self.run_id)
        self._changed = threading.Condition()

    # -- from the thread that listens ---------------------------------------------------------------------------------

    def offer(self, offer: Offer) -> None:
        """Commit this one next; an older one that still waits is dropped."""
        if not (offer.is_copied or self.reads_along):
            return
        dropped = None
        with self._changed:
            if self._in_work and self._in_work.number == offer.number:  # it was announced
                self._in_work.hold_seconds, self._in_work.is_copied = offer.hold_seconds, True
                if self._works:  # before the training wants its slot for another, however slowly this one is written
                    self._take_over(self._in_work)
            elif offer.is_copied or self._waiting is None:  # one that is not yet whole takes no whole one's place
                dropped, self._waiting = self._waiting, offer
                if dropped:
                    self._leave(dropped)
            self._changed.notify_all()
        if dropped and dropped.number != offer.number:
            _discard(dropped)

    def retire(self, slots: list[Slot]) -> None:
        """They are filled no more. Each is closed when nothing in it is still to become durable."""
        with self._changed:
            in_use = [one.slot for one in (self._waiting, self._in_work if self._works else None) if one]
            for slot in slots:
                slot.retired = True
                if not any(slot is one for one in in_use):
                    slot.close()

    def orphan(self) -> None:
        """The training process is gone: finish what there is, and end."""
        with self._changed:
            self._orphaned_at = time.monotonic()
            self._changed.notify_all()

    # -- the work -----------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Until the training process is gone and everything it offered is durable, or time for that is up."""
        pause = FIRST_PAUSE_SECONDS
        while not self.fenced:
            with self._changed:
                self._changed.wait_for(self._has_work, 0.1 if self._unconfirmed else None)
                offer, self._waiting = self._waiting, None
                self._in_work, self._works = offer or self._in_work, offer is not None
            if offer is None:
                self._confirm()
                if self._orphaned_at is not None and (not self._unconfirmed or self._out_of_time):
                    return
                continue
            if offer.slot.closed:
                _discard(offer)
                continue
            if offer.is_copied and not self._take_over(offer):
                if self._out_of_time:
                    return
                self._again(offer, 0.02)  # the training overwrites it, and has a newer one soon
                continue
            try:
                failed = self._try(offer)
            finally:
                self._leave(offer)
            self._may_be_committed = failed is not None
            if failed is None:
                with self._changed:
                    self._leave(offer)  # its offer may have come just now
                    self._works = False
                    if offer.slot.retired:
                        offer.slot.close()
                pause = FIRST_PAUSE_SECONDS
                _discard(offer)
                continue
            self.tell({"kind": "failed", "number": offer.number, "step": offer.step, "error": failed})
            if self._out_of_time:
                return
            self._again(offer, pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _take_over(self, offer: Offer) -> bool:
        """Is its slot ours by now? Whoever filled it has finished then, or is dead."""
        with self._changed:
            if not offer.is_ours and offer.slot.take():
                offer.is_ours = True
                if offer.slot.number == offer.number:
                    self._say_begun(offer)
            return offer.is_ours

    def _has_work(self) -> bool:
        return self._waiting is not None or (self._orphaned_at is not None and not self._unconfirmed)

    @property
    def _out_of_time(self) -> bool:
        return self._orphaned_at is not None and time.monotonic() - self._orphaned_at > ORPHAN_SECONDS

    def _again(self, offer: Offer, seconds: float) -> None:
        """After a pause, or as soon as it is ours, unless a newer one comes meanwhile. One that is only announced gives way:
        its offer will follow.
        """

        def is_newer() -> bool:
            return self._waiting is not None and self._waiting.is_copied

        with self._changed:
            self._changed.wait_for(lambda: is_newer() or offer.is_ours, seconds)
            if not is_newer():
                self._waiting = offer
                return
            self._leave(offer)
        _discard(offer)

    def _leave(self, offer: Offer) -> None:
        with self._changed:
            if offer.is_ours:
                offer.slot.give_back()
                offer.is_ours = False

    def _try(self, offer: Offer) -> str | None:
        """Why the snapshot could not be made durable; None when it could."""
        late = threading.Timer(
            max(0.0, offer.began + self.orders.budget_seconds - time.monotonic()), self._say_late, [offer]
        )
        late.daemon = True
        late.start()
        try:
            self._commit(offer)
        except _GivenUpError:
            log.info("a snapshot came to nothing while it was being written step=%s", offer.step)
        except Exception as error:  # whatever it is: it must not end this process, and must not go unsaid
            said = str(error) or repr(error)
            log.warning("commit failed step=%s error=%r", offer.step, error)
            seconds = (time.monotonic() - offer.began) * self.speed
            self.reporter.event("commit-failed", step=offer.step, error=said, seconds=seconds)
            return said
        finally:
            late.cancel()
        return None

    def _say_late(self, offer: Offer) -> None:
        seconds = time.monotonic() - offer.began
        self.reporter.event(
            "commit-late",
            step=offer.step,
            seconds=seconds * self.speed,
            budget_seconds=self.orders.budget_seconds * self.speed,
        )

    def _commit(self, offer: Offer) -> None:
        if offer.is_ours and offer.slot.number != offer.number:
            raise _GivenUpError
        if self._checkpoints.superseded(self.attempt):
            self.fenced = True
            self.tell({"kind": "fenced"})
            return
        checkpoint = CheckpointId(self.attempt, offer.step)
        offer.commit_began = time.monotonic()
        # A folder's files have the same names whoever saves them.
        if (self._may_be_committed or offer.folder) and (manifest := self._committed_as(checkpoint)):
            self._committed(checkpoint, self._facts(offer, manifest["objects"]), was_found=True)
            return
        objects = self._write_image(checkpoint, offer)
        with self._changed:
            self._changed.wait_for(lambda: offer.is_copied or self._orphaned_at is not None, OFFER_SECONDS)
        words = json.loads(offer.slot.words())
        self._write_metrics(checkpoint, words.pop("metrics", []))
        objects |= self._write_tree(checkpoint, offer, words.pop("tree"))
        ranks = self.orders.ranks
        if ranks.world_size > 1:
            self._checkpoints.write_part(checkpoint, rank_name(ranks.rank, ranks.token), objects)
            offer.slot.give_back()  # it is durable; what is waited for from here on is the others'
            self.tell({"kind": "part", "number": offer.number, "step": offer.step})
        if not ranks.publishes:
            facts = self._facts(offer, objects)
            self._unconfirmed.append((checkpoint, time.monotonic() + PARTS_SECONDS, facts))
            self._confirm()
            return
        if ranks.world_size > 1:
            objects = self._all_parts(checkpoint)
        parent = str(self.orders.parent) if self.orders.parent else None
        manifest = {"kind": "state", "parent": parent, **words, "ranks": self._rank_objects(objects)}
        try:
            self._checkpoints.publish(checkpoint, objects, manifest)
        except AlreadyExistsError:
            if self._committed_as(checkpoint) is None:
                raise TransientError(f"{checkpoint} was there, and is gone") from None
        self._committed(checkpoint, self._facts(offer, objects))
        try:
            self._checkpoints.prune(self.attempt, self.orders.max_to_keep)
        except HoldfastError as error:  # the next commit does it; what is committed must not be written again
            log.warning("older checkpoints were not removed error=%s", error)

    def _say_begun(self, offer: Offer) -> None:
        """Its copy is whole, and its slot is ours."""
        self.tell({"kind": "begun", "number": offer.number, "step": offer.step, "began": time.monotonic()})
        self._phase("commit", offer.step)

    def _wait_for_copy(self, offer: Offer, stop: int, image_bytes: int) -> None:
        """Until the image's bytes below `stop` are copied; before the last of them, until the slot is ours with the whole
        snapshot in it. Raises _GivenUpError when that can't come any more.
        """
        while not self._take_over(offer):
            if stop < image_bytes and offer.slot.copied_bytes >= stop:
                return
            if self._out_of_time:  # the training is gone, and a process that it forked keeps the slot
                raise _GivenUpError
            time.sleep(LOOK_SECONDS)
        if offer.slot.number != offer.number:
            raise _GivenUpError

    def _committed_as(self, checkpoint: CheckpointId) -> dict[str, Any] | None:
        """The manifest, when this step of this attempt was committed before: by an earlier try of ours, by the process before
        this one, or by another program that saves to this run. Its objects have other names than ours: is it damaged, it
        gives way to ours, which is whole.
        """
        try:
            manifest = self._checkpoints.manifest(checkpoint)
            if [rank["tree"] for rank in manifest.get("ranks", ())] != [
                self._names(rank)[0] for rank in self._all_ranks
            ]:
                log.warning("another process saves to the same attempt checkpoint=%s", checkpoint)
                self._checkpoints.verify(checkpoint, manifest)
        except NotFoundError:
            return None
        except DamagedCheckpointError as error:
            log.warning("a damaged checkpoint is written anew checkpoint=%s error=%s", checkpoint, error)
            self._checkpoints.discard(checkpoint)
            return None
        return manifest

    @property
    def _all_ranks(self) -> range:
        return range(self.orders.ranks.world_size)

    def _names(self, rank: int) -> tuple[str, str]:
        """Of a rank's tree and image."""
        ranks = self.orders.ranks
        if ranks.world_size == 1:
            folder = f"{ranks.token}/" if ranks.token else ""
            return folder + TREE, folder + STATE
        name = rank_name(rank, ranks.token)
        return f"{name}.json", f"{name}.safetensors"

    def _rank_objects(self, objects: Mapping[str, Any]) -> list[dict[str, str]]:
        found = []
        for tree, state in map(self._names, self._all_ranks):
            found.append({"tree": tree, "state": state + COMPRESSED if state + COMPRESSED in objects else state})
        return found

    @staticmethod
    def _facts(offer: Offer, objects: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "number": offer.number,
            "step": offer.step,
            "bytes": sum(entry["size_bytes"] for entry in objects.values()),
            "hold_seconds": offer.hold_seconds,
            "began": offer.began,
            "commit_began": offer.commit_began,
        }

    def _write_image(self, checkpoint: CheckpointId, offer: Offer) -> dict[str, Any]:
        """The slot is ours when it is written."""
        image, waited = offer.slot.image(), 0.0

        def wait_for(stop: int) -> None:
            nonlocal waited
            from_then = time.monotonic()
            self._wait_for_copy(offer, stop, len(image))
            waited += time.monotonic() - from_then

        if not len(image):
            wait_for(0)
            return {}
        _, name = self._names(self.orders.ranks.rank)
        compressed = self._compression_pays(image, wait_for)
        began = time.monotonic()
        written = self._checkpoints.write_image(checkpoint, name, image, compressed, wait_for)
        size_bytes = sum(entry["size_bytes"] for entry in written.values())
        self._link_bytes_per_second = size_bytes / max(1e-6, time.monotonic() - began - waited)
        return written

    def _write_tree(self, checkpoint: CheckpointId, offer: Offer, tree: Mapping[str, Any]) -> dict[str, Any]:
        ranks = self.orders.ranks
        name, _ = self._names(ranks.rank)
        text = json.dumps(tree, separators=(",", ":")).encode()
        objects = {name: self._checkpoints.write(checkpoint, name, [text])}
        if offer.folder and ranks.publishes:
            for name, path in plain_files(offer.folder):
                objects[FILES + name] = self._checkpoints.write(checkpoint, FILES + name, file_pieces(path))
        return objects

    def _compression_pays(self, image: memoryview, wait_for: Callable[[int], None]) -> bool:
        """By what the link was last seen to do, and what compression does to this state; asked anew now and then."""
        if self.orders.compression == "off" or not self._link_bytes_per_second or not compression.is_available():
            return False
        if self._gain is None or self._images_since_gain >= REMEASURE_IMAGES:
            wait_for(len(image))
            self._gain, self._images_since_gain = compression.measure(image, PIECE_BYTES), 0
        self._images_since_gain += 1
        return len(image) >= PIECE_BYTES and self._gain.pays(self._link_bytes_per_second)

    def _write_metrics(self, checkpoint: CheckpointId, metrics: list[tuple[int, Mapping[str, float]]]) -> None:
        """Durable before the manifest: a committed step never lacks its metrics."""
        if metrics:
            lines = [json.dumps({"step": step, "attempt": self.attempt, "metrics": values}) for step, values in metrics]
            self.store.put(f"{metrics_prefix(self.run_id)}{checkpoint}.jsonl", "\n".join(lines).encode())

    def _all_parts(self, checkpoint: CheckpointId) -> dict[str, Any]:
        """Every rank's objects, once all are durable. Raises TransientError when a rank's never come."""
        ranks = self.orders.ranks
        wanted = {rank_name(rank, ranks.token) for rank in range(ranks.world_size)}
        give_up_at, pause = time.monotonic() + PARTS_SECONDS, 0.02
        overtaken: set[str] = set()
        while True:
            parts = self._checkpoints.read_parts(checkpoint)
            if wanted <= parts.keys():
                return {name: entry for rank in sorted(wanted) for name, entry in parts[rank].items()}
            # Each rank saves one after the other: who has saved a newer state has nothing of this one any more.
            # And who found this step committed, by another start of the program, writes no part at all.
            is_over = overtaken - parts.keys() or self._checkpoints.exists(checkpoint)
            if is_over or time.monotonic() > give_up_at or self._out_of_time:
                raise TransientError(
                    f"{checkpoint}: {', '.join(sorted(wanted - parts.keys()))} did not save their parts"
                )
            if newer := self._waiting:
                overtaken = wanted & self._checkpoints.read_parts(CheckpointId(self.attempt, newer.step)).keys()
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _confirm(self) -> None:
        """Have the checkpoints that others publish come to be?"""
        for entry in list(self._unconfirmed):
            checkpoint, give_up_at, facts = entry
            with contextlib.suppress(HoldfastError):
                if self._checkpoints.exists(checkpoint):
                    self._unconfirmed.remove(entry)
                    self._committed(checkpoint, facts)
                    continue
            if time.monotonic() > give_up_at:
                self._unconfirmed.remove(entry)

    def _committed(self, checkpoint: CheckpointId, facts: Mapping[str, Any], was_found: bool = False) -> None:
        """`was_found`: it was there before this try, which then tells nothing of how long a commit takes."""
        self.orders.parent = checkpoint
        self._phase("committed", checkpoint.step)
        now = time.monotonic()
        seconds, hold = now - facts["commit_began"], facts["hold_seconds"]
        if self.orders.ranks.tells:
            self.reporter.event(
                "committed",
                step=checkpoint.step,
                bytes=facts["bytes"],
                snapshot_seconds=hold * self.speed,
                stall_seconds=hold * self.speed,
                wall_stall_seconds=hold,
                commit_seconds=seconds * self.speed,
                wall_commit_seconds=seconds,
                wall_durable_seconds=now - facts["began"],
            )
        self.tell(
            {
                "kind": "committed",
                "number": facts["number"],
                "step": checkpoint.step,
                "bytes": facts["bytes"],
                "commit_seconds": None if was_found else seconds,
            }
        )

    def _phase(self, name: str, step: int) -> None:
        if self.orders.ranks.tells:
            self.reporter.phase(name, step)


def _discard(offer: Offer) -> None:
    if offer.folder:
        shutil.rmtree(offer.folder, ignore_errors=True)
