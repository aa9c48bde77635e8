"""A model server on machines that are taken away, behind a real haproxy under steady load. Every machine is processes.

HOLDFAST_TEST_PREEMPTIONS: how many, 3 if unset. `HOLDFAST_TEST_PREEMPTIONS=20 pytest -s tests/story/test_serving.py` does
more of them and shows its figures.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import flow

from blocks.accounts import LocalAccount
from flows.fleet import carry_out_fleet
from holdfast.drivers.local import LocalDriver
from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.drivers.local.machine_files import CONSOLE
from holdfast.errors import ProgramFailedError
from holdfast.ledger.billing import add_usd
from holdfast.model import Haproxy, Resources, ServeJob
from holdfast.serving.connections import free_port
from holdfast.serving.haproxy import own_haproxies
from holdfast.serving.opening import open_balancer
from holdfast.storage import DirectoryStore
from holdfast.supervision.serve_opening import open_serve_run
from holdfast.supervision.serve_run import ServeRun
from tests.chaos.runs import assert_nothing_left, cloud, wait_until
from tests.conftest import PROGRAMS

PREEMPTIONS = int(os.environ.get("HOLDFAST_TEST_PREEMPTIONS", "3"))
REPOSITORY = Path(__file__).parents[2]
CLIENTS = 4
RETRY_AFTER_SECONDS = 0.5
"""A process that is killed closes its connections before the socket that it listens on, which takes a retry at once."""
PATIENCE_SECONDS = 240.0
KILLS = 2
"""Without notice."""

pytestmark = pytest.mark.skipif(not shutil.which("haproxy"), reason="no haproxy on the path: apt-get install haproxy")


OWN_HAPROXY = """
global
    stats socket {socket} mode 600 level admin
defaults
    mode http
    timeout connect 2s
    timeout client 1m
    timeout server 1m
frontend in
    bind {listen}
    default_backend models
backend models
    balance leastconn
    option httpchk GET /healthz
"""


@contextmanager
def haproxy_of_somebody() -> Iterator[tuple[str, str]]:
    """One that a person runs: the socket of its runtime API, and where it listens. Its backend is `models`."""
    with tempfile.TemporaryDirectory(prefix="haproxy-", dir="/tmp") as short:  # a socket's path has few characters
        socket, listen = f"{short}/api", f"127.0.0.1:{free_port()}"
        configuration = Path(short) / "haproxy.cfg"
        configuration.write_text(OWN_HAPROXY.format(socket=socket, listen=listen))
        process = subprocess.Popen(["haproxy", "-db", "-f", str(configuration)])
        try:
            wait_until(lambda: Path(socket).exists() or process.poll() is not None, PATIENCE_SECONDS)
            yield socket, listen
            assert process.poll() is None, "it is not ours to end"
        finally:
            process.terminate()
            process.wait()


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


def taken_when_told(count: int, notice: bool, seconds: float = 6.0) -> list[Fate]:
    """Fates that begin when the machine's console says so: see `take`."""
    return [Fate(at_step=1, notice=notice, notice_seconds=seconds)] * count


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

    def next_to_go(self, taken: Sequence[str]) -> str:
        """One of a service that is whole. Spot: after some that were soon gone, others are bought on demand."""
        whole = self.wait_until_whole(but=set(taken))
        return next(one for one in whole if self.run.state.members[one].pool.provisioning_model == "spot")


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
    """Clients that send one request after another, each over a connection that is kept, and retry a failed one once,
    a moment later.
    """

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
                time.sleep(RETRY_AFTER_SECONDS)
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
                victim = served.next_to_go(taken)
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


def test_without_notice_only_what_the_machine_worked_on_fails_and_one_retry_is_enough(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, taken_when_told(KILLS + 4, notice=False))
    taken: list[str] = []
    told_at: dict[str, datetime] = {}
    with serving(serve_job(folder), driver, store) as served:
        served.wait_until_whole()
        with Load(served.url, seconds=0.3) as load:
            for _ in range(KILLS):
                victim = served.next_to_go(taken)
                before = load.answers[victim]
                served.wait_for(lambda victim=victim, before=before: load.answers[victim] > before)
                told_at[victim] = datetime.now(UTC)
                take(folder, victim)
                taken.append(victim)
            served.wait_until_whole(but=set(taken))
    gone = {machine.id: machine.terminated_at for machine in driver.machines({})}
    print(f"{KILLS} without notice: {load.answers.total()} answers, {len(load.failures)} failed and were retried")
    assert 0 < len(load.failures) <= KILLS * CLIENTS
    assert all(failure.retried for failure in load.failures), load.failures
    for failure in load.failures:  # it was on its way when a machine went
        assert any(failure.begun_at <= gone[machine] and failure.ended_at >= told_at[machine] for machine in taken), (
            failure
        )
    assert Counter(one["outcome"] for one in served.summary["members"])["preempted"] == KILLS
    assert_bill_adds_up(served.summary, driver)


def test_a_request_in_flight_at_the_notice_is_finished_before_the_server_is_stopped(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [Fate(at_step=1, notice_seconds=200.0)] * 4)
    with serving(serve_job(folder, replicas=1, drain_seconds=150), driver, store) as served:
        [victim] = served.wait_until_whole()
        answers: list[bytes] = []

        def ask_for_long() -> None:
            connection = http.client.HTTPConnection(served.url, timeout=180)
            connection.request("GET", "/?until=done")
            answers.append(connection.getresponse().read())

        thread = threading.Thread(target=ask_for_long)
        thread.start()
        served.wait_for(lambda: served.run.balancer.standings()[victim].in_flight == 1)
        told_at = datetime.now(UTC)
        take(folder, victim)
        served.wait_for(lambda: served.registered - {victim})  # the replacement serves
        assert not answers
        (folder / "orders-served/done").touch()
        thread.join()
        assert answers == [victim.encode()]
        served.wait_for(lambda: served.run.state.members[victim].outcome)
        ended = served.run.state.members[victim]
        assert ended.outcome == "preempted" and ended.terminated_at
        haproxy = next(one for one in own_haproxies() if one.store_url == store.url)
        os.kill(json.loads(haproxy.record.read_text())["process"]["pid"], signal.SIGKILL)
        with Load(served.url) as load:  # it is started again, and told of the replicas anew
            served.wait_for(lambda: load.answers.total())
        # With its last request done there was nothing to wait for: neither for the drain's end nor for the notice's.
        assert ended.terminated_at - told_at < timedelta(seconds=150)


def test_at_a_rebalance_recommendation_the_replacement_comes_first_then_the_old_one_retires(
    folder: Path, store: DirectoryStore
) -> None:
    fate = Fate(after_seconds=3600, rebalance_seconds_before=3595, notice_seconds=30)
    driver = cloud(folder, [fate])
    with serving(serve_job(folder, replicas=1, max_machines=2), driver, store) as served:
        served.wait_for(lambda: served.registered)
        first = next(iter(served.run.state.members))
        with Load(served.url) as load:
            served.wait_for(lambda: served.run.state.members[first].outcome)
            served.wait_until_whole(but={first})
    assert load.failures == [] and set(load.answers) == set(served.run.state.members)
    members = served.summary["members"]
    assert [one["outcome"] for one in members] == ["moved", "over-budget"]
    assert served.summary["retired"] == 1 and served.summary["seconds_without_a_replica"] == 0
    [old], [new] = (served.run.state.services[one["machine"]] for one in members)
    assert new.since < old.until and old.why == "retired"
    assert_bill_adds_up(served.summary, driver)


def test_a_server_that_is_ill_gets_no_requests_and_one_that_ends_is_replaced(
    folder: Path, store: DirectoryStore
) -> None:
    """Behind an haproxy of the user's own."""
    driver = cloud(folder, [])
    with (
        haproxy_of_somebody() as (socket, listen),
        serving(serve_job(folder, load_balancer=Haproxy(socket=socket, backend="models")), driver, store) as served,
    ):
        ill, other = served.wait_until_whole()
        with Load(listen) as load:
            served.wait_for(lambda: load.answers[ill] and load.answers[other])
        assert load.failures == []
        orders = folder / "orders-served"
        (orders / f"{ill}.ill").touch()
        served.wait_for(lambda: served.registered == {other})
        (orders / f"{ill}.ill").unlink()
        served.wait_for(lambda: served.registered == {ill, other})
        (orders / f"{other}.exit").touch()
        whole = served.wait_until_whole(but={other})
        assert ill in whole
        assert served.run.state.members[other].outcome == "lost"
        assert "ended by itself with status 3" in served.run.state.members[other].detail
    assert served.summary["state"] == "finished"
    assert_bill_adds_up(served.summary, driver)


def test_a_server_that_never_comes_up_ends_the_run_with_its_last_lines(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    job = serve_job(folder, args=["{port}", "0.2", "--broken"], max_program_failures=1)
    with serving(job, driver, store, ProgramFailedError) as served:
        wait_until(lambda: served.error, PATIENCE_SECONDS)
    assert "this server never comes up" in str(served.error)
    assert "ended before it was healthy" in str(served.error)
    assert_nothing_left(driver)


def watcher(job: ServeJob, driver: LocalDriver, store: DirectoryStore) -> ServeRun:
    """To read the journal with; it is never entered."""
    return ServeRun(job, driver, store, None, job.name, open_balancer(job, driver, job.name, store.url))


def orchestrator(folder: Path, api: str, job: ServeJob, account: str) -> subprocess.Popen[str]:
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-m", "flows", "serve", "job.yaml", "--run-id", job.name, "--account", account],
        cwd=folder,
        env={**os.environ, "PREFECT_API_URL": api, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_replicas_serve_on_without_an_orchestrator_and_its_successor_takes_them_up(
    folder: Path, store: DirectoryStore, prefect_api: str
) -> None:
    market = ScriptedMarket(spot=taken_when_told(6, notice=True))
    account = LocalAccount(root=folder / "cloud", market=market)
    account.save("serving", overwrite=True)
    driver = account.driver()
    job = serve_job(folder)
    first = orchestrator(folder, prefect_api, job, "serving")
    watched = watcher(job, driver, store)
    wait_until(lambda: first.poll() is not None or len(watched.read().registered) == 2, PATIENCE_SECONDS)
    victim, other = sorted(watched.state.registered)
    with Load(job.load_balancer.listen) as load:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
        # Nobody supervises: haproxy itself sees that the replica answers 503, and takes it out.
        take(folder, victim)
        wait_until(lambda: watched.balancer.standings()[victim].state == "down", PATIENCE_SECONDS)
        before = load.answers[other]
        wait_until(lambda: load.answers[other] > before + 10, PATIENCE_SECONDS)
        successor = serving(job, driver, store)
        served = successor.__enter__()
        whole = served.wait_until_whole(but={victim})
    successor.__exit__(None, None, None)  # after the clients: it ends what they ask
    assert other in whole and load.failures == []
    assert served.summary["orchestrator_recoveries"] == 1
    assert Counter(one["outcome"] for one in served.summary["members"]) == {"preempted": 1, "over-budget": 2}
    assert_bill_adds_up(served.summary, driver)
