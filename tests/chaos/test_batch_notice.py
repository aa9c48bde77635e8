"""A worker on a machine that is taken away finishes what fits, and leaves the rest to others at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from holdfast.batch.audit import audit, finish
from holdfast.batch.plan import batches
from holdfast.batch.worker import Worker
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.checkpoint.reporting import Surroundings
from holdfast.runtime.contract import EXIT_PREEMPTED_COMMITTED, EXIT_PREEMPTED_UNCOMMITTED
from tests.unit.batch_runs import DEADLINE_SECONDS, PREFIX, BatchRun, during, wait_for, write_jsonl


def a_worker(run: BatchRun, folder: Path) -> Worker:
    around = Surroundings(
        store_url=run.store.url,
        run_id="batch",
        attempt=0,
        policy=CheckpointPolicy(),
        telemetry=folder / "telemetry.jsonl",
        notice=folder / "notice.json",
        console=None,
    )
    return Worker(run.store, run.settings, run.queue, "worker", around)


def a_run(folder: Path, seconds: list[float]) -> BatchRun:
    records = [{"id": n, "seconds": one, "began": str(folder / f"began-{n}")} for n, one in enumerate(seconds)]
    return BatchRun(folder, "slow", batch_size=1).plan(write_jsonl(folder / "in.jsonl", records))


def notice(folder: Path, kind: str, in_seconds: float) -> None:
    at = datetime.now(UTC) + timedelta(seconds=in_seconds)
    staged = folder / "notice.staged"
    staged.write_text(json.dumps({"kind": kind, "reclaim_at": at.isoformat()}))
    staged.replace(folder / "notice.json")


def keep_back(run: BatchRun) -> Callable[[], None]:
    """All batches but the first, till the returned function puts them back: the worker fetches side by side, so in no order."""
    queue = run.queue()
    first, *rest = queue.lease(100)
    queue.hand_back([first])

    def put() -> None:
        with contextlib.closing(run.queue()) as again:
            again.put([lease.body for lease in rest])

    queue.acknowledge(rest)
    queue.close()
    return put


def wait_for_results(run: BatchRun, count: int) -> None:
    give_up_at = time.monotonic() + DEADLINE_SECONDS
    while len(run.store.list(f"{PREFIX}/results/")) < count:
        assert time.monotonic() < give_up_at, f"no {count} results appear"
        time.sleep(0.01)


def test_the_batch_in_work_is_finished_when_it_fits_and_the_rest_is_handed_back(tmp_path):
    run = a_run(tmp_path, [0.1, 3.0])
    put_the_rest = keep_back(run)
    worker = a_worker(run, tmp_path)

    def act() -> None:
        wait_for_results(run, 1)  # so its time is known
        put_the_rest()
        wait_for(tmp_path / "began-1")
        with contextlib.closing(run.queue()) as queue:
            queue.put([next(batches(run.store, PREFIX)).body] * 3)  # waiting ones
        notice(tmp_path, "preemption", 60.0)

    assert during(worker, act) == EXIT_PREEMPTED_COMMITTED
    assert audit(run.store, PREFIX).records_out == 2
    assert run.waiting() == 3
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "telemetry.jsonl").read_text().splitlines()]
    assert kinds[0] == "attached" and "preempting" in kinds and "finished" not in kinds
    assert run.work().whole


def test_a_batch_that_takes_longer_than_was_measured_is_handed_back_when_the_time_is_up(tmp_path):
    run = a_run(tmp_path, [0.1, 600.0])
    put_the_rest = keep_back(run)
    worker = a_worker(run, tmp_path)

    def act() -> None:
        wait_for_results(run, 1)
        put_the_rest()
        wait_for(tmp_path / "began-1")
        notice(tmp_path, "preemption", 5.0)

    assert during(worker, act) == EXIT_PREEMPTED_UNCOMMITTED
    assert audit(run.store, PREFIX).records_out == 1
    assert run.waiting() == 1


def test_a_batch_whose_time_nobody_knows_is_handed_back_at_once(tmp_path):
    run = a_run(tmp_path, [600.0])
    worker = a_worker(run, tmp_path)

    def act() -> None:
        wait_for(tmp_path / "began-0")
        notice(tmp_path, "preemption", 3600.0)  # waiting for its end would take as long

    assert during(worker, act) == EXIT_PREEMPTED_UNCOMMITTED
    assert run.waiting() == 1 and audit(run.store, PREFIX).records_out == 0


def test_a_recommendation_changes_nothing(tmp_path):
    run = a_run(tmp_path, [0.5, 0.5])
    worker = a_worker(run, tmp_path)

    def act() -> None:
        wait_for(tmp_path / "began-0")
        notice(tmp_path, "rebalance", 60.0)

    assert during(worker, act) == 0
    assert finish(run.store, PREFIX).records_out == 2


def test_a_machine_that_is_taken_while_its_model_starts_is_no_failure_of_the_function(tmp_path: Path) -> None:
    run = a_run(tmp_path, [0.1])
    worker = a_worker(run, tmp_path)

    def signal_the_group() -> None:
        give_up_at = time.monotonic() + DEADLINE_SECONDS
        while not hasattr(worker, "_model"):
            assert time.monotonic() < give_up_at
            time.sleep(0.001)
        worker.hear_sigterm()
        os.kill(worker._model.pid, signal.SIGTERM)

    assert during(worker, signal_the_group) == EXIT_PREEMPTED_COMMITTED
    assert run.waiting() == 1
