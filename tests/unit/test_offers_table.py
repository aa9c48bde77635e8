"""The table of offers: prices of both kinds, interruptions with their evidence, expected dollars, and why the first is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.ledger.profiles import Measurement
from holdfast.market.history import Life
from holdfast.market.monitor import judge
from holdfast.market.plots import draw_offers
from holdfast.market.table import cells, offers_table, to_markdown

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def offers(*spot_usd: float) -> list[Offer]:
    found = []
    for zone, usd in zip("abc", spot_usd, strict=False):
        for model, price, rate in (("spot", usd, 0.06), ("on-demand", 1.0, 0.0)):
            found.append(
                Offer(
                    pool=CapacityPool("aws", "us-east-1", f"us-east-1{zone}", "g5.xlarge", model),
                    usd_per_hour=price,
                    on_demand_usd_per_hour=1.0,
                    vcpus=4,
                    memory_gib=16,
                    gpus=1,
                    gpu_name="A10G",
                    interruptions_per_hour=rate,
                )
            )
    return found


def lost(zone: str, number: int, hours_ago: float) -> Life:
    ended_at = NOW - timedelta(hours=hours_ago)
    return Life(
        run="r",
        token=str(number),
        pool=CapacityPool("aws", "us-east-1", zone, "g5.xlarge", "spot"),
        launched_at=ended_at - timedelta(hours=0.5),
        ended_at=ended_at,
        recorded_at=ended_at,
        outcome="preempted",
    )


def test_one_row_tells_both_prices_of_a_zone_and_the_cheapest_comes_first():
    rows = offers_table(offers(0.40, 0.38), NOW)
    assert [(row.zone, row.spot_usd_per_hour, row.on_demand_usd_per_hour) for row in rows] == [
        ("us-east-1b", 0.38, 1.0),
        ("us-east-1a", 0.40, 1.0),
    ]
    assert rows[0].discount == pytest.approx(0.62) and rows[0].interruptions_per_day == pytest.approx(1.44)
    assert 0.38 < rows[0].usd_per_unit < 0.40 and rows[0].unit == "useful hour"
    assert "62% below on-demand" in rows[0].why


def test_a_cheaper_zone_that_is_taken_more_often_comes_second_and_the_first_says_so():
    rows = offers_table(offers(0.400, 0.405), NOW, lives=[lost("us-east-1a", n, 30 + n) for n in range(40)])
    assert rows[0].zone == "us-east-1b" and "own history" in rows[1].evidence
    assert "us-east-1a g5.xlarge has the lower price ($0.4000/h) and is taken more often" in rows[0].why


def test_a_cooled_pool_comes_last_with_the_reason():
    lives = [lost("us-east-1a", n, 1 + n) for n in range(3)]
    rows = offers_table(offers(0.30, 0.40), NOW, lives=lives, judgement=judge(lives, [], NOW))
    assert rows[0].zone == "us-east-1b" and "1 pool is cooled" in rows[0].why
    assert "3 of 3 spot machines were taken" in cells(rows)[1]["evidence"]


def test_steps_are_priced_where_their_time_is_known_and_records_where_their_rate_is():
    known = Measurement(cloud="aws", instance_type="g5.xlarge", step_seconds=3.6, boot_seconds=60, save_seconds=1)
    steps = offers_table(offers(0.40), NOW, measured={"g5.xlarge": known})[0]
    assert steps.unit == "1,000 steps" and steps.on_demand_usd_per_unit == pytest.approx(1.0)
    assert steps.usd_per_unit == pytest.approx(0.40, rel=0.02)
    records = offers_table(offers(0.40), NOW, records_per_second=1000)[0]
    assert records.unit == "million records" and records.on_demand_usd_per_unit == pytest.approx(1 / 3.6)


def test_the_table_is_markdown_and_a_picture():
    rows = offers_table(offers(0.40, 0.38), NOW)
    assert to_markdown(rows).count("\n| ") == 2 + len(rows)
    assert draw_offers(rows).startswith(b"\x89PNG")
