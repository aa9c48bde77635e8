"""A fleet's story on AWS and on GCP, through their own clients, over HTTP, on machines that really run."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows.fleet import carry_out_fleet
from holdfast.drivers.local.config import Fate
from holdfast.ledger.billing import add_usd
from holdfast.ledger.fleet_summary import summarise_fleet
from holdfast.model import FleetJob, Resources
from holdfast.supervision.fleet_opening import open_fleet_run
from holdfast.supervision.fleet_run import FleetRun
from tests.chaos.runs import wait_until
from tests.emulated.runs import ACCOUNTS, SMALL, Account, Open, assert_nothing_left
from tests.story.test_fleet import fleet_job, notes


@pytest.fixture(params=ACCOUNTS)
def opened(request: pytest.FixtureRequest, folder: Path, prefect_api: str) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda *fates, **more: stack.enter_context(ACCOUNTS[request.param](folder, fates, **more))


def small_fleet(account: Account, folder: Path, seconds: float, **changes: Any) -> FleetJob:
    return fleet_job(folder, seconds=seconds, resources=Resources(instance_types=[SMALL[account.name]]), **changes)


def opened_run(job: FleetJob, account: Account) -> FleetRun:
    return open_fleet_run(job, account.driver(), account.open_store(), None, "crowd")


def carry(run: FleetRun) -> dict[str, Any]:
    @flow(name="test-fleet")
    def story() -> dict[str, Any]:
        return carry_out_fleet(run)

    return story()


def assert_adds_up(summary: dict[str, Any], account: Account) -> None:
    assert len({member["machine"] for member in summary["members"]}) == len(account.host.ids())
    assert summary["usd_total"] == add_usd(member["usd"] for member in summary["members"]) > 0
    assert_nothing_left(account)


def test_a_fleet_replaces_what_is_taken_and_finishes(opened: Open, folder: Path) -> None:
    account: Account = opened(Fate(after_seconds=6, notice=False))
    job = small_fleet(account, folder, seconds=10, machines=3, spot_share=0.67)
    summary = carry(opened_run(job, account))
    models = Counter((member["provisioning_model"], member["outcome"]) for member in summary["members"])
    assert models == {("spot", "preempted"): 1, ("spot", "finished"): 2, ("on-demand", "finished"): 1}
    # Each machine has found out by itself who it is, as the cloud's API knows it.
    finished = [member["machine"] for member in summary["members"] if member["outcome"] == "finished"]
    assert notes(folder, "done") == sorted(finished)
    assert_adds_up(summary, account)


def test_a_fleet_finishes_though_api_calls_fail_at_random(opened: Open, folder: Path) -> None:
    account: Account = opened(Fate(after_seconds=5, notice=False), probability=0.05, seed=11)
    job = small_fleet(account, folder, seconds=8, machines=3, spot_share=0.67)
    summary = carry(opened_run(job, account))
    assert summary["state"] == "finished" and summary["finished"] == 3
    assert_adds_up(summary, account)


def test_a_maintained_fleet_is_kept_whole_by_the_cloud_and_ends_with_its_flow(opened: Open, folder: Path) -> None:
    account: Account = opened(Fate(after_seconds=5, notice=False))
    job = small_fleet(account, folder, seconds=600, machines=2, spot_share=0.5, kind="maintained", max_run_hours=9)
    run = opened_run(job, account)
    ended = threading.Event()

    def story() -> None:
        with run:
            run.reserve(run.decide())  # type: ignore[arg-type]
            run.launch()
            for _ in run.supervise():
                if ended.is_set():
                    break
            run.end("cancelled", "the test is over")

    thread = threading.Thread(target=story)
    thread.start()
    try:
        wait_until(lambda: run.state.ended("preempted") and len(run.state.living) == 2, 90)
        wait_until(lambda: len(notes(folder, "begun")) == 3, 60)
    finally:
        ended.set()
        thread.join(120)
    assert not thread.is_alive()
    summary = summarise_fleet(run.state)
    assert summary["state"] == "cancelled" and summary["machines_launched"] == 3
    assert Counter(member["outcome"] for member in summary["members"]) == {"preempted": 1, "cancelled": 2}
    assert list(account.driver().fleets({})) == []
    assert_adds_up(summary, account)
