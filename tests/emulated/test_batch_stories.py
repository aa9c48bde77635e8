"""Batch inference on AWS and on GCP, through their own clients, over HTTP: inputs, queue and results in a bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows.batch_inference import carry_out_batch
from holdfast.drivers.local.config import Fate
from holdfast.errors import ConfigError
from holdfast.ledger.billing import add_usd
from holdfast.model import BatchJob, Resources
from holdfast.supervision.batch_opening import open_batch_run
from tests.emulated.runs import ACCOUNTS, BUCKET, SMALL, Account, Open, assert_nothing_left
from tests.story.test_batch import assert_whole, batch_job, results

SCHEMES = {"aws": "s3", "gcp": "gs"}


@pytest.fixture(params=ACCOUNTS)
def opened(request: pytest.FixtureRequest, folder: Path, prefect_api: str) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda *fates, **more: stack.enter_context(ACCOUNTS[request.param](folder, fates, **more))


def carry(job: BatchJob, account: Account) -> dict[str, Any]:
    run = open_batch_run(job, account.driver(), account.open_store(), None, "double")

    @flow(name="test-batch")
    def story() -> dict[str, Any]:
        return carry_out_batch(run)

    return story()


def test_records_in_a_bucket_are_worked_on_by_machines_that_share_nothing_else(opened: Open, folder: Path) -> None:
    account: Account = opened(Fate(after_seconds=5, notice=False))  # the work alone takes some five seconds
    store = account.open_store()
    lines = [json.dumps({"n": n}) + "\n" for n in range(200)]
    for number in range(4):
        store.put(f"documents/{number}.jsonl", "".join(lines[50 * number : 50 * number + 50]).encode())
    job = batch_job(
        folder,
        inputs=[f"{SCHEMES[account.name]}://{BUCKET}/team/documents/*.jsonl"],
        resources=Resources(instance_types=[SMALL[account.name]]),
        seconds=0.7,
        machines=3,
    )
    summary = carry(job, account)
    assert_whole(summary, 200)
    assert results(store, "double") == {n: 2 * n for n in range(200)}
    assert summary["interruptions"] == 1 and summary["machines_launched"] >= 3
    assert summary["usd_total"] == add_usd(member["usd"] for member in summary["members"]) > 0
    assert_nothing_left(account)


def test_what_machines_of_a_cloud_can_not_reach_is_refused_before_they_are_bought(opened: Open, folder: Path) -> None:
    account: Account = opened()
    job = batch_job(folder, queue=f"sqlite://{folder}/queue.sqlite")
    with pytest.raises(ConfigError) as refused:
        open_batch_run(job, account.driver(), account.open_store(), None, "double")
    message = str(refused.value)
    assert f"inputs: {job.inputs[0]!r} is on this computer" in message and "name a bucket" in message
    assert "queue: sqlite:" in message and "leave it empty" in message
    nothing = batch_job(folder, inputs=[f"{SCHEMES[account.name]}://{BUCKET}/team/nothing/*.jsonl"])
    nothing = nothing.model_copy(update={"resources": Resources(instance_types=[SMALL[account.name]])})
    with pytest.raises(ConfigError, match=r"nothing/.* names no file"):
        carry(nothing, account)
    assert account.host.ids() == []
