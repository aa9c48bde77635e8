"""Recorded availability of a capacity pool, in the format of the public spot traces."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from holdfast.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Trace:
    """Whether one pool had a machine to give, tick by tick."""

    gap_seconds: float
    """Length of a tick."""
    available: bytes
    """One byte a tick, 1 or 0. `numpy.frombuffer(trace.available, numpy.uint8)` is an array of it."""
    name: str
    """The file's name without its ending, for example us-west-2a_v100_1."""

    @property
    def seconds(self) -> float:
        return len(self.available) * self.gap_seconds

    def at(self, seconds: float) -> bool:
        """Whether the pool is available so long after the trace's start. Raises IndexError past its end."""
        return bool(self.available[int(seconds // self.gap_seconds)])

    def on_ticks_of(self, gap_seconds: float) -> Trace:
        """The same on another tick: the state that holds at the start of each new tick, as an observer would see it."""
        ticks = math.floor(self.seconds / gap_seconds + 1e-9)
        last = len(self.available) - 1
        picked = bytes(
            self.available[min(last, math.floor(tick * gap_seconds / self.gap_seconds + 1e-9))] for tick in range(ticks)
        )
        return Trace(gap_seconds, picked, self.name)

    def runs(self) -> list[tuple[bool, int]]:
        """(available, ticks) of each stretch without a change, in order. The first and the last are cut off."""
        found: list[tuple[bool, int]] = []
        for tick in self.available:
            if found and found[-1][0] == bool(tick):
                found[-1] = (bool(tick), found[-1][1] + 1)
            else:
                found.append((bool(tick), 1))
        return found

    def losses(self) -> tuple[int, float]:
        """How often availability ended, and over how many available seconds: their ratio is a rate of interruptions."""
        ended = self.available.count(b"\x01\x00")
        return ended, self.available.count(1) * self.gap_seconds


def read_trace(path: str | Path) -> Trace:
    """Read one file `{"metadata": {"gap_seconds": 600}, "data": [1, 0, ...]}`; 1 means available.

    Raises ConfigError with the file's name and what is wrong with it.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"trace {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"trace {path}: is no JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("metadata"), dict) or "data" not in content:
        raise _bad(path, 'is no trace; it must look like {"metadata": {"gap_seconds": 600}, "data": [1, 0, 1]}')
    gap, data = content["metadata"].get("gap_seconds"), content["data"]
    if isinstance(gap, bool) or not isinstance(gap, int | float) or not math.isfinite(gap) or gap <= 0:
        raise _bad(path, f"metadata.gap_seconds is {gap!r}; it must be a number of seconds above zero")
    if not isinstance(data, list) or not data:
        raise _bad(path, "data must be a list of at least one 0 or 1")
    wrong = next((tick for tick, value in enumerate(data) if value not in (0, 1) or isinstance(value, str)), None)
    if wrong is not None:
        raise _bad(path, f"data[{wrong}] is {data[wrong]!r}; every value must be 1 (available) or 0")
    return Trace(float(gap), bytes(int(value) for value in data), path.stem)


def read_traces(path: str | Path) -> list[Trace]:
    """Of a file its one trace, of a folder those of every `*.json` in and below it, by name.

    Raises ConfigError where one is bad, or where there is none.
    """
    path = Path(path)
    if not path.is_dir():
        return [read_trace(path)]
    files = sorted(path.rglob("*.json"))
    if not files:
        raise ConfigError(f"trace folder {path}: has no *.json file in it; name a folder of traces, or one trace file")
    return [read_trace(file) for file in files]


def _bad(path: Path, what: str) -> ConfigError:
    return ConfigError(f"trace {path}: {what}")
