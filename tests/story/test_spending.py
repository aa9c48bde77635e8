"""A cap on a run's dollars: near it the run commits, stops and says so; with a higher one it goes on from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.errors import ConfigError, OverBudgetError
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.ledger.summary import summarise
from holdfast.model import Resources
from holdfast.storage import DirectoryStore
from holdfast.supervision.opening import open_run
from tests.chaos.runs import assert_nothing_left, carry, cloud, light_job, outcomes, story_of, trained_again

SMALL = Resources(instance_types=["c7i.large"])


def test_near_its_cap_a_run_commits_and_stops_and_a_higher_cap_takes_it_on(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [], clock_speed=20.0)
    job = light_job(folder, steps=1200, resources=SMALL, max_usd=0.0078)
    budget = Budget(name="team", max_usd=1.0, max_machines=2)
    run = open_run(job, driver, store, budget, "capped")
    with pytest.raises(OverBudgetError, match=r"of the run's max_usd of \$0.0078 is spent"):
        story_of(run)()
    assert_nothing_left(driver)
    state = run.read()
    (attempt,) = state.attempts
    assert state.state == attempt.outcome == "over-budget"
    assert 0 < state.usd_total <= 0.0078
    assert attempt.committed_step == attempt.last_step and attempt.lost_steps == 0
    standing = BudgetLedger(store, budget).standing()
    assert standing.committed_usd == standing.spent_usd == state.usd_total

    _, summary = carry(job.model_copy(update={"max_usd": 0.5}), driver, store, "capped")
    assert outcomes(summary) == [("spot", "over-budget"), ("spot", "finished")]
    assert summary["lost_steps"] == trained_again(folder, "light") == 0


def test_near_its_cap_on_hours_a_run_commits_and_stops_too(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [], clock_speed=20.0)
    run = open_run(light_job(folder, steps=6000, resources=SMALL, max_run_hours=0.1), driver, store, None, "hours")
    with pytest.raises(OverBudgetError, match=r"the run's max_run_hours of 0.1 are used up"):
        story_of(run)()
    assert_nothing_left(driver)
    (attempt,) = run.read().attempts
    assert attempt.outcome == "over-budget" and 200 < attempt.billed_seconds <= 360
    assert attempt.committed_step == attempt.last_step and attempt.lost_steps == 0


def test_a_cap_that_pays_for_no_machine_is_refused_before_any_is_bought(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    with pytest.raises(ConfigError, match=r"max_usd: the run has spent \$0.0000 of its max_usd of \$0.001"):
        open_run(light_job(folder, resources=SMALL, max_usd=0.001), driver, store, None, "poor")
    assert driver.machines({}) == []


def test_a_cap_is_what_a_shared_budget_sets_aside(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    job = light_job(folder, resources=SMALL, max_run_hours=1000, max_usd=0.2)
    run = open_run(job, driver, store, Budget(name="team", max_usd=0.25, max_machines=2), "modest")
    story_of(run)()
    assert [attempt.usd_reserved for attempt in run.state.attempts] == [0.2]
    assert summarise(run.state)["state"] == "finished"


def test_a_cap_on_machine_hours_is_shared_and_what_was_not_used_comes_back(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    budget = Budget(name="hours", max_usd=100, max_machines=2, max_machine_hours=5)
    run = open_run(light_job(folder, resources=SMALL, max_run_hours=4), driver, store, budget, "first")
    ledger = BudgetLedger(store, budget)
    ledger.reserve("another-run", 0.1, driver.clock.now(), hours=1.5)
    with pytest.raises(
        OverBudgetError, match=r"'hours': 4\.00 machine hours .* of 5 0\.00 are used and 1\.50 reserved"
    ):
        story_of(run)()
    with pytest.raises(ConfigError, match="raise max_machine_hours"):
        open_run(light_job(folder, resources=SMALL, max_run_hours=4), driver, store, budget, "second")
    assert driver.machines({}) == []
    ledger.settle("another-run", 0.0, driver.clock.now())

    run = open_run(light_job(folder, resources=SMALL, max_run_hours=4), driver, store, budget, "third")
    story_of(run)()
    standing = ledger.standing()
    assert standing.spent_hours == pytest.approx(run.state.billed_seconds / 3600) and standing.spent_hours < 1
    assert standing.reserved_hours == {} and ledger.why_too_long(4) == ""
