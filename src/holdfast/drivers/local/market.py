"""Prices and fates. Pure: the same market, pool and launch number give the same answer in every process."""

from __future__ import annotations

import hashlib
import random
from datetime import UTC, datetime, timedelta

from holdfast.drivers.local.catalogue import NOTICE_SECONDS, InstanceType, Zone, find_zone, typical_usd_per_hour
from holdfast.drivers.local.config import Fate, Market, ScriptedMarket, SeededMarket, TimedMarket
from holdfast.drivers.protocol import CapacityPool, PricePoint

PRICE_PERIOD = timedelta(minutes=10)
EPOCH = datetime(2020, 1, 1, tzinfo=UTC)


def fate_of(market: Market, pool: CapacityPool, number: int, elapsed_seconds: float = 0.0) -> Fate:
    """What becomes of launch `number` (from 0) of this provisioning model, `elapsed_seconds` after the cloud's clock began."""
    if isinstance(market, TimedMarket):
        return _fate_by_the_clock(market, pool, elapsed_seconds)
    if isinstance(market, ScriptedMarket):
        fates = market.spot if pool.provisioning_model == "spot" else market.on_demand
        return fates[number] if number < len(fates) else Fate()
    if pool.provisioning_model == "on-demand":
        return Fate()
    draw = _random(market.seed, str(pool), number)
    if draw.random() < market.refusal_probability:
        return Fate(refuse=True)
    life_seconds = draw.expovariate(1 / market.mean_life_seconds)
    return Fate(after_seconds=life_seconds, notice=draw.random() < market.notice_probability)


def _fate_by_the_clock(market: TimedMarket, pool: CapacityPool, elapsed_seconds: float) -> Fate:
    if pool.provisioning_model == "on-demand":
        return Fate()
    coming = [
        outage
        for outage in market.outages
        if outage.end_seconds > elapsed_seconds and (not outage.zones or pool.zone in outage.zones)
    ]
    if not coming:
        return Fate()
    left = min(outage.start_seconds for outage in coming) - elapsed_seconds
    if left <= 0:
        return Fate(refuse=True)
    zone = find_zone(pool.zone)
    usual = NOTICE_SECONDS[zone.dialect] if zone else 0.0
    # The machine goes when the outage begins, so its notice comes that much earlier, at the launch if need be.
    notice_seconds = min(left, usual if market.notice_seconds is None else market.notice_seconds)
    return Fate(
        after_seconds=left - notice_seconds * market.notice, notice=market.notice, notice_seconds=notice_seconds
    )


def price_history(
    market: Market,
    pool: CapacityPool,
    zone: Zone,
    kind: InstanceType,
    start: datetime,
    end: datetime,
) -> list[PricePoint]:
    """Prices that held from `start` to `end`: within 15 % of the typical one, never above on-demand."""
    typical = typical_usd_per_hour(pool, zone, kind)
    if not isinstance(market, SeededMarket) or pool.provisioning_model == "on-demand":
        return [PricePoint(at=start, usd_per_hour=typical)]
    points = []
    period = (start - EPOCH) // PRICE_PERIOD
    while (at := EPOCH + period * PRICE_PERIOD) <= end:
        factor = 1 + 0.3 * (_random(market.seed, str(pool), "price", period).random() - 0.5)
        points.append(PricePoint(at=at, usd_per_hour=round(min(typical * factor, kind.on_demand_usd_per_hour), 4)))
        period += 1
    return points


def _random(*key: object) -> random.Random:
    # Not hash(): it differs between processes.
    return random.Random(hashlib.sha256(repr(key).encode()).digest())
