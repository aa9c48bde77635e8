"""Running time into dollars, by each cloud's own rules and at the price that held then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal

from holdfast.drivers.protocol import PricePoint

SMALLEST_USD = Decimal("0.0001")


@dataclass(frozen=True, slots=True, kw_only=True)
class BillingTerms:
    """How a cloud turns running time into billed time."""

    minimum_seconds: float = 60.0
    free_if_preempted_within_seconds: float = 0.0


TERMS = {
    # Per second, 60 s at least; free when EC2 interrupts a spot instance in its first hour.
    # https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/billing-for-interrupted-spot-instances.html
    "aws": BillingTerms(minimum_seconds=60.0, free_if_preempted_within_seconds=3600.0),
    # Per second, 60 s at least; free when preempted within a minute of its creation.
    # https://cloud.google.com/compute/docs/instances/spot#pricing
    "gcp": BillingTerms(minimum_seconds=60.0, free_if_preempted_within_seconds=60.0),
    "local": BillingTerms(minimum_seconds=60.0),
}
"""By name of the cloud."""


@dataclass(frozen=True, slots=True)
class Bill:
    seconds: float
    usd: float
    """A whole number of hundredths of a cent, so that totals of bills add up exactly."""


def bill(
    launched_at: datetime, ended_at: datetime, prices: Sequence[PricePoint], terms: BillingTerms, preempted: bool
) -> Bill:
    """What a machine that ran from `launched_at` to `ended_at` costs.

    `prices`: oldest first, the first at or before `launched_at`. Per second with a minimum:
    https://aws.amazon.com/ec2/pricing/on-demand/ and https://cloud.google.com/compute/vm-instance-pricing.
    """
    ran_seconds = max(0.0, (ended_at - launched_at).total_seconds())
    if preempted and ran_seconds < terms.free_if_preempted_within_seconds:
        return Bill(0.0, 0.0)
    seconds = max(ran_seconds, terms.minimum_seconds)
    until = launched_at + timedelta(seconds=seconds)
    usd = 0.0
    for point, following in zip(prices, [*prices[1:], None], strict=True):
        start = max(point.at, launched_at)
        end = min(following.at, until) if following else until
        usd += max(0.0, (end - start).total_seconds()) / 3600 * point.usd_per_hour
    return Bill(round(seconds, 3), round_usd(usd))


def round_usd(usd: float) -> float:
    return float(Decimal(repr(usd)).quantize(SMALLEST_USD, ROUND_HALF_UP))


def add_usd(amounts: Iterable[float]) -> float:
    """The exact sum of amounts that are whole hundredths of a cent."""
    return float(sum((Decimal(repr(amount)).quantize(SMALLEST_USD, ROUND_HALF_UP) for amount in amounts), Decimal(0)))
