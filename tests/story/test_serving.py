"""A model server on machines that are taken away, behind a real haproxy under steady load. Every machine is processes.

HOLDFAST_TEST_PREEMPTIONS: how many, 5 if unset. `HOLDFAST_TEST_PREEMPTIONS=20 pytest -s tests/story/test_serving.py` does
more of them and shows its figures.
"""

from __future__ import annotations

import http.client
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows.fleet import carry_out_fleet
from holdfast.drivers.local import LocalDriver
from holdfast.drivers.local.config import Fate
from holdfast.drivers.local.machine_files import CONSOLE
from holdfast.ledger.billing import add_usd
from holdfast.model import Haproxy, Resources, ServeJob
from holdfast.serving.connections import free_port
from holdfast.storage import DirectoryStore
from holdfast.supervision.serve_opening import open_serve_run
from holdfast.supervision.serve_run import ServeRun
from tests.chaos.runs import assert_nothing_left, cloud, wait_until
from tests.conftest import PROGRAMS

PREEMPTIONS = int(os.environ.get("HOLDFAST_TEST_PREEMPTIONS", "5"))
REPOSITORY = Path(__file__).parents[2]
CLIENTS = 4
PATIENCE_SECONDS = 120.0

pytestmark = pytest.mark.skipif(not shutil.which("haproxy"), reason="no haproxy on the path: apt-get install haproxy")


def serve_job(folder: Path, name: str = "served", **changes: Any) -> ServeJob:
    (folder / f"orders-{name}").mkdir(exist_ok=True)
    fields: dict[str, Any] = {
        "name": name,
        "script": "server.py",
        "args": ["{port}", "0.2"],
        "code": str(PROGRAMS),
        "env": {"ORDERS": str(folder / f"orders-{name}")},
        "resources": Resources(instance_types=["c7i.large"]),
        "replicas": 2,
        "load_balancer": Haproxy(listen=f"127.0.0.1:{free_port()}"),
        "notice_poll_seconds": 0.1,
        "max_run_hours": 50,
    }
    return ServeJob(**{**fields, **changes})


def taken_when_told(count: int, notice: bool, **changes: Any) -> list[Fate]:
    """Fates that begin when the machine's console says so: see `take`."""
    return [Fate(at_step=1, notice=notice, notice_seconds=6.0, **changes)] * count


def take(folder: Path, machine: str) -> None:
    """Let the market take this machine now."""
    with open(folder / "cloud/machines" / machine / CONSOLE, "ab") as console:
        console.write(b"\nholdfast: step 1\n")


@dataclass
class Served:
    """A run that serves, in a thread of this process, until `stop`."""

    run: ServeRun
    summary: dict[str, Any] = field(default_factory=dict)
    error: BaseException | None = None

    @property
    def url(self) -> str:
        return self.run.job.load_balancer.listen

    @property
    def registered(self) -> set[str]:
        living = {member.machine for member in self.run.state.living}
        return set(self.run.state.registered) & living

    def wait_for(self, condition: Callable[[], Any]) -> None:
        def holds() -> Any:
            if self.error:
                raise self.error
            return condition()

        wait_until(holds, PATIENCE_SECONDS)

    def wait_until_whole(self, but: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
        """All replicas are registered, none of them in `but`, and nobody is about to leave."""
        job = self.run.job
        self.wait_for(
            lambda: len(self.registered - but) >= job.replicas and not (self.registered & but) and not self.run.leaving
        )
        return sorted(self.registered)


@contextmanager
def serving(
    job: ServeJob, driver: LocalDriver, store: DirectoryStore, expected: type[BaseException] | None = None
) -> Iterator[Served]:
    """A flow that serves; at the end it is asked to stop, as when its hours are used up."""
    served = Served(open_serve_run(job, driver, store, None, job.name))

    @flow(name="test-serve")
    def story() -> dict[str, Any]:
        return carry_out_fleet(served.run)

    def carry() -> None:
        try:
            served.summary = story()
        except BaseException as error:
            served.error = error

    thread = threading.Thread(target=carry)
    thread.start()
    try:
        yield served
    finally:
        if thread.is_alive() and served.run.state.state == "running":
            served.run.ask_to_stop("over-budget", "the test is over", 5.0)
        thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive(), "the run does not end"
    if expected:
        assert isinstance(served.error, expected), served.error
    elif served.error:
        raise served.error


@dataclass(frozen=True)
class Failure:
    begun_at: datetime
    ended_at: datetime
    what: str
    retried: bool
    """Did the one retry succeed?"""


class Load:
    """Clients that send one request after another, each over a connection that is kept, and retry a failed one once."""

    def __init__(self, address: str, seconds: float = 0.05) -> None:
        self._address, self._seconds = address, seconds
        self.answers: Counter[str] = Counter()
        self.failures: list[Failure] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=60)
        while not self._stop.is_set():
            begun_at = datetime.now(UTC)
            answer, problem = self._ask(connection)
            ended_at = datetime.now(UTC)
            retried = False
            if problem:
                answer, _ = self._ask(connection)
                retried = answer is not None
            with self._lock:
                if problem:
                    self.failures.append(Failure(begun_at, ended_at, problem, retried))
                if answer:
                    self.answers[answer] += 1
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> tuple[str | None, str]:
        try:
            connection.request("GET", f"/?seconds={self._seconds}")
            response = connection.getresponse()
            text = response.read().decode()
            return (text, "") if response.status == 200 else (None, f"status {response.status}")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return None, repr(error)


def assert_bill_adds_up(summary: dict[str, Any], driver: LocalDriver) -> None:
    assert_nothing_left(driver)
    assert sorted(one["machine"] for one in summary["members"]) == sorted(one.id for one in driver.machines({}))
    assert summary["usd_total"] == add_usd(one["usd"] for one in summary["members"]) > 0


def test_no_request_fails_when_machines_are_taken_with_notice(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, taken_when_told(PREEMPTIONS + 4, notice=True))
    taken: list[str] = []
    with serving(serve_job(folder), driver, store) as served:
        served.wait_until_whole()
        with Load(served.url) as load:
            for _ in range(PREEMPTIONS):
                victim = served.wait_until_whole(but=set(taken))[0]
                before = load.answers[victim]
                served.wait_for(lambda victim=victim, before=before: load.answers[victim] > before)
                take(folder, victim)
                taken.append(victim)
            served.wait_until_whole(but=set(taken))
    print(f"{PREEMPTIONS} preemptions with notice: {load.answers.total()} answers, {len(load.failures)} failed")
    assert load.failures == [] and load.answers.total() > 100
    summary = served.summary
    outcomes = {one["machine"]: one["outcome"] for one in summary["members"]}
    assert [outcomes[machine] for machine in taken] == ["preempted"] * PREEMPTIONS
    assert summary["registrations"] == PREEMPTIONS + 2 and summary["deregistered"]["draining"] >= PREEMPTIONS
    assert summary["seconds_without_a_replica"] < 1
    assert_bill_adds_up(summary, driver)
