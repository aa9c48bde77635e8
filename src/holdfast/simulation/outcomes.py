"""What simulated runs came to: one run, many runs of one policy, and one sentence about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LIKELY = 0.8
"""The sentence names the roundest amount that at least so many runs stay under."""


@dataclass(slots=True)
class Outcome:
    """One simulated run. Seconds and dollars are the cloud's."""

    usd: float = 0.0
    finish_seconds: float = 0.0
    """From the run's start."""
    late: bool = False
    lost_seconds: float = 0.0
    """Of machine time that trained what was trained again."""
    interruptions: int = 0
    refusals: int = 0
    launches: int = 0
    spot_seconds: float = 0.0
    on_demand_seconds: float = 0.0
    way: list[tuple[bool, str, float]] = field(default_factory=list)
    """Its machines in their order: spot or not, how they ended, seconds from launch to end."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """The runs of one policy."""

    policy: str
    outcomes: Sequence[Outcome]

    @property
    def usd(self) -> list[float]:
        return sorted(one.usd for one in self.outcomes)

    @property
    def hours(self) -> list[float]:
        return sorted(one.finish_seconds / 3600 for one in self.outcomes)

    @property
    def late(self) -> int:
        return sum(one.late for one in self.outcomes)

    def mean(self, name: str) -> float:
        return sum(getattr(one, name) for one in self.outcomes) / len(self.outcomes)

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": len(self.outcomes),
            "late": self.late,
            "mean_usd": round(self.mean("usd"), 4),
            "usd": _quantiles(self.usd),
            "hours": _quantiles(self.hours),
            "mean_lost_hours": round(self.mean("lost_seconds") / 3600, 4),
            "mean_interruptions": round(self.mean("interruptions"), 3),
            "mean_refusals": round(self.mean("refusals"), 3),
            "mean_launches": round(self.mean("launches"), 3),
            "mean_spot_hours": round(self.mean("spot_seconds") / 3600, 4),
            "mean_on_demand_hours": round(self.mean("on_demand_seconds") / 3600, 4),
        }


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of sorted `values` that at least `share` of them do not pass."""
    return values[min(len(values) - 1, max(0, math.ceil(share * len(values)) - 1))]


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {f"{share:.0%}": round(quantile(values, share), 4) for share in QUANTILES}


def rounded_up(usd: float) -> float:
    """To two significant digits."""
    if usd <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(usd)) - 1)
    return round(math.ceil(usd / unit - 1e-9) * unit, 10)


def dollars(usd: float) -> str:
    """$61, $0.45, $1,230: two digits at least, and no more than people read."""
    if usd >= 100:
        return f"${usd:,.0f}"
    if usd >= 10:
        return f"${usd:.1f}".removesuffix(".0")
    return f"${usd:.2f}" if usd >= 0.1 else f"${usd:.4f}"


def sentence(chosen: Distribution, on_demand_usd: float) -> str:
    """'82 % likely under $61; on-demand $230; never late'."""
    limit = rounded_up(quantile(chosen.usd, LIKELY))
    under = sum(usd <= limit for usd in chosen.usd) / len(chosen.usd)
    share = "always" if under == 1 else f"{math.floor(100 * under)} % likely"
    late = "never late" if not chosen.late else f"late in {chosen.late} of {len(chosen.outcomes)}"
    return f"{share} under {dollars(limit)}; on-demand {dollars(on_demand_usd)}; {late}"
