"""Training on many machines at once, of which some are taken. Every machine is a real process group, every rank torchrun's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from prefect import flow

from flows.fleet import carry_out_fleet
from holdfast.drivers.local import LocalDriver
from holdfast.drivers.local.config import Fate
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.model import GangJob, Resources
from holdfast.storage import DirectoryStore
from holdfast.supervision.fleet_opening import open_fleet_run
from tests.chaos.runs import cloud
from tests.conftest import PROGRAMS
from tests.story.test_fleet import assert_adds_up

SMALL = Resources(instance_types=["c7i.large", "n2-standard-2"])


def gang_job(folder: Path, steps: int, world: int = 3, **changes: Any) -> GangJob:
    fields: dict[str, Any] = {
        "name": "together",
        "script": "ranks.py",
        "args": [str(steps), str(world), "0.1"],
        "code": str(PROGRAMS),
        "env": {"KEPT": str(folder / "kept")},
        "resources": SMALL,
        "machines": 3,
        "min_machines": 2,
        "notice_poll_seconds": 0.1,
        "max_run_hours": 5,
    }
    return GangJob(**{**fields, **changes})


def carry(job: GangJob, driver: LocalDriver, store: DirectoryStore, budget: Budget | None = None) -> dict[str, Any]:
    run = open_fleet_run(job, driver, store, budget, job.name)

    @flow(name="test-gang")
    def story() -> dict[str, Any]:
        return carry_out_fleet(run)

    return story()


def kept(folder: Path) -> dict[str, Any]:
    """The last checkpoint of ranks.py."""
    return json.loads(sorted((folder / "kept").glob("*.json"))[-1].read_text())


def test_a_gang_goes_on_with_two_of_three_until_a_replacement_joins(folder: Path, store: DirectoryStore) -> None:
    # The region's two pools refuse the replacement at first: they are asked again half a minute later.
    fates = [Fate(), Fate(), Fate(at_step=25, notice=False), *[Fate(refuse=True)] * 2]
    driver = cloud(folder, fates)
    budget = Budget(name="team", max_usd=5, max_machines=3)
    summary = carry(gang_job(folder, steps=50), driver, store, budget)
    print(json.dumps(summary["formations"], indent=1))
    assert summary["state"] == "finished"
    assert Counter(member["outcome"] for member in summary["members"]) == {"finished": 3, "preempted": 1}
    assert [len(one["members"]) for one in summary["formations"]] == [3, 2, 3]
    state = kept(folder)
    assert state["step"] == len(state["ranks"]) == summary["steps_total"]
    assert Counter(state["ranks"])[3] == 50 and set(state["ranks"]) == {2, 3}
    standing = BudgetLedger(store, budget).standing()
    assert standing.reserved_usd == {} and standing.spent_usd == summary["usd_total"]
    assert_adds_up(summary, driver)
