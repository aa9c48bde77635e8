"""Prices and fates. Pure: the same market, pool and launch number give the same answer in every process."""

from __future__ import annotations

import hashlib
import random
from datetime import UTC, datetime, timedelta

from holdfast.drivers.local.catalogue import InstanceType, Zone, typical_usd_per_hour
from holdfast.drivers.local.config import Fate, ScriptedMarket, SeededMarket
from holdfast.drivers.protocol import CapacityPool, PricePoint

PRICE_PERIOD = timedelta(minutes=10)
EPOCH = datetime(2020, 1, 1, tzinfo=UTC)


def fate_of(market: SeededMarket | ScriptedMarket, pool: CapacityPool, number: int) -> Fate:
    """What becomes of launch `number` (from 0) of this provisioning model."""
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


def price_history(
    market: SeededMarket | ScriptedMarket,
    pool: CapacityPool,
    zone: Zone,
    kind: InstanceType,
    start: datetime,
    end: datetime,
) -> list[PricePoint]:
    """Prices that held from `start` to `end`: within 15 % of the typical one, never above on-demand."""
    typical = typical_usd_per_hour(pool, zone, kind)
    if isinstance(market, ScriptedMarket) or pool.provisioning_model == "on-demand":
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
