"""How tensors are copied to a snapshot's memory, and how it is told whether a copy is one of what was there."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

MEMCMP, MEMMOVE = ctypes.CDLL(None).memcmp, ctypes.CDLL(None).memmove
MEMCMP.argtypes = MEMMOVE.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
MEMMOVE.restype = ctypes.c_void_p
SAMPLE_BYTES = 64
"""Of a tensor's beginning, middle and end."""


@dataclass(slots=True, eq=False)
class Pair:
    """A tensor, and the memory that it is copied to."""

    view: Any
    source: Any
    start: int
    """Its place in the image."""
    storage: int
    """Address of the memory that it is, or is a view of."""
    version: int
    """Every change of a tensor in place counts it up."""
    sample: bytes | None = None
    """Some of it before the copy; None where the tensor is not its bytes in the processor's memory."""
    copied: bool = False
    released: bool = False
    """It is copied, and an optimizer may change it."""

    @classmethod
    def of(cls, view: Any, source: Any, start: int) -> Pair:
        return cls(view, source, start, source.untyped_storage().data_ptr(), source._version)

    @property
    def on_cpu(self) -> bool:
        return bool(self.source.device.type == "cpu")

    @property
    def size_bytes(self) -> int:
        return int(self.source.nbytes)

    @property
    def is_sound(self) -> bool:
        """It is the copy of what was there when the snapshot was begun, as far as that can be told."""
        if self.released:
            return True
        if self.source._version != self.version or sample(self.source) != self.sample:
            return False
        # What was changed and changed back meanwhile shows in the copy.
        return not self.copied or self.sample is None or sample(self.view) == self.sample


def copy_all(pairs: list[tuple[Any, Any]]) -> None:
    if pairs:
        import torch

        with torch.no_grad():
            torch._foreach_copy_([view for view, _ in pairs], [source for _, source in pairs])


def copy_beside(pairs: list[Pair]) -> None:
    """While the training computes: memmove takes less from its steps than a copy by torch, but where torch may use
    several threads, that is sooner over.
    """
    import torch

    alone = torch.get_num_threads() == 1
    for pair in pairs:
        if alone and pair.sample is not None:
            MEMMOVE(pair.view.data_ptr(), pair.source.data_ptr(), pair.size_bytes)
        else:
            with torch.no_grad():
                pair.view.copy_(pair.source)


def copy_on_streams(pairs: list[Pair]) -> list[tuple[Any, Any]]:
    """Queue the copies from devices, each on a stream of its own beside the computation; events that tell their ends."""
    events = []
    for device in {pair.source.device for pair in pairs if pair.source.device.type == "cuda"}:
        torch = sys.modules["torch"]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            for pair in pairs:
                if pair.source.device == device:
                    pair.view.copy_(pair.source, non_blocking=True)
                    pair.source.record_stream(stream)
            event = torch.cuda.Event()
            event.record(stream)
        events.append((device, event))
    return events


def synchronize(tensors: Any) -> None:
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        sys.modules["torch"].cuda.synchronize(device)


def same(pair: Pair) -> bool:
    """To the bit: a NaN is like itself."""
    here = pair.source.detach().to("cpu").contiguous()
    # Not torch.equal: it takes seconds for a gigabyte.
    return int(MEMCMP(pair.view.data_ptr(), here.data_ptr(), pair.size_bytes)) == 0


def sample(tensor: Any) -> bytes | None:
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    if not tensor.data_ptr():  # its memory was given back
        return None
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    places = (start, start + size // 2, start + size - SAMPLE_BYTES)
    return b"".join(ctypes.string_at(place, SAMPLE_BYTES) for place in places)
