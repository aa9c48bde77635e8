"""S3 and GCS behind a network that fails: nothing is lost, nothing is told twice, and busy means later."""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.errors import AlreadyExistsError, NotFoundError, TransientError
from holdfast.ledger.journal import Journal
from holdfast.storage.address import Address
from holdfast.storage.cloud import PARTS_AT_ONCE, CloudStore
from tests.emulated.gcs import GcsEmulator
from tests.emulated.object_stores import ACCESS_KEY, SECRET_KEY, S3Emulator
from tests.emulated.wire import Request, Wire

BUCKET = "faults"
PART_BYTES = 5 * 1024 * 1024
"""The smallest that both clouds take."""
WRITES = {"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"}


@dataclass(frozen=True)
class Cloud:
    name: str
    emulator: S3Emulator | GcsEmulator
    wire: Wire

    def store(self, retry_seconds: float = 20.0) -> CloudStore:
        address = Address.parse(self.emulator.url(BUCKET, "p", self.wire.url))
        return CloudStore(address, retry_seconds=retry_seconds, part_bytes=PART_BYTES)

    def calls(self, action: str) -> int:
        return self.wire.calls()[action]


@pytest.fixture(params=["s3", "gcs"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    emulator = S3Emulator(BUCKET) if request.param == "s3" else GcsEmulator(BUCKET)
    with emulator, Wire(emulator.endpoint) as wire:
        if isinstance(emulator, GcsEmulator):
            monkeypatch.setenv("GCE_METADATA_HOST", emulator.host)
        yield Cloud(request.param, emulator, wire)


def is_write(request: Request) -> bool:
    return request.action in WRITES


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


# -- throttling -------------------------------------------------------------------------------------------------------


def test_a_store_that_throttles_slows_the_upload_and_does_not_fail_it(cloud: Cloud) -> None:
    data = some_bytes(3 * PART_BYTES)
    busy_until = time.monotonic() + 3
    throttled = cloud.wire.inject(
        "throttle", when=lambda request: is_write(request) and time.monotonic() < busy_until, count=math.inf
    )
    store = cloud.store()
    store.put("checkpoint", [data])
    assert time.monotonic() > busy_until and throttled.hits >= 3
    assert cloud.emulator.contents(BUCKET) == {"p/checkpoint": data}


def test_while_it_throttles_it_is_asked_less_and_less(cloud: Cloud) -> None:
    throttled = cloud.wire.inject("throttle", when=is_write, count=math.inf)
    with pytest.raises(TransientError, match="SlowDown"):
        cloud.store(retry_seconds=3).put("small", b"x")
    assert 3 <= throttled.hits <= 15


def test_a_store_that_throttles_for_long_is_transient_by_every_verb_within_the_time_given(cloud: Cloud) -> None:
    store = cloud.store(retry_seconds=0.5)
    store.put("object", b"x")
    cloud.wire.inject("throttle", count=math.inf)
    for verb in (
        lambda: store.put("object", b"y"),
        lambda: store.put("object", [b"y" * (PART_BYTES + 1)]),
        lambda: store.create("new", b"y"),
        lambda: store.get("object"),
        lambda: store.get_range("object", 0, 1),
        lambda: store.list(""),
        lambda: store.delete("object"),
    ):
        began = time.monotonic()
        with pytest.raises(TransientError, match="p"):
            verb()
        assert time.monotonic() - began < 3
    cloud.wire.heal()
    assert cloud.emulator.contents(BUCKET) == {"p/object": b"x"}
    assert cloud.emulator.unfinished_uploads(BUCKET) == 0


# -- lost answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 500], ids=["reset", "HTTP 500"])
def test_a_create_whose_answer_was_lost_is_not_told_that_another_was_first(cloud: Cloud, status: int) -> None:
    for action in ("PutObject", "HeadObject"):  # the second loses the look at whose object it is, too
        cloud.wire.inject("lost", when=lambda request, action=action: request.action == action, status=status)
    cloud.store().create("journal/000001.json", b"mine")
    assert cloud.calls("PutObject") >= 2
    assert cloud.emulator.contents(BUCKET) == {"p/journal/000001.json": b"mine"}


@pytest.mark.parametrize("kind", ["lost", "reset", "error", "throttle"])
def test_a_create_that_another_won_says_so_whatever_was_lost_even_with_the_same_bytes(cloud: Cloud, kind: str) -> None:
    cloud.store().create("key", b"same")
    cloud.wire.inject(kind, when=lambda request: request.action == "PutObject", count=2)  # type: ignore[arg-type]
    with pytest.raises(AlreadyExistsError, match="key"):
        cloud.store().create("key", b"same")


def test_a_create_is_tried_again_when_the_store_says_that_another_write_is_under_way(cloud: Cloud) -> None:
    """S3 answers 409 to one of two writers at once; the key may be free when the other fails."""
    body = b"<Error><Code>ConditionalRequestConflict</Code><Message>.</Message></Error>"
    cloud.wire.inject("error", when=is_write, status=409, body=body)
    cloud.store().create("key", b"mine")
    assert cloud.emulator.contents(BUCKET) == {"p/key": b"mine"}


@pytest.mark.parametrize("action", sorted(WRITES - {"PutObject"}))
@pytest.mark.parametrize("kind", ["lost", "reset", "error"])
def test_an_upload_in_parts_survives_one_failure_anywhere(cloud: Cloud, action: str, kind: str) -> None:
    data = some_bytes(PART_BYTES + 1)
    fault = cloud.wire.inject(kind, when=lambda request: request.action == action)  # type: ignore[arg-type]
    cloud.store().put("object", data)
    assert fault.hits == 1
    assert cloud.emulator.contents(BUCKET) == {"p/object": data}


@pytest.mark.parametrize("kind", ["lost", "reset", "error"])
def test_a_delete_is_repeated_until_it_is_done(cloud: Cloud, kind: str) -> None:
    store = cloud.store()
    store.put("object", b"x")
    cloud.wire.inject(kind, when=lambda request: request.action == "DeleteObject", count=2)  # type: ignore[arg-type]
    store.delete("object")
    assert cloud.emulator.contents(BUCKET) == {}


@pytest.mark.parametrize("seed", range(3))
def test_with_a_fifth_of_all_calls_failing_every_verb_does_what_it_says(cloud: Cloud, seed: int) -> None:
    cloud.wire.probability, cloud.wire._random = 0.2, random.Random(seed)
    draw, store, expected = random.Random(seed), cloud.store(retry_seconds=30), dict[str, bytes]()
    for number in range(60):
        key = f"k/{draw.randrange(8)}"
        match draw.choice(["put", "create", "get", "list", "delete"]):
            case "put":
                expected[key] = f"{number}".encode()
                store.put(key, expected[key])
            case "create":
                if key in expected:
                    with pytest.raises(AlreadyExistsError):
                        store.create(key, b"late")
                else:
                    expected[key] = f"{number}".encode()
                    store.create(key, expected[key])
            case "get":
                if key in expected:
                    assert store.get(key) == expected[key]
                else:
                    with pytest.raises(NotFoundError):
                        store.get(key)
            case "list":
                assert [info.key for info in store.list("k/")] == sorted(expected)
            case "delete":
                expected.pop(key, None)
                store.delete(key)
    cloud.wire.heal()
    assert cloud.emulator.contents(BUCKET) == {f"p/{key}": data for key, data in expected.items()}
    assert sum(bool(request.fault) for request in cloud.wire.requests) > 5


@pytest.mark.parametrize("seed", range(3))
def test_a_journal_and_its_checkpoints_stay_true_while_a_fifth_of_all_calls_fail(cloud: Cloud, seed: int) -> None:
    cloud.wire.probability, cloud.wire._random = 0.2, random.Random(seed)
    store = cloud.store(retry_seconds=30)
    journal, checkpoints = Journal(store, "runs/r/journal/"), Checkpoints(store, "r")
    for step in range(1, 11):
        checkpoints.commit(CheckpointId(1, step), {"weights": [bytes([step]) * 1000]}, {"step": step})
        assert journal.append("committed", datetime.now(UTC), step=step).number == step
    cloud.wire.heal()
    entries = Journal(cloud.store(), "runs/r/journal/").read()
    assert [entry.fields["step"] for entry in entries] == list(range(1, 11))
    for one in checkpoints.committed():
        assert checkpoints.read(one, checkpoints.manifest(one), "weights") == bytes([one.step]) * 1000
    assert len(checkpoints.committed()) == 10


# -- large objects ----------------------------------------------------------------------------------------------------


def test_a_large_object_travels_in_parts_both_ways(cloud: Cloud) -> None:
    data = some_bytes(5 * PART_BYTES + 4711)
    store = cloud.store()
    store.put("large", iter([data[:100], data[100 : 4 * PART_BYTES], b"", data[4 * PART_BYTES :]]))
    assert cloud.calls("UploadPart") == 6 and cloud.calls("PutObject") == 0
    assert store.get("large") == data
    assert cloud.calls("GetObject") == 7  # one for its size, and six parts
    start = PART_BYTES - 5
    assert store.get_range("large", start, -1) == data[start:]
    assert store.get_range("large", start, 10) == data[start : start + 10]


@pytest.mark.parametrize("action", ["GetObject", "ListObjectsV2"])
def test_an_answer_cut_off_in_the_middle_is_asked_for_again(cloud: Cloud, action: str) -> None:
    data, store = some_bytes(1_000_000), cloud.store()
    store.put("object", data)
    fault = cloud.wire.inject("cut", when=lambda request: request.action == action, count=2)
    assert store.get("object") == data
    assert [info.size_bytes for info in store.list("")] == [len(data)]
    assert fault.hits == 2


def test_a_source_is_sent_while_it_is_read_not_gathered_first(cloud: Cloud) -> None:
    waiting = []

    def pieces() -> Iterator[bytes]:
        for number in range(2 * PARTS_AT_ONCE):
            waiting.append(number - cloud.calls("UploadPart"))
            yield bytes([number]) * PART_BYTES

    cloud.store().put("large", pieces())
    assert max(waiting) <= PARTS_AT_ONCE + 3


def test_a_source_may_fill_the_same_memory_again_and_again(cloud: Cloud) -> None:
    def pieces() -> Iterator[bytearray]:
        memory = bytearray(PART_BYTES // 2)
        for number in range(6):
            memory[:] = bytes([number]) * len(memory)
            yield memory

    cloud.store().put("object", pieces())
    assert cloud.emulator.contents(BUCKET)["p/object"] == b"".join(bytes([n]) * (PART_BYTES // 2) for n in range(6))


def test_a_source_that_fails_late_leaves_no_part_that_costs_money(cloud: Cloud) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x" * (2 * PART_BYTES)
        raise FileNotFoundError("the snapshot is gone")

    store = cloud.store()
    store.put("object", b"whole")
    with pytest.raises(FileNotFoundError, match="snapshot is gone"):
        store.put("object", pieces())
    assert cloud.emulator.contents(BUCKET) == {"p/object": b"whole"}
    assert cloud.emulator.unfinished_uploads(BUCKET) == 0


def test_a_large_object_that_is_replaced_while_it_is_read_is_read_whole(cloud: Cloud) -> None:
    old, new = (some_bytes(5 * PART_BYTES, seed) for seed in (1, 2))
    store, other = cloud.store(), CloudStore(Address.parse(cloud.emulator.url(BUCKET, "p")))
    store.put("object", old)
    replaced = []

    def replace(request: Request) -> bool:
        if request.action == "GetObject" and "range" in request.headers and not replaced:
            replaced.append(request)
            other.put("object", new)
        return False

    cloud.wire.inject("slow", when=replace, seconds=0)
    assert store.get("object") == new and replaced


def test_thousands_of_keys_are_listed_page_by_page(cloud: Cloud) -> None:
    wanted = [f"batch/{number:06d}" for number in range(1100)]
    if isinstance(cloud.emulator, S3Emulator):
        cloud.emulator.fill(BUCKET, [f"p/{key}" for key in wanted])
    else:
        for key in wanted:
            cloud.emulator.write(BUCKET, f"p/{key}", b"", {}, None)
    cloud.wire.inject("lost", when=lambda request: "continuation-token" in request.path)
    store = cloud.store()
    assert [info.key for info in store.list("batch/")] == wanted
    assert cloud.calls("ListObjectsV2") == 3
    assert [info.key for info in store.list("batch/0010")] == wanted[1000:]


# -- signals ----------------------------------------------------------------------------------------------------------


def test_a_signal_is_heard_while_the_store_lets_us_wait(cloud: Cloud) -> None:
    """A machine's shutdown notice is one."""
    heard: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(time.monotonic()))
    try:
        store = cloud.store()
        cloud.wire.inject("slow", when=is_write, seconds=2)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        began = time.monotonic()
        store.put("object", b"x")
        assert heard and heard[0] - began < 1.5 < time.monotonic() - began
    finally:
        signal.signal(signal.SIGALRM, before)
