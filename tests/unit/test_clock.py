"""The cloud's clock: in step with the wall's, or a fixed number of times as fast."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.clock import (
    CLOCK_VARIABLE,
    FastClock,
    WallClock,
    clock_from_environment,
    clock_from_text,
    clock_to_text,
    in_seconds,
)

ORIGIN = datetime(2026, 11, 1, 12, 0, 0, 123456, tzinfo=UTC)


def test_a_fast_clock_shows_the_walls_time_at_its_origin_and_runs_ahead_from_there() -> None:
    origin = datetime.now(UTC) - timedelta(seconds=10)
    ahead = FastClock(origin, 60).now() - origin
    assert timedelta(seconds=600) <= ahead < timedelta(seconds=600 + 60 * 5)


def test_a_minute_of_a_clock_600_times_as_fast_takes_a_tenth_of_a_second() -> None:
    clock = FastClock(datetime.now(UTC), 600)
    began, shown = time.monotonic(), clock.now()
    clock.sleep(60)
    assert time.monotonic() - began >= 0.1
    assert clock.now() - shown >= timedelta(seconds=60)


def test_sleeping_until_a_moment_that_has_passed_returns_at_once() -> None:
    began = time.monotonic()
    WallClock().sleep(-1000)
    FastClock(ORIGIN, 10).sleep(-1000)
    assert time.monotonic() - began < 1


def test_every_clock_shows_aware_utc() -> None:
    for clock in (WallClock(), FastClock(ORIGIN, 3)):
        assert clock.now().utcoffset() == timedelta(0)


@given(
    origin=st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.just(UTC)),
    speed=st.floats(min_value=1e-3, max_value=1e6),
)
def test_a_machine_gets_the_very_clock_it_was_given(origin: datetime, speed: float) -> None:
    assert clock_from_text(clock_to_text(FastClock(origin, speed))) == FastClock(origin, speed)


def test_without_a_word_about_it_a_machine_lives_by_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CLOCK_VARIABLE, raising=False)
    assert clock_from_environment() == WallClock()
    monkeypatch.setenv(CLOCK_VARIABLE, clock_to_text(WallClock()))
    assert clock_from_environment() == WallClock()
    monkeypatch.setenv(CLOCK_VARIABLE, "2026-11-01T12:00:00.123456+00:00 60.0")
    assert clock_from_environment() == FastClock(ORIGIN, 60.0)


def test_in_90_seconds_is_a_minute_and_a_half_later() -> None:
    assert in_seconds(90, ORIGIN) == datetime(2026, 11, 1, 12, 1, 30, 123456, tzinfo=UTC)
