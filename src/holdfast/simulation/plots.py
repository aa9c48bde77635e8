"""Simulated runs as a picture: what they cost, and when they end. Needs matplotlib (extra `flows`)."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Any

from holdfast.simulation.outcomes import Distribution, dollars, quantile

COLOURS = ("#264653", "#2a9d8f", "#e9a23b", "#8d99ae", "#d1495b", "#6a4c93", "#577590")
MARK_COLOUR = "#d1495b"
ROW_INCHES, REST_INCHES = 0.62, 2.3


def draw(distributions: Sequence[Distribution], bound_usd: float, deadline_hours: float | None, title: str) -> bytes:
    """A PNG: one row for each policy, best mean first; cost on the left, time to the end on the right.

    Each dot is a run, the bar reaches from the 5 % to the 95 % quantile, the stroke is the mean.
    """
    from matplotlib.figure import Figure

    rows = sorted(distributions, key=lambda one: one.mean("usd"))
    figure = Figure(figsize=(11, REST_INCHES + ROW_INCHES * len(rows)), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for row, one in enumerate(rows):
        colour = COLOURS[row % len(COLOURS)]
        _draw_row(left, row, one.usd, one.mean("usd"), colour)
        left.annotate(
            _plain(dollars(one.mean("usd"))), (one.mean("usd"), row - 0.36), fontsize=8, ha="center", color=colour
        )
        _draw_row(right, row, one.hours, sum(one.hours) / len(one.hours), colour)
        if one.late:
            words = f" {one.late} of {len(one.outcomes)} late"
            right.annotate(words, (one.hours[-1], row), fontsize=8, va="center", color=MARK_COLOUR)
    left.set_yticks(range(len(rows)), [one.policy for one in rows], fontsize=9)
    left.set_ylim(len(rows) - 0.4, -0.7)
    left.set_xlabel("dollars")
    left.axvline(bound_usd, color=MARK_COLOUR, linewidth=1, linestyle=":")
    left.annotate(" omniscient", (bound_usd, len(rows) - 0.45), fontsize=8, color=MARK_COLOUR)
    left.set_xlim(0, left.get_xlim()[1])
    latest = max([one.hours[-1] for one in rows] + ([deadline_hours] if deadline_hours is not None else []))
    earliest = min(one.hours[0] for one in rows)
    margin = 0.05 * max(latest - earliest, 0.1)
    right.set_xlim(earliest - margin, latest + margin)
    right.set_xlabel("hours from start to end")
    if deadline_hours is not None:
        right.axvline(deadline_hours, color=MARK_COLOUR, linewidth=1, linestyle="--")
        right.annotate("deadline ", (deadline_hours, -0.55), fontsize=8, ha="right", color=MARK_COLOUR)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    figure.suptitle(_plain(title), fontsize=10, x=0.01, ha="left")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_row(axes: Any, row: int, values: Sequence[float], mean: float, colour: str) -> None:
    low, high = quantile(values, 0.05), quantile(values, 0.95)
    axes.barh(row, max(high - low, 1e-9), left=low, height=0.42, color=colour, alpha=0.22)
    jitter = random.Random(row)
    heights = [row + jitter.uniform(-0.19, 0.19) for _ in values]
    axes.plot(values, heights, linestyle="", marker=".", markersize=3, color=colour, alpha=0.5)
    axes.plot([mean, mean], [row - 0.27, row + 0.27], color=colour, linewidth=2)


def _plain(text: str) -> str:
    """Two dollar signs would make a formula of what is between them."""
    return text.replace("$", r"\$")
