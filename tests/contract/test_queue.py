"""What Holdfast asks of a queue. Every broker of BROKERS passes this."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from holdfast.errors import ConfigError, TransientError
from holdfast.queues import Lease, Queue, open_queue
from tests.contract.brokers import Broker, broker, free_port, started_broker

__all__ = ["broker", "started_broker"]

NUMBERS = itertools.count(1)
PATIENCE_SECONDS = 60.0
SHORT_SECONDS = 2.0
"""A visibility timeout that a test waits for. Those who hold a lease against it renew it often."""

Open = Callable[..., Queue]


@pytest.fixture
def open_one(broker: Broker) -> Iterator[Open]:
    """Queues of one name, new in every test; as many openings as one likes."""
    name, opened = f"run-{time.time_ns()}/{next(NUMBERS)}", []

    def opener(visibility_seconds: float = 120.0, max_deliveries: int = 5) -> Queue:
        queue = open_queue(broker.url, name, visibility_seconds=visibility_seconds, max_deliveries=max_deliveries)
        opened.append(queue)
        return queue

    opener.name = name  # type: ignore[attr-defined]
    yield opener
    for queue in opened:
        queue.close()


def program(verb: str, broker: Broker, open_one: Open, visibility_seconds: float, *rest: str) -> subprocess.Popen[str]:
    words = [verb, broker.url, open_one.name, str(visibility_seconds), *rest]  # type: ignore[attr-defined]
    return subprocess.Popen([sys.executable, "-m", "tests.programs.leasing", *words], stdout=subprocess.PIPE, text=True)


def leased(queue: Queue, count: int) -> list[Lease]:
    """`count` leases, as they come."""
    found: list[Lease] = []
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while len(found) < count and time.monotonic() < give_up_at:
        found += queue.lease(count - len(found), wait_seconds=1.0)
    assert len(found) == count
    return found


def bodies(leases: list[Lease]) -> list[bytes]:
    return sorted(lease.body for lease in leases)


def is_empty(queue: Queue) -> bool:
    return not queue.lease(10, wait_seconds=0.3)


# -- putting and leasing ----------------------------------------------------------------------------------------------


def test_what_was_put_is_leased_once_and_as_it_was(open_one: Open) -> None:
    queue = open_one()
    put = [b'{"id": 1}', b"\x00\xff\r\n binary", "Größe".encode(), b""] + [b"%d" % number for number in range(30)]
    queue.put(put)
    leases = leased(queue, len(put))
    assert bodies(leases) == sorted(put)
    assert {lease.deliveries for lease in leases} == {1}
    assert is_empty(queue)
    queue.acknowledge(leases)


def test_an_empty_queue_gives_nothing_and_takes_nothing(open_one: Open) -> None:
    queue = open_one()
    queue.put([])
    queue.acknowledge([])
    queue.hand_back([])
    assert queue.extend([]) == [] and queue.dead() == [] and queue.lease(5) == []
    assert queue.depth().waiting == 0


def test_no_more_are_leased_than_were_asked_for(open_one: Open) -> None:
    queue = open_one()
    queue.put([b"%d" % number for number in range(25)])
    assert len(queue.lease(3, wait_seconds=10)) <= 3
    assert len(leased(queue, 12)) == 12


def test_what_is_put_later_is_waited_for(open_one: Open) -> None:
    putting, leasing = open_one(), open_one()
    late = threading.Timer(0.3, lambda: putting.put([b"late"]))
    late.start()
    (lease,) = leasing.lease(1, wait_seconds=PATIENCE_SECONDS)
    assert lease.body == b"late"
    late.join()


def test_what_was_acknowledged_never_comes_back(open_one: Open) -> None:
    queue = open_one(visibility_seconds=SHORT_SECONDS)
    queue.put([b"done", b"left"])
    (first,) = queue.lease(1, wait_seconds=10)
    queue.acknowledge([first])
    (second,) = leased(queue, 1)
    assert {first.body, second.body} == {b"done", b"left"}
    (again,) = leased(queue, 1)  # the lease ran out
    assert again.body == second.body and again.deliveries == 2
    queue.acknowledge([again])
    time.sleep(SHORT_SECONDS * 1.5)
    assert is_empty(queue)


# -- leases -----------------------------------------------------------------------------------------------------------


def test_a_killed_worker_s_lease_comes_back_after_the_visibility_timeout(broker: Broker, open_one: Open) -> None:
    queue = open_one(visibility_seconds=3.0)
    queue.put([b"batch"])
    before = time.monotonic()
    with program("hold", broker, open_one, 3.0) as worker:
        assert worker.stdout and worker.stdout.readline() == "batch\n"
        worker.kill()
    (lease,) = leased(queue, 1)
    if not broker.back_at_once:
        assert time.monotonic() - before >= 2.9
    assert (lease.body, lease.deliveries) == (b"batch", 2)


def test_what_was_handed_back_is_there_at_once_and_nothing_is_held_against_it(open_one: Open) -> None:
    here, there = open_one(max_deliveries=2), open_one(max_deliveries=2)
    here.put([b"one", b"two"])
    for _ in range(4):  # twice as often as it may fail
        leases = leased(here, 2)
        here.hand_back(leases)
        again = leased(there, 2)
        assert bodies(again) == [b"one", b"two"] and {lease.deliveries for lease in again} == {1}
        there.hand_back(again)
    assert here.dead() == []


class StoodStill(Exception):
    """This machine did nothing for longer than a lease: a test of leases says nothing then."""


def on_a_machine_that_goes_on(story: Callable[[float], None]) -> None:
    """`story` with leases that are longer each time, should the machine stand still."""
    for visibility_seconds in (SHORT_SECONDS, 3 * SHORT_SECONDS, 10 * SHORT_SECONDS):
        try:
            return story(visibility_seconds)
        except StoodStill:
            continue
    pytest.fail(f"this machine stood still for {10 * SHORT_SECONDS} s")


def test_a_lease_that_is_extended_is_kept(open_one: Open) -> None:
    def story(visibility_seconds: float) -> None:
        here, there = open_one(visibility_seconds), open_one(visibility_seconds)
        here.put([b"long"])
        held = leased(here, 1)
        until = time.monotonic() + 1.5 * visibility_seconds
        while time.monotonic() < until:
            before = time.monotonic()
            if here.extend(held):
                here.acknowledge(leased(there, 1))
                raise StoodStill
            taken = there.lease(1)
            if taken and time.monotonic() - before > visibility_seconds / 2:
                there.acknowledge(taken)
                raise StoodStill
            assert taken == []
            time.sleep(0.1)
        here.acknowledge(held)
        assert is_empty(there)

    on_a_machine_that_goes_on(story)


def test_a_lost_lease_is_told_and_its_holder_can_do_no_harm(open_one: Open) -> None:
    def story(visibility_seconds: float) -> None:
        here, there = open_one(visibility_seconds), open_one()
        here.put([b"slow", b"kept"])
        lost, kept = sorted(leased(here, 2), key=lambda lease: lease.body != b"slow")
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        taken: list[Lease] = []
        while not taken and time.monotonic() < give_up_at:
            if here.extend([kept]):
                there.acknowledge(leased(there, 2))
                raise StoodStill
            taken = there.lease(1)
        assert [(one.body, one.deliveries) for one in taken] == [(b"slow", 2)]
        assert here.extend([lost, kept]) == [lost]
        here.hand_back([lost])
        here.dead_letter(lost, "too late")
        here.acknowledge([lost, kept])
        assert there.dead() == [] and is_empty(there)
        assert there.extend(taken) == []
        there.hand_back(taken)
        (again,) = leased(there, 1)
        assert again.body == b"slow"
        there.acknowledge([again])

    on_a_machine_that_goes_on(story)


# -- what fails -------------------------------------------------------------------------------------------------------


def test_what_came_back_too_often_is_dead_and_says_why(open_one: Open) -> None:
    queue = open_one(visibility_seconds=1.0, max_deliveries=2)
    queue.put([b"poison"])
    for delivery in (1, 2):
        (lease,) = leased(queue, 1)
        assert lease.deliveries == delivery
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not (dead := queue.dead()) and time.monotonic() < give_up_at:
        assert queue.lease(1, wait_seconds=0.2) == []
    ((body, reason),) = dead
    assert body == b"poison" and "2 times" in reason
    for _ in range(5):
        assert queue.dead() == dead  # looking takes nothing away
        assert queue.depth().dead == 1


def test_what_is_declared_dead_is_not_tried_again(open_one: Open) -> None:
    queue = open_one()
    queue.put([b"poison", b"fine"])
    for lease in leased(queue, 2):
        if lease.body == b"poison":
            queue.dead_letter(lease, "ValueError: größer als erlaubt")
        else:
            queue.hand_back([lease])
    assert bodies(leased(queue, 1)) == [b"fine"] and is_empty(queue)
    assert queue.dead() == [(b"poison", "ValueError: größer als erlaubt")]


# -- depth and concurrency --------------------------------------------------------------------------------------------


def test_depth_counts_what_waits_what_is_leased_and_what_is_dead(broker: Broker, open_one: Open) -> None:
    queue = open_one()
    queue.put([b"%d" % number for number in range(10)])
    first, *others = leased(queue, 4)
    queue.dead_letter(first, "no good")
    queue.acknowledge(others[:1])
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while (depth := queue.depth()) and (depth.waiting, depth.leased, depth.dead) != (6, 2, 1):
        assert time.monotonic() < give_up_at, depth
        time.sleep(0.1)
    if broker.sees_all_leases:
        assert open_one().depth() == depth


def test_many_processes_never_have_an_item_at_the_same_time_and_leave_none(
    broker: Broker, open_one: Open, tmp_path: Path
) -> None:
    items = 64 if broker.is_slow else 240
    queue, log = open_one(), tmp_path / "had"
    queue.put([b"%d" % number for number in range(items)])
    workers = [program("race", broker, open_one, 120.0, str(log)) for _ in range(4 if broker.is_slow else 8)]
    assert {worker.wait() for worker in workers} == {0}
    had = defaultdict(list)
    for line in log.read_text().splitlines():
        item, start, stop, _ = line.split()
        had[int(item)].append((float(start), float(stop)))
    assert sorted(had) == list(range(items))
    assert {item: times for item, times in had.items() if len(times) != 1} == {}
    assert is_empty(queue)


def test_threads_share_a_queue(open_one: Open) -> None:
    queue, had, lock = open_one(), [], threading.Lock()
    queue.put([b"%d" % number for number in range(60)])

    def work() -> None:
        while leases := queue.lease(2, wait_seconds=1.0):
            queue.extend(leases)
            queue.acknowledge(leases)
            with lock:
                had.extend(int(lease.body) for lease in leases)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(had) == list(range(60))


# -- a broker that goes away ------------------------------------------------------------------------------------------


def test_a_broker_that_is_killed_and_started_again_loses_nothing(broker: Broker, open_one: Open) -> None:
    if broker.restart is None:
        return  # it is no process of its own: nothing to restart
    queue = open_one(visibility_seconds=20.0)
    queue.put([b"%d" % number for number in range(50)])
    done = leased(queue, 10)
    queue.acknowledge(done)
    held = leased(queue, 5)
    stop, late = threading.Event(), []

    def go_on_putting() -> None:
        while not stop.is_set():
            late.append(b"late %d" % len(late))
            queue.put(late[-1:])

    putting = threading.Thread(target=go_on_putting)
    putting.start()
    broker.restart()
    stop.set()
    putting.join()
    queue.acknowledge(held)  # whether they were lost or not is the broker's matter
    rest, give_up_at = set(), time.monotonic() + PATIENCE_SECONDS
    expected = {b"%d" % number for number in range(50)} - {lease.body for lease in done + held} | set(late)
    while not expected <= rest and time.monotonic() < give_up_at:
        found = queue.lease(10, wait_seconds=1.0)
        rest |= {lease.body for lease in found}
        queue.acknowledge(found)
    assert expected <= rest
    assert not rest & {lease.body for lease in done}


# -- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("kafka://host/", "no broker speaks 'kafka'"),
        ("sqlite://host/queue.db", "sqlite:///PATH"),
        ("redis:///0", "names no host"),
        ("redis://host/five", "a database's number"),
        ("redis://host/?token=hidden", "can't say 'token'"),
        ("amqp://host:99999/", "no number up to 65535"),
        ("sqs://frankfurt/", "for example sqs://eu-central-1/"),
        ("sqs://eu-central-1/?key=hidden", "can't say 'key'"),
        ("store+ftp://host/", "no store speaks 'ftp'"),
        ("pubsub://Project/", "the id of a Google Cloud project"),
    ],
)
def test_a_wrong_url_is_refused_and_says_what_to_write(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        open_queue(url, "run")
    assert "hidden" not in str(refused.value)


def test_a_server_that_is_not_there_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    address = f"127.0.0.1:{free_port()}"

    def said(url: str) -> str:
        with pytest.raises(TransientError) as refused:
            open_queue(url, "run")
        return str(refused.value)

    urls = [f"redis://holdfast:secret@{address}/", f"amqp://holdfast:secret@{address}/"]
    urls += [f"sqs://us-east-1/?endpoint=http://{address}", f"pubsub://project/?endpoint=http://{address}"]
    with ThreadPoolExecutor(len(urls)) as pool:
        for text in pool.map(said, urls):
            assert address in text and "secret" not in text


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("redis://localhost/", "redis", "redis"),
        ("amqp://localhost/", "amqp", "amqp"),
        ("sqs://us-east-1/", "boto3", "aws"),
        ("pubsub://project/", "google.pubsub_v1", "pubsub"),
    ],
)
def test_a_missing_client_library_is_told_with_the_extra_to_install(url: str, package: str, extra: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from holdfast.queues import open_queue\nopen_queue({url!r}, 'run')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"pip install 'holdfast[{extra}]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["", "-a", "a b", "a" * 201])
def test_a_wrong_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no name of a queue"):
        open_queue(f"sqlite://{tmp_path}/queue.db", name)
