"""What networks, clouds and kills do to a run on AWS and GCP, and that nothing is lost, leaked or charged twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdfast.drivers.local.config import Fate
from holdfast.ledger.journal import Journal
from holdfast.runtime.contract import journal_prefix
from holdfast.storage import ObjectStore
from tests.chaos.runs import assert_lost_steps_were_trained_again, carry, outcomes, wait_until
from tests.emulated.runs import (
    ACCOUNTS,
    Account,
    Open,
    assert_nothing_left,
    assert_totals_are_right,
    small_job,
)
from tests.emulated.wire import Request

REPOSITORY = Path(__file__).parents[2]
LAUNCHES = ("RunInstances", "instances.insert")


@pytest.fixture(params=ACCOUNTS)
def opened(request: pytest.FixtureRequest, folder: Path, prefect_api: str) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda *fates, **more: stack.enter_context(ACCOUNTS[request.param](folder, fates, **more))


def launch(request: Request) -> bool:
    return request.action in LAUNCHES


def assert_charged_once(store: ObjectStore, run_id: str) -> None:
    ended = [e.fields["attempt"] for e in Journal(store, journal_prefix(run_id)).read() if e.kind == "ended"]
    assert ended == sorted(set(ended))


def test_a_launch_whose_answer_is_lost_has_bought_one_machine(opened: Open, folder: Path) -> None:
    account: Account = opened(probability=0.0)
    lost = account.wires[0].inject("lost", when=launch)
    _, summary = carry(small_job(account, folder, steps=20), account.driver(), account.open_store(), "lost-answer")
    assert lost.hits == 1
    assert outcomes(summary) == [("spot", "finished")]
    assert len(account.host.ids()) == 1
    assert_totals_are_right(summary, account)
    assert_nothing_left(account)


def test_an_orchestrator_killed_between_launch_and_journal_leaves_one_machine_for_the_attempt(
    opened: Open, folder: Path, prefect_api: str
) -> None:
    account: Account = opened(probability=0.0)
    account.blocks()
    store = account.open_store()
    job = small_job(account, folder, steps=300)
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    account.wires[0].inject("slow", when=launch, seconds=60)  # the machine is there; the orchestrator does not know yet

    first = start_orchestrator(folder, prefect_api, account)
    wait_until(lambda: account.host.ids() or first.poll() is not None)
    assert first.poll() is None, first.communicate()
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert [entry.kind for entry in Journal(store, journal_prefix("killed")).read()] == ["run-started", "reserved"]

    second = start_orchestrator(folder, prefect_api, account)
    output, _ = second.communicate(timeout=180)
    assert second.returncode == 0, output
    summary = json.loads(store.get("runs/killed/summary.json"))
    assert outcomes(summary) == [("spot", "finished")] and summary["orchestrator_recoveries"] == 1
    assert len(account.host.ids()) == 1
    assert_totals_are_right(summary, account)
    assert_nothing_left(account)


def start_orchestrator(folder: Path, api: str, account: Account) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "flows", "train", "job.yaml", "--run-id", "killed"),
            *("--account", account.name, "--store", "bucket"),
        ],
        cwd=folder,
        env={**os.environ, "PREFECT_API_URL": api, "PYTHONPATH": str(REPOSITORY), **account.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_twentieth_of_all_calls_fails_and_the_run_finishes(seed: int, folder: Path, prefect_api: str) -> None:
    """Throttled, answered with HTTP 500, reset before or after they took effect: the cloud's API and the store alike."""
    open_account = ACCOUNTS["aws" if seed % 2 else "gcp"]
    with open_account(folder, [Fate(at_step=12, notice=False)], probability=0.05, seed=100 * seed) as account:
        driver, store = account.driver(), account.open_store()
        _, summary = carry(small_job(account, folder, steps=40), driver, store, "noisy")
        for wire in account.wires:
            wire.heal()
        assert sum(request.fault != "" for wire in account.wires for request in wire.requests) > 0
        assert outcomes(summary) == [("spot", "preempted"), ("spot", "finished")]
        assert_lost_steps_were_trained_again(summary, folder, account.name)
        assert_charged_once(store, "noisy")
        assert_totals_are_right(summary, account)
        assert_nothing_left(account)


def test_credentials_that_end_during_a_run_are_waited_for(
    opened: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account: Account = opened()
    store = account.open_store()

    def meddle() -> None:
        wait_until(lambda: any("holdfast: step 20 " in account.host.console(one) for one in account.host.ids()))
        account.expire()
        wait_until(lambda: waited())
        account.renew()

    def waited() -> list[Any]:
        entries = Journal(store, journal_prefix("expired")).read()
        return [entry for entry in entries if "waited for credentials" in str(entry.fields)]

    thread = threading.Thread(target=meddle)
    thread.start()
    _, summary = carry(small_job(account, folder, steps=150), account.driver(), account.open_store(), "expired")
    thread.join()
    assert outcomes(summary) == [("spot", "finished")]
    assert any("waited for credentials" in warning and "renew" in warning for warning in summary["warnings"])
    assert_totals_are_right(summary, account)
    assert_nothing_left(account)


def test_a_store_that_throttles_slows_the_upload_and_never_fails_the_training(opened: Open, folder: Path) -> None:
    account: Account = opened(probability=0.0)
    store_wire = account.wires[-1]
    slowed = store_wire.inject(
        "throttle", when=lambda request: "/checkpoints/" in request.key and request.method == "PUT", count=25
    )
    _, summary = carry(small_job(account, folder), account.driver(), account.open_store(), "throttled")
    assert slowed.hits == 25
    assert outcomes(summary) == [("spot", "finished")]
    assert summary["attempts"][0]["last_committed_step"] == 100
    assert_nothing_left(account)
