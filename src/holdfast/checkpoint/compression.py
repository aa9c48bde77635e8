"""Compression of images, for links that are slower than a processor compresses.

Trained floating-point numbers hardly compress: sorted by byte significance first, zstd's fastest level takes a fifth off
fp32 state at 0.8 GB/s and core. So it pays on links below some 150 MB/s only, and what it would bring is measured on the
state and the link at hand. Needs the packages zstandard and numpy; without them nothing is compressed.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from typing import Any

from holdfast.errors import ConfigError, DamagedCheckpointError

ENCODING = "zstd-shuffled"
LEVEL = 1
WORTH_IT = 1.1
"""It must shorten the time to durable by this factor at least: it takes a core's time."""
SAMPLES = 3
ITEM_BYTES = 4
"""Bytes of one significance are put together as of fp32, which is most of a state; any other type is correct too."""


def is_available() -> bool:
    return all(importlib.util.find_spec(name) for name in ("zstandard", "numpy"))


def compress(piece: Any) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL).compress(_shuffled(piece))


def decompress(stored: Any, into: memoryview) -> None:
    """Fill `into` exactly. Raises DamagedCheckpointError, ConfigError when the packages are missing."""
    if not is_available():
        raise ConfigError(
            "this checkpoint is compressed, and reading it needs the packages zstandard and numpy; install "
            "holdfast[fast] where it is read"
        )
    import zstandard

    try:
        plain = zstandard.ZstdDecompressor().decompress(stored, max_output_size=len(into))
    except zstandard.ZstdError as error:
        raise DamagedCheckpointError(f"a compressed piece can't be read: {error}") from error
    if len(plain) != len(into):
        raise DamagedCheckpointError(f"a compressed piece has {len(plain)} bytes, not {len(into)}")
    _unshuffle(plain, into)


@dataclass(frozen=True, slots=True)
class Gain:
    """What compression was measured to do to a state."""

    ratio: float
    bytes_per_second: float

    def pays(self, link_bytes_per_second: float) -> bool:
        """Compressing and sending overlap, so the slower of the two counts."""
        compressed = min(self.bytes_per_second, self.ratio * link_bytes_per_second)
        return compressed > WORTH_IT * link_bytes_per_second


def measure(image: memoryview, piece_bytes: int) -> Gain:
    """On a few pieces, spread over the image."""
    count = max(1, len(image) // piece_bytes)
    numbers = sorted({(2 * sample + 1) * count // (2 * SAMPLES) for sample in range(SAMPLES)})
    plain = stored = 0
    began = time.perf_counter()
    for number in numbers:
        piece = image[number * piece_bytes : (number + 1) * piece_bytes]
        plain += len(piece)
        stored += len(compress(piece))
    return Gain(plain / max(1, stored), plain / max(1e-9, time.perf_counter() - began))


def _shuffled(piece: Any) -> Any:
    import numpy

    raw = numpy.frombuffer(piece, dtype=numpy.uint8)
    whole = len(raw) - len(raw) % ITEM_BYTES
    made = numpy.empty(len(raw), dtype=numpy.uint8)
    made[:whole].reshape(ITEM_BYTES, -1)[:] = raw[:whole].reshape(-1, ITEM_BYTES).T
    made[whole:] = raw[whole:]
    return made


def _unshuffle(plain: bytes, into: memoryview) -> None:
    import numpy

    raw, made = numpy.frombuffer(plain, dtype=numpy.uint8), numpy.frombuffer(into, dtype=numpy.uint8)
    whole = len(raw) - len(raw) % ITEM_BYTES
    made[:whole].reshape(-1, ITEM_BYTES)[:] = raw[:whole].reshape(ITEM_BYTES, -1).T
    made[whole:] = raw[whole:]
