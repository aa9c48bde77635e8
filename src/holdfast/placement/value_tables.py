"""What the rest of a run will cost: a dynamic program over time left, slack, the market's stretch and its age, and the machine.

Slack is the time left beyond all that is still to be done and one more start, so that a tick on a machine leaves it as it is,
a tick of waiting takes a tick of it, and a launch a restart. Where it is used up, on-demand is all that is left. Markets of a
library change from one to another as it says; the program knows which one it is in, and whoever asks weighs the answers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from holdfast.placement.hazards import Library

MOST_STEPS = 450
"""Of time; a longer run's are longer than its ticks."""
EVERY_STEP_UP_TO, STORED_EVERY = 24, 3
NEVER_USD = 1e7
TABLES_KEPT = 6


class Terms(NamedTuple):
    """What a table is built for. Rounded by whoever asks, so that few are."""

    tick_seconds: float
    time_left_seconds: float
    slack_seconds: float
    """The most."""
    restart_seconds: float
    spot_usd_per_hour: float
    on_demand_usd_per_hour: float


@dataclass(frozen=True, slots=True)
class Tables:
    """Dollars still to come after the present tick, by machine in use at its end."""

    step_seconds: float
    slack_steps: tuple[float, ...]
    on_spot: Any
    """Shape (stored times, bins, slacks, markets): now with capacity."""
    on_demand: Any
    """Shape (stored times, 2, bins, slacks, markets)."""
    on_none: Any
    expected_usd: Any
    """Before the first tick, with no machine: shape (2, bins, slacks, markets)."""

    def among(self, slack_steps: float) -> tuple[int, float]:
        """The grid's last point that is not above, and what share of the way to the next it is."""
        grid = self.slack_steps
        low = min(max(bisect_right(grid, slack_steps) - 1, 0), len(grid) - 2)
        return low, min(1.0, max(0.0, (slack_steps - grid[low]) / (grid[low + 1] - grid[low])))

    def place(self, time_left_seconds: float) -> int:
        """Of the stored time that is nearest."""
        step = time_left_seconds / self.step_seconds
        if step <= EVERY_STEP_UP_TO:
            return max(0, round(step) - 1)
        found = EVERY_STEP_UP_TO + round((step - EVERY_STEP_UP_TO) / STORED_EVERY) - 1
        return min(found, len(self.on_spot) - 1)


def slack_grid(steps: float) -> Any:
    """Finer where little is left."""
    import numpy as np

    most = max(steps, 1.0)
    points = np.concatenate([np.arange(0, 6, 0.5), np.arange(6, 30, 1.0), np.arange(30, max(31.0, most), 2.0)])
    return np.append(points[points < most - 1e-9], most)


@lru_cache(maxsize=TABLES_KEPT)
def tables(library: Library, terms: Terms) -> Tables:
    """Built in less than a second, and kept."""
    import numpy as np

    step = terms.tick_seconds * max(1, math.ceil(terms.time_left_seconds / terms.tick_seconds / MOST_STEPS))
    steps = max(1, math.ceil(terms.time_left_seconds / step - 1e-9))
    restart = terms.restart_seconds / step
    spot, on_demand = terms.spot_usd_per_hour * step / 3600, terms.on_demand_usd_per_hour * step / 3600
    grid = slack_grid(terms.slack_seconds / step)
    # Axes of all values: state, bin, slack, market.
    ends = -np.expm1(-library.rate_array * step).transpose(1, 2, 0)[:, :, None, :].astype(np.float32)
    switched = library.switched(max(1, round(step / 60.0))).T.astype(np.float32)
    older = _older(library, step).astype(np.float32)
    shape = (2, ends.shape[1], len(grid), ends.shape[3])

    def expected(value: Any) -> Any:
        value = value @ switched
        stays = np.tensordot(older, value, axes=(1, 1)).swapaxes(0, 1)
        return stays + ends * (value[::-1, :1] - stays)

    spot, on_demand = np.float32(spot), np.float32(on_demand)
    waiting, launching = _Shift(grid, 1.0), _Shift(grid, restart)
    none = np.full(shape, NEVER_USD, np.float32)
    demand, on_spot = none.copy(), none.copy()
    kept: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for left in range(1, steps + 1):
        over = grid + restart >= left - 1 - 1e-9  # nothing is left to be done
        none[:, :, over], demand[:, :, over], on_spot[:, :, over] = 0.0, 0.0, 0.0
        on_spot[0] = none[0]
        after_spot, after_demand, after_none = expected(on_spot)[1], expected(demand), expected(none)
        if left <= EVERY_STEP_UP_TO or (left - EVERY_STEP_UP_TO) % STORED_EVERY == 0:
            for place, values in zip(kept, (after_spot, after_demand, after_none), strict=True):
                place.append(values)
        wait = waiting(after_none)
        forced = on_demand * np.ceil(np.maximum(0.0, left - 1 - launching.to - restart) - 1e-9)
        start_demand = on_demand + launching(after_demand, forced)
        start_spot = spot + launching(after_spot)
        none = np.minimum(wait, start_demand)
        none[1] = np.minimum(none[1], start_spot)
        demand = np.minimum(on_demand + after_demand, wait)
        demand[1] = np.minimum(demand[1], start_spot)
        on_spot = none.copy()
        on_spot[1] = np.minimum(none[1], spot + after_spot)
    return Tables(step, tuple(grid.tolist()), *(np.stack(values) for values in kept), none)


class _Shift:
    """The value with less slack, between the grid's points in proportion."""

    def __init__(self, grid: Any, steps: float) -> None:
        import numpy as np

        self.to = grid - steps
        self._low = np.clip(np.searchsorted(grid, self.to, side="right") - 1, 0, max(0, len(grid) - 2))
        high = np.minimum(self._low + 1, len(grid) - 1)
        width = np.maximum(grid[high] - grid[self._low], 1e-9)
        self._high, self._share = high, ((self.to - grid[self._low]) / width).astype(np.float32)[:, None]
        self._none = self.to < -1e-9

    def __call__(self, value: Any, without: Any = None) -> Any:
        """`without`: where there is less than no slack, by slack; None: that can't be."""
        import numpy as np

        moved = value[..., self._low, :] * (1 - self._share) + value[..., self._high, :] * self._share
        moved[..., self._none, :] = NEVER_USD if without is None else np.float32(without[self._none])[:, None]
        return moved


def _older(library: Library, step: float) -> Any:
    """Shape (bins, bins): where ages of a bin, anywhere in it, are a step later."""
    import numpy as np

    edges, lengths = library.edges, library.lengths_seconds
    upper = np.append(edges[1:], np.inf)
    moved = np.zeros((len(edges), len(edges)))
    for bin_ in range(len(edges)):
        low, high = edges[bin_] + step, edges[bin_] + lengths[bin_] + step
        moved[bin_] = np.clip(np.minimum(high, upper) - np.maximum(low, edges), 0, None) / lengths[bin_]
    return moved / moved.sum(axis=1, keepdims=True)
