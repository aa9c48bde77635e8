"""Every run adds what became of its machines to the store's history, and no run's part is ever lost."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

from holdfast.drivers.protocol import CapacityPool
from holdfast.market.history import DAYS, LIVES, History, Life
from holdfast.storage import open_store

POOL = CapacityPool("aws", "us-east-1", "us-east-1a", "g5.xlarge", "spot")
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def life(run: str, number: int, *, ended_at: datetime = NOON, hours: float = 1.0, outcome="preempted") -> Life:
    return Life(
        run=run,
        token=str(number),
        pool=POOL,
        launched_at=ended_at - timedelta(hours=hours),
        ended_at=ended_at,
        recorded_at=ended_at + timedelta(seconds=1, microseconds=number),
        outcome=outcome,
        usd=0.4,
    )


def store_in(folder: Path):
    return open_store(f"file://{folder}")


def test_a_life_is_read_back_as_it_was_recorded(tmp_path):
    history = History(store_in(tmp_path))
    refused = Life(
        run="r",
        token="round-1-0",
        pool=POOL,
        launched_at=None,
        ended_at=NOON,
        recorded_at=NOON,
        outcome="no-capacity",
    )
    history.record([life("r", 1), refused])
    assert History(store_in(tmp_path)).lives(NOON - timedelta(days=1)) == [life("r", 1), refused]
    assert refused.refused and not refused.preempted and refused.hours == 0


def test_recording_again_changes_nothing(tmp_path):
    history, lives = History(store_in(tmp_path)), [life("r", number) for number in range(5)]
    for part in (lives[:1], lives[:3], lives, lives):
        history.record(part)
    assert history.lives(NOON - timedelta(days=1)) == lives


def test_twenty_runs_that_write_at_once_lose_nothing(tmp_path):
    def run(name: str) -> None:
        history = History(store_in(tmp_path))
        for number in range(10):
            history.record([life(name, number)])

    runs = [threading.Thread(target=run, args=(f"run-{number}",)) for number in range(20)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    found = History(store_in(tmp_path)).lives(NOON - timedelta(days=1))
    assert len({(one.run, one.token) for one in found}) == len(found) == 200


def test_only_the_time_that_is_asked_for_is_given(tmp_path):
    history = History(store_in(tmp_path))
    history.record([life("r", number, ended_at=NOON - timedelta(hours=number)) for number in range(50)])
    found = history.lives(NOON - timedelta(hours=6), NOON - timedelta(hours=3))
    assert [one.token for one in found] == ["6", "5", "4"]


def test_a_day_that_is_over_is_read_from_one_object_and_a_late_comer_is_missed_by_nobody(tmp_path):
    store = store_in(tmp_path)
    history = History(store)
    history.record([life("r", number) for number in range(4)])
    history.record([life("r", 9, ended_at=NOON + timedelta(days=1))])
    assert len(history.lives(NOON - timedelta(days=1))) == 5
    assert [info.key for info in store.list(DAYS)] == [f"{DAYS}2026-11-20.json"]

    reads = CountingStore(store)
    assert len(History(reads).lives(NOON - timedelta(days=1))) == 5
    assert sum(key.startswith(LIVES) for key in reads.got) == 1  # of the day that is not over

    history.record([life("late", 7)])
    found = History(store).lives(NOON - timedelta(days=1))
    assert len(found) == 6 and any(one.run == "late" for one in found)


class CountingStore:
    """The store itself, with a note of what was read."""

    def __init__(self, store) -> None:
        self._store, self.got = store, []

    def get(self, key: str) -> bytes:
        self.got.append(key)
        return self._store.get(key)

    def __getattr__(self, name: str):
        return getattr(self._store, name)
