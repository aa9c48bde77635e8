"""The append-only sequence of what happened: two writers can't both write number 7, and a crash leaves a true prefix."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import AlreadyExistsError, TransientError
from holdfast.ledger.journal import Entry, Journal
from holdfast.storage import DirectoryStore, ObjectStore
from holdfast.storage.protocol import Data
from tests.unit.failing_store import FailingStore, unreachable

AT = datetime(2026, 11, 1, 12, 0, 0, 250_000, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def journal(store: ObjectStore) -> Journal:
    return Journal(store, "runs/a/journal/")


def test_what_was_written_is_read_by_everyone_in_order(store: DirectoryStore) -> None:
    mine = journal(store)
    for step in range(1, 13):
        mine.append("committed", AT, step=step, note="ü", nothing=None)
    read = journal(store).read()
    assert read == list(mine)
    assert [entry.number for entry in read] == list(range(1, 13))
    assert read[11] == Entry(12, "committed", AT, {"step": 12, "note": "ü", "nothing": None})


def test_every_entry_is_an_object_of_its_own(store: DirectoryStore) -> None:
    mine = journal(store)
    mine.append("one", AT)
    mine.append("two", AT)
    assert [info.key for info in store.list("")] == ["runs/a/journal/000001.json", "runs/a/journal/000002.json"]


def test_of_two_writers_one_learns_that_it_is_late(store: DirectoryStore) -> None:
    one, other = journal(store), journal(store)
    one.append("launched", AT, machine="i-1")
    with pytest.raises(AlreadyExistsError):
        other.append("launched", AT, machine="i-2")
    assert [entry.fields["machine"] for entry in other.read()] == ["i-1"]
    assert other.append("ended", AT).number == 2
    with pytest.raises(AlreadyExistsError):
        one.append("ended", AT)


def test_who_is_late_decides_anew_on_what_the_other_wrote(store: DirectoryStore) -> None:
    one, other = journal(store), journal(store)

    def decide(entries: list[Entry]) -> tuple[str, datetime, dict[str, Any]]:
        if not entries:
            other.append("reserved", AT, usd=1)
        return "reserved", AT, {"usd": 10 * len(entries)}

    written = one.append_if(decide)
    assert written and (written.number, written.fields) == (2, {"usd": 10})


def test_a_write_whose_answer_was_lost_is_not_taken_for_another_writer_s(store: DirectoryStore) -> None:
    class AnswerLost(FailingStore):
        def create(self, key: str, data: Data | Iterable[Data]) -> None:
            store.create(key, data)
            raise TransientError("written, but nobody said so")

    writer = journal(AnswerLost(store))
    assert writer.append("one", AT).number == 1
    assert writer.append("two", AT).number == 2
    assert [entry.kind for entry in journal(store).read()] == ["one", "two"]


def test_a_write_that_could_not_even_be_looked_for_is_known_when_it_is_asked_for_again(store: DirectoryStore) -> None:
    class Away(FailingStore):
        away = True

        def create(self, key: str, data: Data | Iterable[Data]) -> None:
            store.create(key, data)
            if self.away:
                raise TransientError("written, but nobody said so")

        def get(self, key: str) -> bytes:
            if self.away:
                raise TransientError("the store does not answer")
            return store.get(key)

    away = Away(store)
    writer = journal(away)
    with pytest.raises(TransientError):
        writer.append("one", AT)
    away.away = False
    assert writer.append("one", AT).number == 1
    assert writer.append("two", AT).number == 2
    assert [entry.kind for entry in journal(store).read()] == ["one", "two"]


def test_a_write_that_did_not_happen_is_an_error(store: DirectoryStore) -> None:
    writer = journal(FailingStore(store, at=[1], fail=unreachable))
    with pytest.raises(TransientError):
        writer.append("one", AT)
    assert writer.append("one", AT).number == 1


def test_deciding_nothing_writes_nothing(store: DirectoryStore) -> None:
    assert journal(store).append_if(lambda entries: None) is None
    assert journal(store).read() == []


def test_reading_again_fetches_only_what_is_new(store: DirectoryStore) -> None:
    counted = FailingStore(store)
    reader, writer = Journal(counted, "runs/a/journal/"), journal(store)
    writer.append("one", AT)
    writer.append("two", AT)
    reader.read()
    writer.append("three", AT)
    counted.calls.clear()
    assert [entry.kind for entry in reader.read()] == ["one", "two", "three"]
    assert [key for verb, key in counted.calls if verb == "get"] == ["runs/a/journal/000003.json"]


def test_what_lies_beyond_a_gap_is_not_believed(store: DirectoryStore) -> None:
    mine = journal(store)
    for kind in ("one", "two", "three"):
        mine.append(kind, AT)
    store.delete("runs/a/journal/000002.json")
    assert [entry.kind for entry in journal(store).read()] == ["one"]


def test_one_run_s_journal_is_not_another_s(store: DirectoryStore) -> None:
    Journal(store, "runs/ab/journal/").append("one", AT)
    assert journal(store).read() == []


def test_processes_that_append_at_once_lose_nothing(store: DirectoryStore) -> None:
    program = """
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from holdfast.ledger.journal import Journal
from holdfast.storage import open_store
journal = Journal(open_store(sys.argv[1]), "runs/a/journal/")
for number in range(20):
    journal.append_if(lambda entries: ("said", datetime.now(UTC), {"who": sys.argv[2], "number": number}))
"""
    writers = [subprocess.Popen([sys.executable, "-c", program, store.url, name]) for name in "xyz"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    said = [(entry.fields["who"], entry.fields["number"]) for entry in journal(store).read()]
    assert sorted(said) == [(name, number) for name in "xyz" for number in range(20)]
    for name in "xyz":
        assert [number for who, number in said if who == name] == list(range(20))
