"""A training state as one flat image: a safetensors file, header first, whose places are known before a byte is copied.

https://github.com/huggingface/safetensors#format: eight bytes with the header's length, a JSON header with every
tensor's type, shape and place, then the bytes, without a hole. Standard library only.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from holdfast.errors import DamagedCheckpointError

ALIGNMENT = 64
"""Of the data's begin, and of every tensor whose size allows it."""
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
LONGEST_HEADER_BYTES = 100_000_000  # as the safetensors library has it


class Spec(NamedTuple):
    """What is known of a tensor before its bytes are: the element type by its name in the layout, and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in its image; `start` counts from the image's first byte, header included."""

    spec: Spec
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.spec.size_bytes


@dataclass(frozen=True, slots=True)
class Image:
    header: bytes
    places: Mapping[str, Place]
    size_bytes: int
    """Header and data."""


def plan(specs: Mapping[str, Spec]) -> Image:
    """Every tensor's place. Tensors that would leave the next one crooked come last, so that no element is crooked."""
    order = sorted(
        specs, key=lambda name: (specs[name].size_bytes % ALIGNMENT != 0, -ITEM_BYTES[specs[name].dtype], name)
    )
    offsets, offset = {}, 0
    for name in order:
        offsets[name] = offset
        offset += specs[name].size_bytes
    entries = {
        name: {
            "dtype": specs[name].dtype,
            "shape": specs[name].shape,
            "data_offsets": [offsets[name], offsets[name] + specs[name].size_bytes],
        }
        for name in order
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    places = {name: Place(specs[name], len(header) + offsets[name]) for name in order}
    return Image(header, places, len(header) + offset)


def header_bytes(head: bytes | memoryview) -> int:
    """How long the header is, its length's eight bytes included; from the image's first eight bytes."""
    try:
        (length,) = struct.unpack_from("<Q", head)
    except struct.error as error:
        raise DamagedCheckpointError(f"not a safetensors file: {error}") from error
    if length > LONGEST_HEADER_BYTES:
        raise DamagedCheckpointError(f"not a safetensors file: its header would have {length} bytes")
    return 8 + int(length)


def read_places(header: bytes | memoryview, size_bytes: int) -> dict[str, Place]:
    """The places of an image of `size_bytes` from its whole header. Raises DamagedCheckpointError."""
    try:
        length = header_bytes(header)
        entries = json.loads(bytes(header[8:length]))
        places = {}
        for name, entry in entries.items():
            if name == "__metadata__":  # the layout's place for remarks; other tools make some
                continue
            spec = Spec(entry["dtype"], tuple(entry["shape"]))
            start, stop = entry["data_offsets"]
            if spec.size_bytes != stop - start or start < 0 or length + stop > size_bytes:
                raise ValueError(f"{name} has {stop - start} bytes at {start}")
            places[name] = Place(spec, length + start)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedCheckpointError(f"not a safetensors file: {error!r}") from error
    return places
