"""Spot capacity by the clock: what a trace says happens to a machine of the local cloud."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from holdfast.drivers.local.config import Fate, Outage, TimedMarket
from holdfast.drivers.local.market import fate_of
from holdfast.drivers.protocol import CapacityPool

POOL = CapacityPool("local", "local-1", "local-1a", "c7i.large", "spot")
ON_DEMAND = CapacityPool("local", "local-1", "local-1a", "c7i.large", "on-demand")
ELSEWHERE = CapacityPool("local", "local-1", "local-1b", "c7i.large", "spot")
MARKET = TimedMarket(
    outages=[
        Outage(start_seconds=1000, end_seconds=1500, zones=["local-1a"]),
        Outage(start_seconds=9000, end_seconds=9100),
    ]
)


def test_a_machine_is_taken_when_the_next_outage_begins_and_told_before() -> None:
    assert fate_of(MARKET, POOL, 0, 100) == Fate(after_seconds=780, notice_seconds=120)
    assert fate_of(MARKET, POOL, 0, 950) == Fate(after_seconds=0, notice_seconds=50)
    silent = MARKET.model_copy(update={"notice": False})
    assert fate_of(silent, POOL, 0, 100).after_seconds == 900


def test_a_launch_during_an_outage_is_refused_in_its_zones_and_on_demand_never() -> None:
    assert fate_of(MARKET, POOL, 0, 1000).refuse and fate_of(MARKET, POOL, 7, 1499).refuse
    assert not fate_of(MARKET, ELSEWHERE, 0, 1000).refuse
    assert fate_of(MARKET, ON_DEMAND, 0, 1000) == Fate()
    assert fate_of(MARKET, POOL, 0, 1500).after_seconds == 9000 - 1500 - 120
    assert fate_of(MARKET, POOL, 0, 9100) == Fate()


def test_an_outage_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValidationError, match="not after its start"):
        Outage(start_seconds=10, end_seconds=5)
