"""Offers as a picture. Needs matplotlib (extra `flows`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from holdfast.drivers.protocol import PricePoint
from holdfast.market.table import Row

MOST_ROWS = 20
SPOT, ON_DEMAND, COOLED = "#2a9d8f", "#e9a23b", "#8d99ae"


def draw_offers(rows: Sequence[Row], prices: Mapping[str, Sequence[PricePoint]] | None = None) -> bytes:
    """A PNG: expected dollars of the first pools against on-demand and, below, what spot has cost lately (by label)."""
    from matplotlib.figure import Figure

    shown = list(rows[:MOST_ROWS])
    inches = 0.32 * max(3, len(shown))
    figure = Figure(figsize=(10, inches + 1.3 + (2.6 if prices else 0)), dpi=110, layout="constrained")
    axes = figure.subplots(2 if prices else 1, 1, squeeze=False, height_ratios=[inches + 1, 2.6] if prices else None)
    bars = axes[0][0]
    for number, row in enumerate(shown):
        bars.barh(number, row.usd_per_unit, color=COOLED if row.cooled else SPOT, height=0.62)
        if row.on_demand_usd_per_unit is not None:
            bars.plot([row.on_demand_usd_per_unit] * 2, [number - 0.4, number + 0.4], color=ON_DEMAND, linewidth=2.5)
    bars.set_yticks(range(len(shown)), [f"{row.zone} {row.instance_type}" for row in shown], fontsize=8)
    bars.invert_yaxis()
    units = sorted({row.unit for row in shown})
    bars.set_xlabel(f"expected $ per {' or '.join(units)}; the line: on-demand; grey: cooled")
    bars.grid(axis="x", alpha=0.25)
    bars.set_axisbelow(True)
    if shown:
        bars.set_title(shown[0].why[:150], fontsize=8.5, loc="left")
    for label, points in (prices or {}).items():
        at = [point.at for point in points]
        axes[1][0].step(at, [point.usd_per_hour for point in points], where="post", label=label, linewidth=1.2)
    if prices:
        axes[1][0].set_ylabel("spot $/h")
        axes[1][0].grid(alpha=0.25)
        axes[1][0].legend(fontsize=7, frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
