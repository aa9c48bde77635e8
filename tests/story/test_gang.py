"""Training on many machines at once, of which some are taken. Every machine is a real process group, every rank torchrun's."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prefect import flow

from blocks.accounts import LocalAccount
from flows.__main__ import main
from flows.fleet import carry_out_fleet
from holdfast.checkpoint.reader import read_metrics
from holdfast.drivers.local import LocalDriver
from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.drivers.protocol import FleetRequest, Machine
from holdfast.errors import CapacityError, ProgramFailedError
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.model import GangJob, Resources
from holdfast.storage import DirectoryStore
from holdfast.supervision.fleet_opening import open_fleet_run
from tests.chaos.runs import cloud, outcomes, summary_of, tiny_job, wait_until
from tests.conftest import PROGRAMS
from tests.story.test_fleet import assert_adds_up, orchestrator

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


def test_an_attached_gang_goes_on_with_two_of_three_and_learns_what_one_machine_would_have_learnt(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [Fate(), Fate(), Fate(at_step=25, notice=False)], clock_speed=2.0)
    launch_fleet = driver.launch_fleet

    def scarce(request: FleetRequest) -> Sequence[Machine]:
        """No replacement is to be had until two have trained alone."""
        if request.machines < 3 and 2 not in ranks_of_steps(store):
            raise CapacityError("no capacity yet")
        return launch_fleet(request)

    driver.launch_fleet = scarce  # type: ignore[method-assign]
    budget = Budget(name="team", max_usd=5, max_machines=3)
    summary = carry(gang_job(folder, steps=50, script="ddp.py"), driver, store, budget)
    assert summary["state"] == "finished"
    assert Counter(member["outcome"] for member in summary["members"]) == {"finished": 3, "preempted": 1}
    assert [len(one["members"]) for one in summary["formations"]] == [3, 2, 3]
    # The kill costs what was not durable; the replacement is taken in at a commit, and costs nothing.
    assert [one["lost_steps"] for one in summary["formations"][1:]] == [0, 0]
    assert 1 <= summary["lost_steps"] <= 20

    metrics = read_metrics(store, "together")
    assert sorted(metrics) == list(range(1, summary["steps_total"] + 1))
    assert ranks_of_steps(store)[3] == 50 and ranks_of_steps(store).keys() == {2, 3}
    alone = losses_of_one(len(metrics))
    assert max(abs(metrics[step]["loss"] - loss) / loss for step, loss in enumerate(alone, 1)) < 1e-3
    standing = BudgetLedger(store, budget).standing()
    assert standing.reserved_usd == {} and standing.spent_usd == summary["usd_total"]
    assert_adds_up(summary, driver)


def test_a_notice_on_one_machine_makes_all_commit_and_nothing_is_trained_again(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [Fate(at_step=15)])
    summary = carry(gang_job(folder, steps=40, world=2, machines=2), driver, store)
    assert Counter(member["outcome"] for member in summary["members"]) == {"finished": 2, "preempted": 1}
    first, second = summary["formations"]
    assert first["lost_steps"] == 0 and second["first_step"] == first["last_step"] + 1 > 15
    assert summary["lost_steps"] == 0 and kept(folder)["ranks"] == [2] * 40
    assert_adds_up(summary, driver)


def test_a_program_that_fails_while_all_are_there_ends_the_run_with_its_last_lines(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [])
    job = gang_job(folder, steps=40, machines=2, env={"KEPT": str(folder / "kept"), "FAIL": "yes"})
    with pytest.raises(ProgramFailedError, match=r"formation 1(?s:.*)this rank fails"):
        carry(job, driver, store)
    summary = json.loads((folder / ".holdfast/runs/together/summary.json").read_text())
    assert summary["state"] == "failed" and len(summary["formations"]) == 1
    assert_adds_up(summary, driver)


def test_a_killed_orchestrator_s_successor_goes_on_with_the_same_formation(
    folder: Path, store: DirectoryStore, prefect_api: str
) -> None:
    account = LocalAccount(root=folder / "cloud", market=ScriptedMarket())
    account.save("orphaned-gang", overwrite=True)
    job = gang_job(folder, steps=60, world=2, machines=2)
    first = orchestrator(folder, prefect_api, job, "orphaned-gang", "gang")
    wait_until(lambda: list((folder / "kept").glob("*.json")))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    summary = carry(job, account.driver(), store)
    assert summary["orchestrator_recoveries"] == 1 and len(summary["formations"]) == 1
    assert Counter(member["outcome"] for member in summary["members"]) == {"finished": 2}
    assert kept(folder)["ranks"] == [2] * 60
    assert_adds_up(summary, account.driver())


def test_too_few_machines_that_get_no_company_are_given_up_for_another_region(
    folder: Path, store: DirectoryStore
) -> None:
    # Both pools of the region refuse the second machine, and from then on everything.
    driver = cloud(folder, [Fate(), Fate(refuse=True), Fate(refuse=True)], clock_speed=60.0)
    launch_fleet = driver.launch_fleet
    full: set[str] = set()

    def crowded(request: FleetRequest) -> Sequence[Machine]:
        if request.pools[0].region in full:
            raise CapacityError("no capacity in this region any more")
        full.add(request.pools[0].region)
        return launch_fleet(request)

    driver.launch_fleet = crowded  # type: ignore[method-assign]
    patient = {"lease_seconds": 7200, "notice_poll_seconds": 60, "max_run_hours": 100}
    summary = carry(gang_job(folder, 10, 2, machines=2, **patient), driver, store)
    assert Counter(member["outcome"] for member in summary["members"]) == {"finished": 2, "moved": 1}
    assert [len(one["members"]) for one in summary["formations"]] == [2]
    moved, *others = sorted(summary["members"], key=lambda member: member["outcome"] != "moved")
    assert {member["region"] for member in others} != {moved["region"]}
    assert_adds_up(summary, driver)


def test_one_machine_s_ranks_are_torchrun_s_too_and_go_on_after_a_notice(folder: Path, store: DirectoryStore) -> None:
    job = tiny_job(folder, "together", script="ddp.py", args=["150", "2", "0.1"], processes_per_machine=2)
    summary = summary_of(folder, job, [Fate(at_step=15)], store, clock_speed=4.0)
    assert [outcome for _, outcome in outcomes(summary)] == ["preempted", "finished"]
    assert summary["lost_steps"] == 0 and ranks_of_steps(store) == {2: 150}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_machines": 4}, ["min_machines is 4", "3 machines"]),
        ({"script": "", "command": ["bash"]}, ["torchrun", "script or a module"]),
        ({"processes_per_machine": -1}, ["processes_per_machine", "got -1"]),
        ({"min_machines": None, "machines": None}, ["TrainingJob", "machines"]),
        ({"script": "rank.py"}, ["did you mean 'ranks.py'"]),
    ],
)
def test_what_can_never_form_is_refused_before_anything_is_launched(
    fields: dict[str, Any], words: list[str], folder: Path, prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"name": "bad", "script": "ranks.py", "code": str(PROGRAMS), "machines": 3, "min_machines": 2}
    job = {name: value for name, value in {**known, **fields}.items() if value is not None}
    (folder / "gang.yaml").write_text(yaml.safe_dump(job))
    assert main(["gang", "gang.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("refused: ") and all(word in said for word in words), said
    assert not list(folder.glob(".holdfast/clouds/*/launches/*")) and not list(folder.glob(".holdfast/runs/*"))


def ranks_of_steps(store: DirectoryStore) -> Counter[float]:
    """How many steps were trained by how many ranks."""
    return Counter(step["ranks"] for step in read_metrics(store, "together").values())


def losses_of_one(steps: int) -> list[float]:
    """What ddp.py computes on one rank that nobody interrupts."""
    spec = spec_from_file_location("ddp", PROGRAMS / "ddp.py")
    assert spec and spec.loader
    ddp = module_from_spec(spec)
    spec.loader.exec_module(ddp)
    model = ddp.new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(1, steps + 1):
        loss = ddp.loss_of(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
