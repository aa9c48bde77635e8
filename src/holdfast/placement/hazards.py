"""How long spot capacity lasts, and how long it stays away: hazards by age, a library of markets, and a belief about which one it is.

A market has, for stretches with capacity and without, a rate at which they end that depends on their age. A zone is in one of the
library's markets, and now and then changes to another. What a run has seen of a pool makes some of them more likely.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from holdfast.placement.situation import PoolHistory

LONGEST_BIN_SECONDS = 72 * 3600.0
"""What counts for the last bin of ages, which has no end."""
SWITCH_STEP_SECONDS = 60.0
AWAY_SECONDS = 3600.0
"""Who has not looked for so long takes nothing to have gone on."""


@dataclass(frozen=True, eq=False)
class Library:
    """Markets. Rates are per second, by [market][0: without capacity, 1: with][bin of ages]."""

    edges_seconds: tuple[float, ...]
    """Where bins of ages begin; the first is 0."""
    rates: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    switching: tuple[tuple[float, ...], ...]
    """Probability, in an hour, of going from one market to another; rows add up to 1."""
    weights: tuple[float, ...]
    """Of each market, before anything was seen."""
    source: str = ""

    @cached_property
    def rate_array(self) -> Any:
        """Shape (markets, 2, bins)."""
        import numpy as np

        return np.array(self.rates)

    @cached_property
    def lengths_seconds(self) -> Any:
        import numpy as np

        return np.append(np.diff(self.edges_seconds), LONGEST_BIN_SECONDS)

    @cached_property
    def rates_by_bin(self) -> Any:
        """Shape (2, bins, markets)."""
        import numpy as np

        return np.ascontiguousarray(self.rate_array.transpose(1, 2, 0))

    @cached_property
    def whole_by_bin(self) -> Any:
        """Integral of the rates up to each bin's beginning, shape (2, bins, markets)."""
        import numpy as np

        whole = np.cumsum(self.rates_by_bin * self.lengths_seconds[None, :, None], axis=1)
        return np.concatenate([np.zeros_like(whole[:, :1]), whole[:, :-1]], axis=1)

    @cached_property
    def edges(self) -> Any:
        import numpy as np

        return np.array(self.edges_seconds)

    def bin(self, age: float) -> int:
        return bisect_right(self.edges_seconds, age) - 1

    def bins(self, ages: Any) -> Any:
        return self.edges.searchsorted(ages, side="right") - 1

    def cumulated(self, state: int, ages: Any) -> Any:
        """Integral of the rate from a stretch's beginning to these ages, shape (ages, markets)."""
        before, rates = self.whole_by_bin, self.rates_by_bin
        bins = self.bins(ages)
        return before[state, bins] + rates[state, bins] * (ages - self.edges[bins])[:, None]

    @lru_cache(maxsize=512)  # noqa: B019 - libraries are few, and live as long as the program
    def switched(self, steps: int) -> Any:
        """Matrix of going from market to market in so many minutes."""
        import numpy as np

        hourly = np.array(self.switching)
        one = np.eye(len(hourly)) + (hourly - np.eye(len(hourly))) * (SWITCH_STEP_SECONDS / 3600)
        return np.linalg.matrix_power(one, steps)

    @cached_property
    def at_random(self) -> Any:
        """What an observer finds at a random instant: shares of shape (2, bins, markets), and the bins' middle ages."""
        import numpy as np

        before, rates = self.whole_by_bin, self.rates_by_bin
        lengths = self.lengths_seconds[None, :, None]
        ended = np.where(rates * lengths > 1e-9, -np.expm1(-rates * lengths) / np.maximum(rates, 1e-15), lengths)
        found = np.exp(-before) * ended
        found /= found.sum(axis=(0, 1), keepdims=True)
        return found, self.edges + self.lengths_seconds / 2


class Belief:
    """About one pool: which market it is in and how old its present stretch is, from what was seen of it."""

    __slots__ = ("_age", "_ages", "_bins", "_library", "_seen_seconds", "_state", "_weights")

    def __init__(self, library: Library, available: bool, now_seconds: float) -> None:
        self._library = library
        self._look_anew(available, now_seconds, library.weights)

    def _look_anew(self, available: bool, now_seconds: float, markets: Any) -> None:
        """At a stretch that may be of any age. `markets`: how likely each is."""
        shares, ages = self._library.at_random
        self._state, self._seen_seconds = int(available), now_seconds
        self._age: float | None = None
        """Of the present stretch; None: nobody saw it begin, and `_ages` has what it may be."""
        self._ages = ages
        self._bins: Any = self._library.bins(ages)
        weights = shares[self._state] * markets
        self._weights = weights / weights.sum()
        """Shape (markets,), or (ages, markets). Adds up to 1."""

    @classmethod
    def of_history(cls, library: Library, history: PoolHistory, now_seconds: float, hoped: bool) -> Belief | None:
        """After all of it, which ends now. None: nobody looked. `hoped`: what is taken to be there, when the last look is old."""
        gap, begin = history.gap_seconds, now_seconds - len(history.available) * history.gap_seconds
        belief: Belief | None = None
        for seen in re.finditer(b"\x00+|\x01+", bytes(history.available)):
            there, first, last = seen[0][0] == 1, begin + seen.start() * gap, begin + (seen.end() - 1) * gap
            if belief is None:
                belief = cls(library, there, first)
            elif first - belief._seen_seconds > max(AWAY_SECONDS, gap):
                belief._look_again(there, first)
            belief.saw(there, first)  # a stretch's first and last tick say all
            belief.saw(there, last)
        if belief is not None and now_seconds - belief._seen_seconds > max(AWAY_SECONDS, gap):
            belief._look_again(hoped, now_seconds)
        return belief

    def _look_again(self, available: bool, now_seconds: float) -> None:
        """After a time that nobody saw: the market is probably the same."""
        markets = self._weights if self._age is not None else self._weights.sum(axis=0)
        steps = round((now_seconds - self._seen_seconds) / SWITCH_STEP_SECONDS)
        self._look_anew(available, now_seconds, markets @ self._library.switched(steps))

    @property
    def available(self) -> bool:
        """When it was last seen."""
        return self._state == 1

    def saw(self, available: bool, now_seconds: float) -> None:
        """What it is now. Between, nothing is taken to have happened that was not seen."""
        elapsed = now_seconds - self._seen_seconds
        same = available == (self._state == 1)
        if elapsed <= 0 and same:
            return
        elapsed = max(elapsed, 0.0)
        library = self._library
        lasted = self._lasts(max(elapsed, 1.0))
        if same:
            weights = self._weights * lasted
            if self._age is None:
                self._ages = self._ages + elapsed
                self._bins = library.bins(self._ages)
            else:
                self._age += elapsed
                self._bins = library.bin(self._age)
        else:
            weights = self._weights * (1.0 - lasted)
            if self._age is None:
                weights = weights.sum(axis=0)
            self._age, self._bins, self._state = 0.0, 0, int(available)
        steps = round(elapsed / SWITCH_STEP_SECONDS)
        if steps:
            weights = weights @ library.switched(steps)
        self._weights = weights / max(weights.sum(), 1e-300)
        self._seen_seconds = now_seconds

    def expected(self, values: Any, low: int, share: float) -> float:
        """Of values of shape (bins, slacks, markets), between slack number `low` and the next."""
        if self._age is None:
            below, above = values[self._bins, low], values[self._bins, low + 1]
            return float((self._weights * (below + share * (above - below))).sum())
        under, over = values[self._bins, low : low + 2].dot(self._weights).tolist()
        return under + share * (over - under)

    def rate_per_second(self) -> float:
        """At which the present stretch ends."""
        return float((self._library.rates_by_bin[self._state][self._bins] * self._weights).sum())

    def changed_within(self, seconds: float) -> float:
        """Probability that the present stretch ends within this time."""
        return float(1.0 - (self._lasts(seconds) * self._weights).sum())

    def changed_by(self, now_seconds: float) -> float:
        """Probability that the stretch which was last seen has ended since."""
        return self.changed_within(max(0.0, now_seconds - self._seen_seconds))

    def changed(self) -> Belief:
        """Another, as if the present stretch had just ended."""
        other = Belief.__new__(Belief)
        other._library, other._state, other._seen_seconds = self._library, 1 - self._state, self._seen_seconds
        other._age, other._ages, other._bins = 0.0, self._ages, 0
        other._weights = self._weights if self._age is not None else self._weights.sum(axis=0)
        return other

    def _lasts(self, seconds: float) -> Any:
        """Probability that the present stretch lasts so much longer, in the shape of the weights."""
        import numpy as np

        library, state = self._library, self._state
        if self._age is None:
            grown = library.cumulated(state, self._ages + seconds)
            return np.exp(library.cumulated(state, self._ages) - grown)
        age = self._age
        later = library.bin(age + seconds)
        rates, edges = library.rates_by_bin[state], library.edges_seconds
        if later == self._bins:
            return np.exp(rates[later] * -seconds)
        whole = library.whole_by_bin[state]
        until = whole[later] + rates[later] * (age + seconds - edges[later])
        return np.exp(whole[self._bins] + rates[self._bins] * (age - edges[self._bins]) - until)


def library_of_ticks(
    edges_ticks: Sequence[int], hazards: Any, hourly: Any, weights: Any, tick_seconds: float, source: str
) -> Library:
    """From probabilities per tick that a stretch ends, shape (markets, 2, bins). Ages are counted in ticks, the first is 1."""
    return Library(
        edges_seconds=tuple((edge - 1) * tick_seconds for edge in edges_ticks),
        rates=tuple(
            tuple(tuple(round(-math.log1p(-float(one)) / tick_seconds, 9) for one in state) for state in market)  # type: ignore[misc]
            for market in hazards
        ),
        switching=tuple(tuple(round(float(one), 6) for one in row) for row in hourly),
        weights=tuple(round(float(one), 5) for one in weights),
        source=source,
    )
