"""What happens to a fleet when some of its machines are taken away. Every machine here is a real process group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prefect import flow

from blocks.accounts import LocalAccount
from blocks.budget import SpendingBudget
from flows.__main__ import main
from flows.fleet import carry_out_fleet
from holdfast.drivers.local import LocalDriver
from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.drivers.protocol import FleetRequest, Machine
from holdfast.errors import ConfigError, OverBudgetError, ProgramFailedError
from holdfast.ledger.billing import add_usd
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.ledger.fleet_summary import summarise_fleet
from holdfast.ledger.journal import Journal
from holdfast.model import FleetJob, GangJob, Resources
from holdfast.runtime.contract import journal_prefix, lease_key
from holdfast.storage import DirectoryStore
from holdfast.supervision.fleet_opening import open_fleet_run
from holdfast.supervision.reap import reap
from tests.chaos.runs import assert_nothing_left, cloud, wait_until
from tests.conftest import PROGRAMS, command_line

REPOSITORY = Path(__file__).parents[2]
SMALL = Resources(instance_types=["c7i.large", "n2-standard-2"])


def fleet_job(folder: Path, name: str = "crowd", seconds: float = 1.0, **changes: Any) -> FleetJob:
    fields: dict[str, Any] = {
        "name": name,
        "script": "member.py",
        "args": [str(seconds)],
        "code": str(PROGRAMS),
        "env": {"NOTES": str(folder / f"notes-{name}")},
        "resources": SMALL,
        "machines": 5,
        "spot_share": 0.8,
        "notice_poll_seconds": 0.1,
        "max_run_hours": 5,
    }
    return FleetJob(**{**fields, **changes})


def notes(folder: Path, what: str, name: str = "crowd") -> list[str]:
    return sorted(path.stem for path in (folder / f"notes-{name}").glob(f"*.{what}"))


def carry(job: FleetJob, driver: LocalDriver, store: DirectoryStore, budget: Budget | None = None) -> dict[str, Any]:
    run = open_fleet_run(job, driver, store, budget, job.name)

    @flow(name="test-fleet")
    def story() -> dict[str, Any]:
        return carry_out_fleet(run)

    return story()


def outcomes(summary: dict[str, Any]) -> Counter[tuple[str, str]]:
    return Counter((member["provisioning_model"], member["outcome"]) for member in summary["members"])


def assert_adds_up(summary: dict[str, Any], driver: LocalDriver) -> None:
    """The total is the sum of the members, and every machine's life is on the bill once."""
    assert_nothing_left(driver)
    lives = {machine.id: machine for machine in driver.machines({})}
    assert sorted(member["machine"] for member in summary["members"]) == sorted(lives)
    for member in summary["members"]:
        machine = lives[member["machine"]]
        seconds = max(60.0, (machine.terminated_at - machine.launched_at).total_seconds())
        assert abs(member["billed_seconds"] - seconds) < 0.01
    assert summary["usd_total"] == add_usd(member["usd"] for member in summary["members"]) > 0


def test_members_that_are_taken_are_replaced_in_the_share_that_was_asked_for(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [Fate(after_seconds=1.5, notice=False), Fate(after_seconds=1.5, notice=False)])
    budget = Budget(name="team", max_usd=2, max_machines=5)
    summary = carry(fleet_job(folder, seconds=3), driver, store, budget)
    assert outcomes(summary) == {("spot", "finished"): 4, ("spot", "preempted"): 2, ("on-demand", "finished"): 1}
    assert summary["state"] == "finished" and summary["interruptions"] == 2
    assert len(notes(folder, "done")) == 5 and len(notes(folder, "begun")) <= 7
    assert_adds_up(summary, driver)
    first, *later = summary["rounds"]
    assert (first["spot"], first["on_demand"], first["launched"]) == (4, 1, 5)
    assert sum(one["spot"] for one in later) == 2 and sum(one["on_demand"] for one in later) == 0
    assert summary["spot_share_of_machines"] == round(6 / 7, 4)
    assert summary["seconds_to_all_launched"] > 0
    assert summary["usd_total"] < summary["usd_on_demand_equivalent"]
    standing = BudgetLedger(store, budget).standing()
    assert standing.reserved_usd == {} and standing.spent_usd == summary["usd_total"]
    launches = [entry for entry in Journal(store, journal_prefix("crowd")).read() if entry.kind == "members-launched"]
    assert len(launches[0].fields["members"]) == 5  # one entry for all of them
    assert json.loads((folder / ".holdfast/runs/crowd/summary.json").read_text()) == summary


def test_a_pool_that_refuses_leads_to_another_region(folder: Path, store: DirectoryStore) -> None:
    # A round of two members asks each of a region's three pools for each: all six are refused.
    driver = cloud(folder, [Fate(refuse=True)] * 6)
    job = fleet_job(folder, seconds=0.2, machines=2, spot_share=1.0)
    summary = carry(job, driver, store)
    first, second = summary["rounds"]
    assert first["refusal"] == "no-capacity" and first["launched"] == 0
    assert second["launched"] == 2 and second["region"] != first["region"]
    assert outcomes(summary) == {("spot", "finished"): 2}
    assert_adds_up(summary, driver)


def test_spot_that_fails_in_three_rounds_in_a_row_is_replaced_by_on_demand(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [Fate(after_seconds=0.3, notice=False)] * 3)
    job = fleet_job(folder, seconds=2, machines=1, spot_share=1.0)
    summary = carry(job, driver, store)
    assert outcomes(summary) == {("spot", "preempted"): 3, ("on-demand", "finished"): 1}
    [reason] = summary["fallbacks"]
    assert reason.startswith("spot was refused or taken in 3 rounds in a row: 1 on-demand machines instead")
    assert_adds_up(summary, driver)


def test_a_prefect_server_that_does_not_answer_holds_up_no_supervision(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    run = open_fleet_run(fleet_job(folder, machines=2), driver, store, None, "crowd")
    [server] = [
        process
        for process in psutil.Process().children(recursive=True)
        if "prefect server start" in " ".join(command_line(process))
    ]
    went_on: list[bool] = []

    def freeze() -> None:
        wait_until(lambda: run.state.living)
        server.suspend()
        try:
            wait_until(lambda: run.complete, 45)
            went_on.append(True)
        finally:
            server.resume()

    @flow(name="test-fleet")
    def story() -> dict[str, Any]:
        thread = threading.Thread(target=freeze)
        thread.start()
        try:
            return carry_out_fleet(run)
        finally:
            thread.join()

    summary = story()
    assert went_on == [True]
    assert sorted(member["outcome"] for member in summary["members"]) == ["finished", "finished"]
    assert_adds_up(summary, driver)


def test_a_program_that_fails_ends_the_fleet_and_shows_its_last_lines(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    job = fleet_job(folder, seconds=60, machines=3, env={"NOTES": str(folder / "notes-crowd"), "FAIL": "failed"})
    with pytest.raises(ProgramFailedError, match=r"ended with status 5:\n(?s:.*)this member fails"):
        carry(job, driver, store)
    summary = json.loads((folder / ".holdfast/runs/crowd/summary.json").read_text())
    assert summary["state"] == "failed" and "this member fails" in summary["detail"]
    assert Counter(member["outcome"] for member in summary["members"]) == {"program-failed": 1, "cancelled": 2}
    assert_adds_up(summary, driver)

    with pytest.raises(ConfigError, match="belongs to another job: its args"):
        carry(job.model_copy(update={"args": ["0.1"]}), driver, store)


def test_a_failing_program_has_a_budget_of_its_own(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    env = {"NOTES": str(folder / "notes-crowd"), "FAIL": "failed"}
    job = fleet_job(folder, seconds=0.5, machines=2, max_program_failures=1, env=env)
    summary = carry(job, driver, store)
    assert Counter(member["outcome"] for member in summary["members"]) == {"program-failed": 1, "finished": 2}
    assert_adds_up(summary, driver)


def test_a_maintained_fleet_keeps_its_number_until_its_hours_are_used_up(folder: Path, store: DirectoryStore) -> None:
    # Twenty times as fast: 3 machines use the 0.12 machine hours up within 7 s of the wall.
    driver = cloud(folder, [Fate(after_seconds=25, notice=False)], clock_speed=20.0)
    job = fleet_job(folder, seconds=3600, machines=3, spot_share=1 / 3, kind="maintained", max_run_hours=0.12)
    summary = carry(job, driver, store)
    assert summary["state"] == "finished"
    assert outcomes(summary)[("spot", "preempted")] == 1
    assert summary["machines_launched"] == 4 and summary["rounds"][0]["launched"] == 4
    assert 0.1 <= sum(summary["machine_hours"].values()) <= 0.25
    assert driver.fleets({}) == []
    assert_adds_up(summary, driver)


def test_too_many_replacements_end_the_run(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [Fate(after_seconds=0.3, notice=False)] * 2)
    job = fleet_job(folder, seconds=30, machines=1, spot_share=1.0, max_replacements=1)
    with pytest.raises(OverBudgetError, match=r"2 machines ended .* more than max_replacements, 1"):
        carry(job, driver, store)
    assert json.loads((folder / ".holdfast/runs/crowd/summary.json").read_text())["state"] == "over-budget"
    assert_nothing_left(driver)


def orchestrator(
    folder: Path, api: str, job: FleetJob | GangJob, account: str, command: str = "fleet"
) -> subprocess.Popen[str]:
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    return subprocess.Popen(
        [sys.executable, "-m", "flows", command, "job.yaml", "--run-id", job.name, "--account", account],
        cwd=folder,
        env={**os.environ, "PREFECT_API_URL": api, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_killed_orchestrator_s_successor_goes_on_with_the_same_machines(
    folder: Path, store: DirectoryStore, prefect_api: str
) -> None:
    account = LocalAccount(root=folder / "cloud", market=ScriptedMarket())
    account.save("orphaned", overwrite=True)
    driver = account.driver()
    job = fleet_job(folder, "killed", seconds=5)
    first = orchestrator(folder, prefect_api, job, "orphaned")
    wait_until(lambda: len(notes(folder, "begun", "killed")) == 5)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    summary = carry(job, driver, store)
    assert summary["orchestrator_recoveries"] == 1
    assert outcomes(summary) == {("spot", "finished"): 4, ("on-demand", "finished"): 1}
    assert len(driver.machines({})) == 5 and len(summary["rounds"]) == 1
    assert_adds_up(summary, driver)


def test_a_launch_that_was_not_written_down_is_repeated_and_brings_the_same_machines(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [])
    job = fleet_job(folder, seconds=1)
    run = open_fleet_run(job, driver, store, None, "crowd")
    with run:  # as far as the call, whose answer is lost with this process
        launch = run.decide()
        asked = run.reserve(launch)  # type: ignore[arg-type]
        before = {machine.id for machine in driver.launch_fleet(run._fleet_request(asked))}
    summary = carry(job, driver, store)
    assert {member["machine"] for member in summary["members"]} == before and len(before) == 5
    assert_adds_up(summary, driver)


def test_an_interrupted_fleet_ends_its_machines_settles_and_publishes(
    folder: Path, store: DirectoryStore, prefect_api: str
) -> None:
    account = LocalAccount(root=folder / "cloud", market=ScriptedMarket())
    account.save("interrupted", overwrite=True)
    driver = account.driver()
    started = orchestrator(folder, prefect_api, fleet_job(folder, "stopped", seconds=120, machines=3), "interrupted")
    wait_until(lambda: len(notes(folder, "begun", "stopped")) == 3)
    os.kill(started.pid, signal.SIGINT)
    output, _ = started.communicate(timeout=180)
    assert started.returncode not in (0, None) and "Traceback" not in output, output
    summary = json.loads((folder / ".holdfast/runs/stopped/summary.json").read_text())
    assert summary["state"] == "cancelled"
    assert Counter(member["outcome"] for member in summary["members"]) == {"cancelled": 3}
    assert_adds_up(summary, driver)


def test_the_reaper_ends_a_maintained_fleet_that_nobody_owns_and_nothing_replaces_its_machines(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [])
    job = fleet_job(folder, seconds=600, machines=2, kind="maintained", max_run_hours=5)
    run = open_fleet_run(job, driver, store, None, "crowd")
    with run:
        run.reserve(run.decide())  # type: ignore[arg-type]
        run.launch()
        assert reap(driver, store) == []  # it has an owner
    assert reap(driver, store) == []  # its run may be taken up again: the lease lasts
    lease = json.loads(store.get(lease_key("crowd")))
    store.put(lease_key("crowd"), json.dumps({**lease, "expires_at": driver.clock.now().isoformat()}).encode())
    assert next(reaped.machine for reaped in reap(driver, store)) == "fleet crowd-fleet-1"
    wait_until(lambda: all(machine.state == "terminated" for machine in driver.machines({})))
    assert driver.fleets({}) == [] and len(driver.machines({})) == 2
    assert_nothing_left(driver)


def test_a_fleet_that_is_cancelled_in_the_middle_of_a_launch_ends_machines_that_are_shown_later(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [])
    run = open_fleet_run(fleet_job(folder, seconds=600, machines=2, spot_share=1.0), driver, store, None, "crowd")
    with run:
        run.reserve(run.decide())  # type: ignore[arg-type]
        launch_fleet = driver.launch_fleet
        launches: list[threading.Timer] = []

        def interrupted(request: FleetRequest) -> Sequence[Machine]:
            launches.append(threading.Timer(2.0, launch_fleet, (request,)))  # the call is on its way all the same
            launches[0].start()
            raise KeyboardInterrupt

        driver.launch_fleet = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            run.launch()
        run.end("cancelled", "Ctrl-C")
        launches[0].join()
    summary = summarise_fleet(run.state)
    assert [member["outcome"] for member in summary["members"]] == ["cancelled"] * 2
    assert_adds_up(summary, driver)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"machines": 0}, ["machines", "got 0"]),
        ({"spot_share": 1.5}, ["spot_share", "got 1.5"]),
        ({"kind": "maintained"}, ["maintained", "max_run_hours"]),
        ({"machines": None}, ["TrainingJob", "machines"]),
        ({"script": "membr.py"}, ["script", "did you mean 'member.py'"]),
        ({"resources": {"instance_types": ["c7i.larg"]}}, ["did you mean 'c7i.large'"]),
        ({"machines": 6}, ["machines: 6 are more than max_machines", "5"]),
        ({"max_run_hours": 1000}, ["budget 'small'", "1000 machine hours", "raise max_usd"]),
    ],
)
def test_what_can_never_work_is_refused_before_anything_is_launched(
    fields: dict[str, Any], words: list[str], folder: Path, prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    SpendingBudget(max_usd=2, max_machines=5).save("small", overwrite=True)
    job = {"name": "bad", "script": "member.py", "code": str(PROGRAMS), "machines": 5, "max_run_hours": 2}
    resources = {"instance_types": ["c7i.large"]}
    job = {"resources": resources, **job, **fields}
    if fields.get("kind"):
        del job["max_run_hours"]
    (folder / "fleet.yaml").write_text(
        yaml.safe_dump({name: value for name, value in job.items() if value is not None})
    )
    assert main(["fleet", "fleet.yaml", "--budget", "small"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("refused: ") and all(word in said for word in words), said
    assert not list(folder.glob(".holdfast/clouds/*/launches/*")) and not list(folder.glob(".holdfast/runs/*"))
