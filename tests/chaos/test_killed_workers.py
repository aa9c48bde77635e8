"""Eight workers, killed again and again, and the broker once: no record is lost, none comes twice, the order is kept.

HOLDFAST_TEST_RECORDS and HOLDFAST_TEST_KILLS set the size: 100000 and 40 for what docs/queues.md says is proven.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from holdfast.batch.audit import finish
from holdfast.batch.plan import bodies, make_plan
from holdfast.batch.settings import SETTINGS, WorkerSettings, write_settings
from holdfast.queues import open_queue
from holdfast.runtime import contract
from holdfast.storage import DirectoryStore
from tests.contract.brokers import BROKERS, GROUPED, Broker, broker, started_broker

__all__ = ["broker", "started_broker"]

RECORDS = int(os.environ.get("HOLDFAST_TEST_RECORDS", "2000"))
KILLS = int(os.environ.get("HOLDFAST_TEST_KILLS", "5"))
IS_PROOF = RECORDS >= 50_000
WORKERS = 8
BATCH_SIZE = 100 if IS_PROOF else 20
DEADLINE_SECONDS = 480.0 + RECORDS / 50
PREFIX = "runs/killed"
pytestmark = pytest.mark.timeout(DEADLINE_SECONDS + 120)


@dataclass(slots=True)
class Fleet:
    """Worker processes, each replaced when it was killed."""

    folder: Path
    settings: WorkerSettings
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    killed: set[int] = field(default_factory=set)
    stopped: dict[int, float] = field(default_factory=dict)
    """Until when, on the monotonic clock."""
    started: int = 0

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(self.folder / "store")

    def start(self) -> None:
        self.started += 1
        environment = {
            contract.STORE: self.store.url,
            SETTINGS: f"{PREFIX}/worker.json",
            contract.MEMBER: f"worker-{self.started}",
            "HOLDFAST_TEST_FOLDER": str(self.folder),
        }
        with (self.folder / f"worker-{self.started}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "holdfast.batch.worker"],
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )
        self.running[process.pid] = process

    def victim(self) -> int | None:
        """One that has begun to work."""
        working = {int(path.name) for path in (self.folder / "working").iterdir()}
        candidates = sorted(working & set(self.running) - set(self.stopped))
        return random.choice(candidates) if candidates else None

    def kill_one(self) -> bool:
        if (victim := self.victim()) is None:
            return False
        os.kill(victim, signal.SIGKILL)
        self.running.pop(victim).wait()
        self.killed.add(victim)
        self.start()
        return True

    def stop_one(self, seconds: float) -> bool:
        """As a machine does that swaps: the process stands still and doesn't know it."""
        if (victim := self.victim()) is None:
            return False
        os.kill(victim, signal.SIGSTOP)
        self.stopped[victim] = time.monotonic() + seconds
        return True

    def look(self) -> None:
        for pid in [pid for pid, until in self.stopped.items() if until < time.monotonic()]:
            del self.stopped[pid]
            os.kill(pid, signal.SIGCONT)
        for number, process in enumerate(list(self.running.values()), 1):
            assert process.poll() is None, (
                f"{number} ended with {process.returncode} before the work was done{self.logs()}"
            )

    def logs(self) -> str:
        tails = [path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("worker-*.log"))]
        return "".join(f"\n---- {number}\n{tail}" for number, tail in enumerate(tails, 1) if tail)

    def results(self) -> int:
        folder = self.folder / "store" / PREFIX / "results"
        return sum(name.endswith(".jsonl") for _, _, names in os.walk(folder) for name in names)

    def end(self) -> list[int]:
        for pid, process in self.running.items():
            process.send_signal(signal.SIGCONT if pid in self.stopped else 0)
            process.send_signal(signal.SIGTERM)
        return [process.wait(120) for process in self.running.values()]


@pytest.fixture
def fleet(broker: Broker, tmp_path: Path) -> Iterator[Fleet]:
    settings = WorkerSettings(
        queue=broker.url,
        queue_name=f"killed/{time.time_ns()}",
        prefix=PREFIX,
        function="tests.programs.batch_functions:noted",
        setup="tests.programs.batch_functions:say_that_it_works",
        visibility_seconds=10.0,
        max_deliveries=100,
        idle_seconds=600.0,
    )
    (tmp_path / "working").mkdir()
    fleet = Fleet(tmp_path, settings)
    yield fleet
    for process in fleet.running.values():
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def plan(fleet: Fleet) -> int:
    """The number of batches, all of which wait in the queue."""
    for part in range(4):
        numbers = range(part * RECORDS // 4, (part + 1) * RECORDS // 4)
        lines = [json.dumps({"id": number, "text": f"record {number}"}) for number in numbers]
        (fleet.folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n")
    summary = make_plan(fleet.store, PREFIX, [f"{fleet.folder}/part-*.jsonl"], BATCH_SIZE)
    write_settings(fleet.store, fleet.settings)
    queue = open_queue(fleet.settings.queue, fleet.settings.queue_name, visibility_seconds=10.0, max_deliveries=100)
    queue.put(list(bodies(fleet.store, PREFIX)))
    queue.close()
    assert summary.records == RECORDS
    return summary.batches


def work(fleet: Fleet, broker: Broker, batches: int, stop_seconds: float = 0.0) -> None:
    """Until there is a result for every batch. Kills come at random moments of the work, whatever the machine's speed."""
    moments = sorted(random.uniform(0.02, 0.9) * batches for _ in range(KILLS))
    stops = sorted(random.uniform(0.02, 0.9) * batches for _ in range(KILLS if stop_seconds else 0))
    restart_at = batches * 0.4 if broker.restart else None
    give_up_at = time.monotonic() + DEADLINE_SECONDS
    for _ in range(WORKERS):
        fleet.start()
    while (done := fleet.results()) < batches:
        assert time.monotonic() < give_up_at, f"{done} of {batches} batches{fleet.logs()}"
        fleet.look()
        if moments and done >= moments[0] and fleet.kill_one():
            moments.pop(0)
        if stops and done >= stops[0] and fleet.stop_one(stop_seconds):
            stops.pop(0)
        if broker.restart and restart_at is not None and done >= restart_at:
            broker.restart()
            restart_at = None
        time.sleep(random.uniform(0.0, 0.1))
    while moments and fleet.kill_one():  # those that nobody could be found for
        moments.pop(0)
    assert not moments and restart_at is None


def prove(fleet: Fleet, began: float, batches: int) -> Counter[str]:
    """How often each batch was computed."""
    # One that was still starting doesn't hear the signal yet.
    assert set(fleet.end()) <= {
        contract.EXIT_PREEMPTED_COMMITTED,
        contract.EXIT_PREEMPTED_UNCOMMITTED,
        -signal.SIGTERM,
    }, fleet.logs()
    audited = finish(fleet.store, PREFIX)
    calls = Counter((fleet.folder / "calls").read_text().split())
    print(
        f"records={RECORDS} kills={len(fleet.killed)} seconds={time.monotonic() - began:.0f} missing={audited.missing} "
        f"duplicates={audited.duplicates} out_of_order={audited.out_of_order} batches={batches} "
        f"computed_again={sum(calls.values()) - len(calls)}"
    )
    assert audited.whole and (audited.missing, audited.duplicates, audited.out_of_order) == (0, 0, 0)
    assert (audited.records_in, audited.records_out, audited.records_failed) == (RECORDS, RECORDS, 0)
    manifest = json.loads(fleet.store.get(f"{PREFIX}/manifest.json"))
    rows = [json.loads(line) for part in manifest["parts"] for line in fleet.store.get(part["key"]).splitlines()]
    assert [(row["key"], row["result"]) for row in rows] == [(number, number * 3) for number in range(RECORDS)]
    queue = open_queue(fleet.settings.queue, fleet.settings.queue_name)
    assert queue.dead() == []
    queue.close()
    return calls


def chosen(*names: str) -> pytest.MarkDecorator:
    """These, unless it is the proof that runs."""
    params = [GROUPED[name] for name in (BROKERS if IS_PROOF else names)]
    return pytest.mark.parametrize("started_broker", params, indirect=True)


@chosen("sqlite", "redis", "rabbitmq", "sqs", "folder")
def test_workers_killed_at_random_and_a_broker_restarted_lose_nothing_and_do_nothing_twice(
    fleet: Fleet, broker: Broker
) -> None:
    began, batches = time.monotonic(), plan(fleet)
    work(fleet, broker, batches)
    prove(fleet, began, batches)


@chosen("sqlite", "redis", "folder")
def test_leases_so_short_that_batches_are_done_twice_give_every_result_once(fleet: Fleet, broker: Broker) -> None:
    fleet.settings = dataclasses.replace(fleet.settings, visibility_seconds=1.0)
    began, batches = time.monotonic(), plan(fleet)
    work(fleet, broker, batches, stop_seconds=3.0)
    assert max(prove(fleet, began, batches).values()) > 1
