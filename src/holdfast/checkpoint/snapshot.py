"""A consistent copy of the state in shared memory, taken while the next step already computes.

Forward and backward only read parameters and the optimizer's state, so these are copied by a thread meanwhile; the copy
is waited for just before an optimizer changes anything (a hook before every optimizer's step). All the rest (buffers,
generators, the user's own tensors) is copied at once. Programs that change parameters elsewhere are found out: the first
overlapped copy is compared with what is there when the optimizer comes, and every copy's version counters are.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.checkpoint.components import kind_of, parameters_of
from holdfast.checkpoint.image import Image, Spec, plan
from holdfast.checkpoint.slots import Slot
from holdfast.checkpoint.state import Leaf, TrainingState
from holdfast.checkpoint.tensors import dtypes
from holdfast.errors import ConfigError, HoldfastError

log = logging.getLogger(__name__)

MEMCMP = ctypes.CDLL(None).memcmp
MEMCMP.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
SMALL_BYTES = 4096
"""Smaller tensors are not worth a wait: an optimizer's step counters, for example."""
WORDS_BYTES = 256 * 1024
"""Room for JSON beyond what the first snapshot needs."""


@dataclass(slots=True)
class Snapshot:
    """One that is being taken, or was."""

    number: int
    slot: Slot
    step: int
    began: float
    folder: Path | None = None
    """A copy of the user's files that belongs to it; the persist process deletes it."""
    complete: bool = False
    hold_seconds: float = 0.0
    """How long the training was held up for it, so far (wall)."""
    held_from: float | None = None
    """Since when it is held up just now."""
    done: threading.Event = field(default_factory=threading.Event)


class Snapshots:
    """Takes snapshots into two slots of shared memory (one with `slots=1`); `offer` is told of each complete one."""

    def __init__(
        self,
        state: TrainingState,
        offer: Callable[[Snapshot], None],
        renew: Callable[[list[Slot]], None],
        slots: int = 2,
    ) -> None:
        """`renew` is told of new slots, which take the place of all earlier ones."""
        self._state, self._offer, self._renew = state, offer, renew
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
        self._late: list[tuple[Any, Any, int]] = []
        self._words = b""
        self._events: list[tuple[Any, Any]] = []
        """(device, event at the end of its copies)"""
        self.failure: Exception | None = None
        """Why the last snapshot came to nothing; the caller says so and clears it."""
        self._hook: Any = None
        if self._overlap:
            from torch.optim.optimizer import register_optimizer_step_pre_hook

            self._hook = register_optimizer_step_pre_hook(lambda *_: self.hold())

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
        began = time.monotonic()
        collected = self._state.collect()
        everything = {**words, "step": step, "tree": {**collected.tree, "shards": collected.shards()}}
        self._words = json.dumps(everything, separators=(",", ":")).encode()
        self._make_room({name: leaf.spec for name, leaf in collected.leaves.items()}, len(self._words))
        if (index := self._free_slot(wait)) is None:
            return None
        slot = self._slots[index]
        slot.clear()
        snapshot = Snapshot(self._next_number, slot, step, began, folder, held_from=began)
        self._numbers[index] = self._next_number
        self._next_number += 1
        if self._image:
            slot.image(len(self._image.header))[:] = self._image.header
        self._copy(index, collected.leaves, snapshot)
        if not self._late:
            self.settle()
        if not snapshot.complete:
            snapshot.hold_seconds, snapshot.held_from = time.monotonic() - began, None
        return snapshot

    def hold(self) -> None:
        """The optimizer is about to change what is being copied: it waits, or its device does."""
        if self._current is None:
            return
        if not self._proven or any(source.device.type == "cpu" for _, source, _ in self._late):
            self.settle()
            return
        for device, event in self._events:
            sys.modules["torch"].cuda.current_stream(device).wait_event(event)
        self._check_versions()
        self._late = []  # what changes from here on changes after the copy

    def settle(self) -> None:
        """Wait until the snapshot that is being taken is whole, and offered. What went wrong is in `failure`."""
        snapshot = self._current
        if snapshot is None:
            return
        if snapshot.held_from is None:
            snapshot.held_from = time.monotonic()
        snapshot.done.wait()
        self._current = None
        if snapshot.complete:
            return
        self._check_versions()
        if not self._proven and self._late and self.failure is None:
            self._proven = True
            if not all(_same(view, source) for view, source, _ in self._late):
                self._tear()
        self._finish(snapshot)

    def _finish(self, snapshot: Snapshot) -> None:
        """The copy is over: it becomes a snapshot, or comes to nothing."""
        self._late, self._events = [], []
        if snapshot.held_from is not None:
            snapshot.hold_seconds += time.monotonic() - snapshot.held_from
        if self.failure is None:
            snapshot.slot.complete(snapshot.number, self._image.size_bytes if self._image else 0, self._words)
        snapshot.slot.give_back()
        snapshot.complete = True
        if self.failure is None:
            self._offer(snapshot)

    def poll(self) -> None:
        """Offer the snapshot if it is whole by now."""
        if self._current is not None and self._current.done.is_set():
            self.settle()

    def _check_versions(self) -> None:
        """Every change of a tensor in place counts its version up."""
        if any(source._version != version for _, source, version in self._late):
            self._tear()

    def _tear(self) -> None:
        self._overlap = False
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
        views = self._views[index]
        may_wait = self._may_wait() if self._overlap else frozenset()
        now, late = [], []
        for name, leaf in leaves.items():
            waits = leaf.spec.size_bytes >= SMALL_BYTES and leaf.tensor.data_ptr() in may_wait
            (late if waits else now).append((views[name], leaf.tensor, leaf.tensor._version))
        self._current, self._late = snapshot, late
        _copy_all(now)
        _synchronize(source for _, source, _ in now)
        self._events = _copy_on_streams(late)
        on_cpu = [pair for pair in late if pair[1].device.type == "cpu"]

        def copy() -> None:
            try:
                _copy_all(on_cpu)
                for _, event in self._events:
                    event.synchronize()
                if self._proven and late:
                    self._check_versions()
                    self._finish(snapshot)  # at once: the next call from the loop may be a long step away
            except Exception as error:
                self.failure = error
            snapshot.done.set()

        if late:
            threading.Thread(target=copy, name="holdfast-snapshot", daemon=True).start()
        else:
            copy()

    def _may_wait(self) -> frozenset[int]:
        """Addresses of what only an optimizer's step changes."""
        found = set()
        for component in self._state.components.values():
            if kind_of(component) != "optimizer":
                continue
            for parameter in parameters_of(component):
                found.add(_local(parameter).data_ptr())
            for values in component.state.values():
                if isinstance(values, dict):
                    found.update(_local(value).data_ptr() for value in values.values() if hasattr(value, "data_ptr"))
        return frozenset(found)

    def _has_hooks(self) -> bool:
        return any(kind_of(component) == "optimizer" for component in self._state.components.values())


def _views(slot: Slot, image: Image) -> dict[str, Any]:
    """Name -> tensor over the slot's memory."""
    import torch

    flat = torch.frombuffer(slot.image(image.size_bytes), dtype=torch.uint8)
    views = {}
    for name, place in image.places.items():
        spec = place.spec
        views[name] = flat[place.start : place.stop].view(dtypes()[spec.dtype]).view(spec.shape)
    return views


def _copy_all(pairs: list[tuple[Any, Any, int]]) -> None:
    if pairs:
        import torch

        with torch.no_grad():
            torch._foreach_copy_([view for view, _, _ in pairs], [source for _, source, _ in pairs])


def _copy_on_streams(pairs: list[tuple[Any, Any, int]]) -> list[tuple[Any, Any]]:
    """Queue the copies from devices, each on a stream of its own beside the computation; events that tell their ends."""
    events = []
    for device in {source.device for _, source, _ in pairs if source.device.type == "cuda"}:
        torch = sys.modules["torch"]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            for view, source, _ in pairs:
                if source.device == device:
                    view.copy_(source, non_blocking=True)
                    source.record_stream(stream)
            event = torch.cuda.Event()
            event.record(stream)
        events.append((device, event))
    return events


def _synchronize(tensors: Any) -> None:
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        sys.modules["torch"].cuda.synchronize(device)


def _same(view: Any, source: Any) -> bool:
    """To the bit: a NaN is like itself."""
    here = source.detach().to("cpu").contiguous()
    # Not torch.equal: it takes seconds for a gigabyte.
    return int(MEMCMP(view.data_ptr(), here.data_ptr(), view.numel() * view.element_size())) == 0


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
