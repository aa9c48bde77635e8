"""A gang's story on AWS and on GCP: each machine learns its own address, and all commit to one run in a bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.checkpoint.reader import read_metrics
from holdfast.drivers.local.config import Fate
from holdfast.model import Resources
from holdfast.supervision.fleet_opening import open_fleet_run
from tests.emulated.runs import ACCOUNTS, SMALL, Account, Open
from tests.emulated.test_fleet_stories import assert_adds_up, carry
from tests.story.test_gang import gang_job


@pytest.fixture(params=ACCOUNTS)
def opened(request: pytest.FixtureRequest, folder: Path, prefect_api: str) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda *fates, **more: stack.enter_context(ACCOUNTS[request.param](folder, fates, **more))


def test_a_gang_s_machine_is_taken_replaced_and_the_run_finishes(opened: Open, folder: Path) -> None:
    account: Account = opened(Fate(at_step=15, notice=False))
    small = Resources(instance_types=[SMALL[account.name]])
    job = gang_job(folder, 40, 2, machines=2, min_machines=1, spot_share=0.5, script="ddp.py", resources=small)
    store = account.open_store()
    summary = carry(open_fleet_run(job, account.driver(), store, None, "together"))
    models = Counter((member["provisioning_model"], member["outcome"]) for member in summary["members"])
    assert models == {("spot", "preempted"): 1, ("spot", "finished"): 1, ("on-demand", "finished"): 1}
    stayed = [one["machine"] for one in summary["members"] if one["provisioning_model"] == "on-demand"]
    assert [one["host"] for one in summary["formations"]] == stayed * len(summary["formations"])
    metrics = read_metrics(store, "together")
    assert sorted(metrics) == list(range(1, summary["steps_total"] + 1))
    assert Counter(step["ranks"] for step in metrics.values())[2] == 40
    assert_adds_up(summary, account)
