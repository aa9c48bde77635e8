"""A consistent copy of the state in shared memory, taken while the next step already computes.

Forward and backward only read parameters and the optimizer's state, so these are copied by a thread meanwhile. A hook before
every optimizer's step waits until what that step changes is copied: parameters with a gradient, and their state. The others
are copied while the training is already further. All the rest (buffers, generators, the user's own tensors) is copied at
once. Programs that change parameters elsewhere are found out: by the tensors' version counters, by samples of what was not
waited for, and the first overlapped copy is compared as a whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.checkpoint.components import kind_of, parameters_of
from holdfast.checkpoint.copying import Pair, copy_all, copy_beside, copy_on_streams, same, sample, synchronize
from holdfast.checkpoint.image import Image, Spec, plan
from holdfast.checkpoint.slots import Slot
from holdfast.checkpoint.state import Leaf, TrainingState
from holdfast.checkpoint.tensors import dtypes
from holdfast.errors import ConfigError, HoldfastError

log = logging.getLogger(__name__)

SMALL_BYTES = 4096
"""Smaller tensors are not worth a wait: an optimizer's step counters, for example."""
WORDS_BYTES = 256 * 1024
"""Room for JSON beyond what the first snapshot needs."""
TURN_BYTES = 16 * 1024 * 1024
"""The copying thread looks for what an optimizer waits for after so much (or one larger tensor)."""


@dataclass(slots=True)
class Snapshot:
    """One that is being taken, or was."""

    number: int
    slot: Slot
    step: int
    began: float
    image_bytes: int
    folder: Path | None = None
    """A copy of the user's files that belongs to it; the persist process deletes it."""
    complete: bool = False
    hold_seconds: float = 0.0
    """How long the training was held up for it, so far (wall)."""
    held_from: float | None = None
    """Since when it is held up just now."""
    copy_seconds: float = 0.0
    """From `began` until all of it was copied (wall)."""
    done: bool = False
    """Its thread is."""
    failed: bool = False


class Snapshots:
    """Takes snapshots into two slots of shared memory (one with `slots=1`); `offer` is told of each complete one."""

    def __init__(
        self,
        state: TrainingState,
        offer: Callable[[Snapshot], None],
        renew: Callable[[list[Slot]], None],
        slots: int = 2,
        announce: Callable[[Snapshot], None] = lambda snapshot: None,
    ) -> None:
        """`renew` is told of new slots, which take the place of all earlier ones; `announce` of a snapshot whose image may be
        read while it is being copied, as far as the slot's `copied_bytes` say.
        """
        self._state, self._offer, self._renew, self._announce = state, offer, renew, announce
        self._slot_count = slots
        self._slots: list[Slot] = []
        self._numbers: dict[int, int] = {}
        """Of the snapshot in each slot, by the slot's place."""
        self._specs: dict[str, Spec] | None = None
        self._image: Image | None = None
        self._views: list[dict[str, Any]] = []
        self._next_number = 1
        self._current: Snapshot | None = None
        self._overlap = self._has_hooks()
        self._proven = False
        self._selective = True
        """An optimizer's step waits for what it changes only."""
        self._late: list[Pair] = []
        """What the thread copies."""
        self._urgent: list[Pair] = []
        """What an optimizer waits for."""
        self._doubtful: list[Pair] = []
        """Of the first overlapped copy, until the end of the next step in which an optimizer comes."""
        self._optimizer_came = False
        self._progress = threading.Condition()
        self._events: list[tuple[Any, Any]] = []
        """(device, event at the end of its copies)"""
        self.failure: Exception | None = None
        """Why the last snapshot came to nothing; the caller says so and clears it."""
        self._hook: Any = None
        if self._overlap:
            from torch.optim.optimizer import register_optimizer_step_pre_hook

            self._hook = register_optimizer_step_pre_hook(
                lambda optimizer, given, named: self.hold(
                    optimizer, any(one is not None for one in (*given[1:], *named.values()))
                )
            )

    @property
    def in_progress(self) -> bool:
        return self._current is not None

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self.settle()

    # -- taking one ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Have the memory ready before the first snapshot needs it: the first touch costs more than the copy."""
        collected = self._state.collect()
        words = len(json.dumps(collected.tree))
        self._make_room({name: leaf.spec for name, leaf in collected.leaves.items()}, words)

    def take(
        self, step: int, words: Mapping[str, Any], folder: Path | None = None, wait: bool = False
    ) -> Snapshot | None:
        """Begin a snapshot of the state after `step`. `words`: what else is kept with it, as JSON.

        None when no slot is free (one is being made durable, and there is no second one); with `wait`, it waits.
        Returns as soon as the training may go on; `settle` ends it. Raises ConfigError for what can't be stored, and when
        there is no memory to store it in.
        """
        self.settle()
        self._resolve_doubts()
        if self._doubtful:  # the memory is needed: the next copy is the one to be proven
            self._doubtful, self._proven = [], False
        began = time.monotonic()
        collected = self._state.collect()
        everything = {**words, "step": step, "tree": {**collected.tree, "shards": collected.shards()}}
        text = json.dumps(everything, separators=(",", ":")).encode()
        self._make_room({name: leaf.spec for name, leaf in collected.leaves.items()}, len(text))
        if (index := self._free_slot(wait)) is None:
            return None
        slot = self._slots[index]
        image_bytes = self._image.size_bytes if self._image else 0
        snapshot = Snapshot(self._next_number, slot, step, began, image_bytes, folder, held_from=began)
        self._numbers[index] = self._next_number
        self._next_number += 1
        slot.begin(image_bytes, text)
        if self._image:
            slot.image(len(self._image.header))[:] = self._image.header
        try:
            self._copy(index, collected.leaves, snapshot)
        except BaseException:
            self._current, self._late, self._events = None, [], []
            slot.give_back()
            raise
        if not self._late:
            self.settle()
        with self._progress:
            if not snapshot.complete:
                snapshot.hold_seconds, snapshot.held_from = time.monotonic() - began, None
        return snapshot

    def hold(self, optimizer: Any, has_arguments: bool = False) -> None:
        """The step of `optimizer` is about to change what is being copied: it waits for that, or its device does.

        `has_arguments`: the step is called with some, for example a closure.
        """
        snapshot = self._current
        changed = self._changed_by(optimizer, has_arguments) if snapshot or self._doubtful else []
        if snapshot is None or not self._proven:
            self.settle()
            self._optimizer_came = True
            for pair in changed:
                pair.released = True
            return
        self._wait_for(snapshot, [pair for pair in changed if pair.on_cpu])
        if events := self._events:
            for device, event in events:
                sys.modules["torch"].cuda.current_stream(device).wait_event(event)
            # What changes on the devices from here on changes after the copy.
            self._release(snapshot, [pair for pair in self._late if not pair.on_cpu])

    def _wait_for(self, snapshot: Snapshot, pairs: list[Pair]) -> None:
        """Until they are copied; they may change then."""
        with self._progress:
            if waiting := [pair for pair in pairs if not pair.copied]:
                snapshot.held_from = time.monotonic()
                self._urgent = waiting
                self._progress.wait_for(lambda: snapshot.done or all(pair.copied for pair in waiting))
            if snapshot.held_from is not None and not snapshot.complete:
                snapshot.hold_seconds += time.monotonic() - snapshot.held_from
                snapshot.held_from = None
            self._release(snapshot, pairs)

    def _release(self, snapshot: Snapshot, pairs: list[Pair]) -> None:
        with self._progress:
            if snapshot.complete:
                return
            self._check(snapshot, pairs)
            for pair in pairs:
                pair.released = True

    def _changed_by(self, optimizer: Any, has_arguments: bool) -> list[Pair]:
        """Of what is being copied, what the step of `optimizer` may change.

        torch's own optimizers leave alone what has no gradient. Of others that is not known; and a closure, or a hook
        that comes after ours, makes gradients when it is too late to look for them.
        """
        pairs = self._late or self._doubtful
        is_known = type(optimizer).__module__.startswith("torch.optim.")
        if has_arguments or not is_known or not self._selective or self._is_followed(optimizer):
            return pairs
        try:
            changed = {
                tensor.untyped_storage().data_ptr() for tensor, has_gradient in _tensors(optimizer) if has_gradient
            }
        except RuntimeError:  # a sparse tensor has no such memory
            return pairs
        return [pair for pair in pairs if pair.storage in changed or pair.sample is None]

    def _is_followed(self, optimizer: Any) -> bool:
        """Do other hooks come after ours?"""
        everywhere = sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
        return bool(optimizer._optimizer_step_pre_hooks) or any(number > self._hook.id for number in everywhere)

    def settle(self) -> None:
        """Wait until the snapshot that is being taken is whole, and offered. What went wrong is in `failure`."""
        snapshot = self._current
        if snapshot is None:
            return
        if snapshot.held_from is None:
            snapshot.held_from = time.monotonic()
        with self._progress:
            self._progress.wait_for(lambda: snapshot.done)
        self._current = None
        if snapshot.complete:
            return
        self._check(snapshot, self._late)
        if not self._proven and self._late and not snapshot.failed:
            self._proven = True
            if all(same(pair) for pair in self._late):
                self._doubtful = [pair for pair in self._late if pair.sample is not None]
                self._optimizer_came = False
            else:
                self._tear(snapshot)
        self._finish(snapshot)

    def _finish(self, snapshot: Snapshot) -> None:
        """The copy is over: it becomes a snapshot, or comes to nothing."""
        self._late, self._events = [], []
        if snapshot.held_from is not None:
            snapshot.hold_seconds += time.monotonic() - snapshot.held_from
        if not snapshot.failed:
            snapshot.slot.complete(snapshot.number)
        snapshot.slot.give_back()
        snapshot.complete = True
        if not snapshot.failed:
            self._offer(snapshot)

    def poll(self) -> None:
        """Between two steps: offer the snapshot if it is whole by now."""
        self._resolve_doubts()
        if self._current is not None and self._current.done:
            self.settle()

    def _resolve_doubts(self) -> None:
        if not self._optimizer_came:
            return
        doubtful, self._doubtful = self._doubtful, []
        if not all(pair.released or same(pair) for pair in doubtful):
            # That snapshot had been whole before. Of later ones all is waited for.
            log.info("parameters without a gradient are changed after the optimizer's step")
            self._selective = False

    def _check(self, snapshot: Snapshot, pairs: list[Pair]) -> None:
        if not all(pair.is_sound for pair in pairs):
            self._tear(snapshot)

    def _tear(self, snapshot: Snapshot) -> None:
        if snapshot.failed:
            return  # it was said
        self._overlap, snapshot.failed = False, True
        self.failure = HoldfastError(
            "parameters are changed outside the optimizer's step: this snapshot was given up, and from now on the "
            "training is held up while one is taken"
        )

    # -- memory -------------------------------------------------------------------------------------------------------

    def _make_room(self, specs: dict[str, Spec], words_bytes: int) -> None:
        """Slots that the image and the words fit in, and views of them: anew when the state has changed its shape."""
        if specs != self._specs:
            self._specs, self._image, self._views = specs, plan(specs) if specs else None, []
        size = self._image.size_bytes if self._image else 0
        if not self._slots or not all(slot.fits(size, words_bytes) for slot in self._slots):
            self._views = []
            for slot in self._slots:
                slot.close()
            self._slots = self._make_slots(size, 2 * words_bytes + WORDS_BYTES)
            self._numbers = {}
            for slot in self._slots:
                _pin(slot)
            threading.Thread(target=_prefault, args=(self._slots,), daemon=True).start()
            self._renew(self._slots)
        if not self._views:
            self._views = [_views(slot, self._image) if self._image else {} for slot in self._slots]

    def _make_slots(self, image_bytes: int, words_bytes: int) -> list[Slot]:
        """As many as were asked for, or at least one. Raises ConfigError when there is no memory for that."""
        slots: list[Slot] = []
        try:
            for _ in range(self._slot_count):
                slots.append(Slot.make(image_bytes, words_bytes))
        except OSError as error:
            wanted = f"{image_bytes / 1e6:,.0f} MB of shared memory for a snapshot"
            if not slots:
                raise ConfigError(
                    f"there are no {wanted} ({error}): the state can't be saved on a machine with so little memory"
                ) from error
            log.warning("only one snapshot at a time: there are no more %s (%s)", wanted, error)
        return slots

    def _free_slot(self, wait: bool) -> int | None:
        """Oldest first: the newest snapshot is the one to keep until another is whole."""
        order = sorted(range(len(self._slots)), key=lambda index: self._numbers.get(index, 0))
        for index in order:
            if self._slots[index].take():
                return index
        if wait:
            self._slots[order[0]].take(wait=True)
            return order[0]
        return None

    # -- copying ------------------------------------------------------------------------------------------------------

    def _copy(self, index: int, leaves: Mapping[str, Leaf], snapshot: Snapshot) -> None:
        views, places = self._views[index], self._image.places if self._image else {}
        has_gradient = self._may_wait() if self._overlap else {}
        now, soon, later = [], [], []
        for name, leaf in leaves.items():
            source = leaf.tensor
            address = source.data_ptr()
            if source.nbytes < SMALL_BYTES or address not in has_gradient:
                now.append((views[name], source))
            else:  # what has a gradient from the last step, the next one most likely changes
                (soon if has_gradient[address] else later).append(Pair.of(views[name], source, places[name].start))
        late = [pair for some in (soon, later) for pair in sorted(some, key=lambda pair: pair.start)]
        for pair in late:
            pair.sample = sample(pair.source)
        self._current, self._late, self._urgent = snapshot, late, []
        copy_all(now)
        synchronize(source for _, source in now)
        self._events = events = copy_on_streams(late)

        is_announced = bool(late) and self._proven and not events
        if is_announced:
            self._announce(snapshot)

        def copy() -> None:
            try:
                self._copy_in_turns([pair for pair in late if pair.on_cpu], snapshot if is_announced else None)
                for _, event in events:
                    event.synchronize()
                snapshot.copy_seconds = time.monotonic() - snapshot.began
                with self._progress:
                    if self._proven and late:
                        self._check(snapshot, late)
                        self._finish(snapshot)  # at once: the next call from the loop may be a long step away
            except Exception as error:
                snapshot.failed, self.failure = True, error
            with self._progress:
                snapshot.done = True
                self._progress.notify_all()

        if late and self._proven:
            threading.Thread(target=copy, name="holdfast-snapshot", daemon=True).start()
        else:
            # The first one is copied before the program goes on: what differs from it when the optimizer comes was changed
            # by something else, whatever way it was written.
            copy()

    def _copy_in_turns(self, pairs: list[Pair], announced: Snapshot | None) -> None:
        """In their order, but first what an optimizer waits for. How far `announced` is copied, its slot tells."""
        left = iter(pairs)
        in_image = deque(sorted(pairs, key=lambda pair: pair.start))
        while True:
            with self._progress:
                turn = [pair for pair in self._urgent if not pair.copied]  # what is copied may have changed since
                self._urgent = []
            if not turn:
                turn = list(_until(TURN_BYTES, (pair for pair in left if not pair.copied)))
            if not turn:
                return
            copy_beside(turn)
            with self._progress:
                for pair in turn:
                    pair.copied = True
                self._progress.notify_all()
            while in_image and in_image[0].copied:
                in_image.popleft()
            if announced:
                announced.slot.copied_bytes = in_image[0].start if in_image else announced.image_bytes

    def _may_wait(self) -> dict[int, bool]:
        """Addresses of what only an optimizer's step changes; has it a gradient just now?"""
        found: dict[int, bool] = {}
        for component in self._state.components.values():
            if kind_of(component) == "optimizer":
                for tensor, has_gradient in _tensors(component):
                    found[tensor.data_ptr()] = has_gradient or found.get(tensor.data_ptr(), False)
        return found

    def _has_hooks(self) -> bool:
        return any(kind_of(component) == "optimizer" for component in self._state.components.values())


def _tensors(optimizer: Any) -> Iterator[tuple[Any, bool]]:
    """Its parameters and their states, and whether the parameter has a gradient."""
    for parameter in parameters_of(optimizer):
        has_gradient = parameter.grad is not None
        yield _local(parameter), has_gradient
        values = optimizer.state.get(parameter)
        for value in values.values() if isinstance(values, dict) else ():
            if hasattr(value, "data_ptr"):
                yield _local(value), has_gradient


def _until(size_bytes: int, pairs: Iterator[Pair]) -> Iterator[Pair]:
    """As many of `pairs` as make up `size_bytes`."""
    for pair in pairs:
        yield pair
        size_bytes -= pair.size_bytes
        if size_bytes <= 0:
            return


def _views(slot: Slot, image: Image) -> dict[str, Any]:
    """Name -> tensor over the slot's memory."""
    import torch

    flat = torch.frombuffer(slot.image(image.size_bytes), dtype=torch.uint8)
    views = {}
    for name, place in image.places.items():
        spec = place.spec
        views[name] = flat[place.start : place.stop].view(dtypes()[spec.dtype]).view(spec.shape)
    return views


def _local(tensor: Any) -> Any:
    return getattr(tensor, "_local_tensor", tensor)


def _pin(slot: Slot) -> None:
    """Page-locked memory is what a GPU copies to without the processor's help."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    flat = torch.frombuffer(slot.memory, dtype=torch.uint8)
    if torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), slot.capacity_bytes, 0):
        log.warning("the snapshots' memory could not be page-locked: copies from the GPU are slower")


def _prefault(slots: list[Slot]) -> None:
    for slot in slots:
        with contextlib.suppress(ValueError):  # closed meanwhile
            slot.prefault()
