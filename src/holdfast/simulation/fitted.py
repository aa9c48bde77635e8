"""A market like the recorded one: stretches with and without capacity, drawn anew from those that were seen.

A semi-Markov model of two states, fitted without assuming a shape: how long a stretch still lasts may depend on its age in
whatever way the record shows. What it leaves out: hours of the day, and anything a stretch has to do with the one before.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.errors import ConfigError
from holdfast.market.traces import Trace

QUANTILES = 200
LEAST_STRETCHES = 3
"""Of each kind, whole ones; with fewer, those that the record's ends cut off are taken as they are."""


@dataclass(frozen=True, slots=True)
class FittedMarket:
    gap_seconds: float
    up_ticks: tuple[int, ...]
    down_ticks: tuple[int, ...]
    """Lengths of stretches with and without capacity; empty: there never was one."""
    name: str

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> FittedMarket:
        """Of all of them together. Raises ConfigError when there is none, or they have different ticks."""
        if not traces:
            raise ConfigError("trace: a fitted market needs at least one trace; name one")
        if other := next((one for one in traces if one.gap_seconds != traces[0].gap_seconds), None):
            raise ConfigError(
                f"trace: {traces[0].name} has a tick of {traces[0].gap_seconds:g} s and {other.name} one of "
                f"{other.gap_seconds:g} s; fit traces of one tick"
            )
        lengths = {state: _lengths(traces, state) for state in (True, False)}
        return cls(traces[0].gap_seconds, lengths[True], lengths[False], f"fitted to {traces[0].name}" + _more(traces))

    @classmethod
    def of_means(cls, gap_seconds: float, up_seconds: float, down_seconds: float, name: str) -> FittedMarket:
        """Exponential stretches of these means, for where only rates are known. `down_seconds` 0: capacity never lacks, and
        a machine that is taken is replaced at once.
        """
        return cls(
            gap_seconds,
            _exponential(up_seconds / gap_seconds),
            _exponential(max(1.0, down_seconds / gap_seconds)),
            name,
        )

    def draw(self, ticks: int, random_source: random.Random) -> Trace:
        """A trace of `ticks` ticks, begun at a random instant of an endless one."""
        stretches = [(True, length) for length in self.up_ticks] + [(False, length) for length in self.down_ticks]
        # A random instant is in a long stretch more often than in a short one.
        state, length = random_source.choices(stretches, [length for _, length in stretches])[0]
        length -= random_source.randrange(length)
        parts: list[bytes] = []
        drawn = 0
        while drawn < ticks:
            parts.append((b"\x01" if state else b"\x00") * length)
            drawn += length
            following = self.down_ticks if state else self.up_ticks
            if following:
                state = not state
            length = random_source.choice(following or (self.up_ticks if state else self.down_ticks))
        return Trace(self.gap_seconds, b"".join(parts)[:ticks], self.name)


def _exponential(mean_ticks: float) -> tuple[int, ...]:
    """Equally likely lengths."""
    middles = ((number + 0.5) / QUANTILES for number in range(QUANTILES))
    return tuple(max(1, round(-mean_ticks * math.log(1 - share))) for share in middles)


def _lengths(traces: Sequence[Trace], state: bool) -> tuple[int, ...]:
    whole: list[int] = []
    cut: list[int] = []
    for trace in traces:
        runs = trace.runs()
        whole += [length for was, length in runs[1:-1] if was == state]
        cut += [length for was, length in (runs[:1] if len(runs) == 1 else [runs[0], runs[-1]]) if was == state]
    return tuple(sorted(whole if len(whole) >= LEAST_STRETCHES else whole + cut))


def _more(traces: Sequence[Trace]) -> str:
    return f" and {len(traces) - 1} more" if len(traces) > 1 else ""
