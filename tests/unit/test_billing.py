"""Running time into dollars, by the cloud's rules, at the price that held then."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.drivers.protocol import PricePoint
from holdfast.ledger.billing import Bill, BillingTerms, add_usd, bill, round_usd

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
TERMS = BillingTerms(minimum_seconds=60)
FREE_FIRST_HOUR = BillingTerms(minimum_seconds=60, free_if_preempted_within_seconds=3600)


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def price(usd: float, at: datetime = START) -> PricePoint:
    return PricePoint(at=at, usd_per_hour=usd)


def test_half_an_hour_at_2_dollars_an_hour_costs_1_dollar() -> None:
    assert bill(START, after(1800), [price(2.0)], TERMS, preempted=False) == Bill(1800.0, 1.0)


def test_a_machine_of_one_second_is_billed_for_a_minute() -> None:
    assert bill(START, after(1), [price(36.0)], TERMS, preempted=False) == Bill(60.0, 0.6)
    assert bill(START, after(59.9), [price(36.0)], TERMS, preempted=True) == Bill(60.0, 0.6)
    assert bill(START, after(61), [price(36.0)], TERMS, preempted=False) == Bill(61.0, 0.61)


def test_a_price_that_changes_is_charged_from_when_it_changes() -> None:
    prices = [price(1.0, after(-600)), price(2.0, after(900)), price(4.0, after(2700)), price(99.0, after(3600))]
    assert bill(START, after(3600), prices, TERMS, preempted=False).usd == 0.25 + 1.0 + 1.0
    assert bill(START, after(900), prices, TERMS, preempted=False).usd == 0.25


def test_a_price_from_long_before_the_launch_is_charged_from_the_launch() -> None:
    prices = [price(9.0, after(-7200)), price(1.0, after(-3600))]
    assert bill(START, after(3600), prices, TERMS, preempted=False).usd == 1.0


def test_the_minimum_is_charged_at_the_prices_that_held_in_it() -> None:
    prices = [price(36.0), price(72.0, after(30))]
    assert bill(START, after(1), prices, TERMS, preempted=False).usd == 0.9


def test_preempted_in_its_first_hour_a_machine_is_free_where_the_cloud_says_so() -> None:
    assert bill(START, after(3599), [price(2.0)], FREE_FIRST_HOUR, preempted=True) == Bill(0.0, 0.0)
    assert bill(START, after(3600), [price(2.0)], FREE_FIRST_HOUR, preempted=True) == Bill(3600.0, 2.0)
    assert bill(START, after(1800), [price(2.0)], FREE_FIRST_HOUR, preempted=False) == Bill(1800.0, 1.0)
    assert bill(START, after(1800), [price(2.0)], TERMS, preempted=True) == Bill(1800.0, 1.0)


def test_a_clock_that_went_backwards_bills_the_minimum() -> None:
    assert bill(START, after(-5), [price(36.0)], TERMS, preempted=False) == Bill(60.0, 0.6)


@pytest.mark.parametrize(("usd", "rounded"), [(0.00005, 0.0001), (0.00004999, 0.0), (1.00015, 1.0002), (2.5, 2.5)])
def test_dollars_are_rounded_half_up_to_a_hundredth_of_a_cent(usd: float, rounded: float) -> None:
    assert round_usd(usd) == rounded


def test_ten_dimes_are_one_dollar() -> None:
    assert sum([0.1] * 10) != 1.0
    assert add_usd([0.1] * 10) == 1.0
    assert add_usd([]) == 0.0


amounts = st.lists(st.integers(0, 10**9).map(lambda hundredths: hundredths / 10_000), max_size=60)


@given(amounts)
def test_a_total_is_exactly_the_sum_of_its_parts(parts: list[float]) -> None:
    exact = sum((Decimal(f"{part:.4f}") for part in parts), Decimal(0))
    assert Decimal(f"{add_usd(parts):.4f}") == exact
    assert add_usd([add_usd(parts[:5]), add_usd(parts[5:])]) == add_usd(parts)


@given(
    seconds=st.floats(60, 86400),
    changes=st.lists(st.tuples(st.floats(1, 86000), st.floats(0.001, 100)), max_size=8),
    first=st.floats(0.001, 100),
)
def test_a_bill_lies_between_the_lowest_and_the_highest_price(
    seconds: float, changes: list[tuple[float, float]], first: float
) -> None:
    prices = [price(first), *(price(usd, after(at)) for at, usd in sorted(changes))]
    charged = bill(START, after(seconds), prices, TERMS, preempted=False)
    held = [point.usd_per_hour for point in prices if point.at < after(seconds)]
    hours = (after(seconds) - START).total_seconds() / 3600
    assert min(held) * hours - 1e-4 <= charged.usd <= max(held) * hours + 1e-4
    assert charged.seconds == pytest.approx(seconds, abs=1e-3)
