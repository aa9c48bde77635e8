"""A run with a deadline: it waits and moves as its policy says, and says why. Real machines throughout."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.local.config import Outage, TimedMarket
from holdfast.errors import ConfigError
from holdfast.ledger.profiles import JobProfile, Measurement, write_profile
from holdfast.ledger.summary import plan_markdown, to_markdown
from holdfast.market.history import History, Life
from holdfast.model import Resources, TrainingJob
from holdfast.placement.policy import Launch
from holdfast.storage import DirectoryStore
from holdfast.supervision.opening import open_run
from tests.chaos.runs import assert_nothing_left, carry, light_job, outcomes, trained_again

SPEED = 60.0
STEPS, STEP_SECONDS = 100, 0.05
"""5 s of the wall, 300 s of the cloud; calibrated as taking twice as long, so that a slow computer is in time too."""
BOOT_SECONDS = 360.0
PLACE = Resources(instance_types=["c7i.large"], zones=["local-1a"])


def timed_cloud(folder: Path, *outages: Outage) -> LocalDriver:
    market = TimedMarket(outages=list(outages), notice_seconds=120.0)
    return LocalDriver(LocalCloudConfig(root=folder / "cloud", clock_speed=SPEED, market=market))


def job_with(folder: Path, store: DirectoryStore, **changes: Any) -> TrainingJob:
    measured = Measurement(
        cloud="local",
        instance_type="c7i.large",
        step_seconds=2 * STEP_SECONDS * SPEED,
        boot_seconds=BOOT_SECONDS,
        steps=STEPS,
    )
    write_profile(store, JobProfile("light", STEPS).with_measurements([measured], None))
    job = light_job(folder, args=[str(STEPS), str(STEP_SECONDS)], resources=PLACE)
    return job.model_copy(update={"max_attempts": 50, **changes})


def test_while_there_is_slack_it_waits_for_spot_and_then_goes_on_demand_in_time(
    folder: Path, store: DirectoryStore
) -> None:
    driver = timed_cloud(folder, Outage(start_seconds=0, end_seconds=1e6))
    _, summary = carry(job_with(folder, store, policy="greedy", deadline_hours=0.4), driver, store, "light")
    assert_nothing_left(driver)
    told = outcomes(summary)
    assert told[-1] == ("on-demand", "finished") and set(told[:-1]) == {("spot", "no-capacity")}
    started = datetime.fromisoformat(summary["started_at"])
    waited = (datetime.fromisoformat(summary["attempts"][-1]["launched_at"]) - started).total_seconds()
    assert waited > 200  # of the 1440 s, of which work, start and reserve take 1100
    deadline = summary["deadline"]
    assert deadline["policy"] == "greedy" and deadline["reason"] == "the slack is used up"
    assert deadline["kept"] == (deadline["seconds_to_spare"] >= 0)
    assert "Deadline" in to_markdown(summary) and "the slack is used up" in plan_markdown(deadline)


def test_spot_that_goes_for_good_is_left_in_time_and_the_deadline_is_kept(folder: Path, store: DirectoryStore) -> None:
    """Boots are calibrated as taking 12 s of the wall, so that a slow computer is in time too."""
    market = TimedMarket(outages=[Outage(start_seconds=100, end_seconds=1e6)], notice_seconds=50.0)
    driver = LocalDriver(LocalCloudConfig(root=folder / "cloud", clock_speed=20.0, market=market))
    measured = Measurement(
        cloud="local", instance_type="c7i.large", step_seconds=2.0, boot_seconds=240.0, stop_seconds=40.0, steps=60
    )
    write_profile(store, JobProfile("in-time", 60).with_measurements([measured], None))
    job = light_job(folder, "in-time", args=["60", "2.0"], resources=PLACE, deadline_hours=0.2, policy="greedy")
    job = job.model_copy(update={"script": "paced.py", "max_attempts": 50})
    run, summary = carry(job, driver, store, "in-time")
    assert_nothing_left(driver)
    told = outcomes(summary)
    assert told[-1] == ("on-demand", "finished") and {model for model, _ in told[:-1]} == {"spot"}
    assert summary["deadline"]["reason"] == "the slack is used up"
    assert summary["deadline"]["kept"] and summary["deadline"]["seconds_to_spare"] > 0
    assert summary["lost_steps"] == 0 and run.state.committed_step == 60


def test_a_preempted_run_that_falls_behind_goes_on_demand_and_loses_nothing(
    folder: Path, store: DirectoryStore
) -> None:
    driver = timed_cloud(folder, Outage(start_seconds=420, end_seconds=1e6))
    job = job_with(folder, store, policy="uniform-progress", deadline_hours=0.5)
    _, summary = carry(job, driver, store, "light")
    assert_nothing_left(driver)
    told = outcomes(summary)
    assert told[0] in (("spot", "preempted"), ("spot", "finished"))
    assert told[-1][1] == "finished"
    assert summary["lost_steps"] == trained_again(folder, "light") == 0


def test_a_tight_deadline_is_on_demand_from_the_start(folder: Path, store: DirectoryStore) -> None:
    driver = timed_cloud(folder)
    run, summary = carry(job_with(folder, store, deadline_hours=0.281, policy="greedy"), driver, store, "light")
    assert outcomes(summary) == [("on-demand", "finished")]
    assert (
        "the slack is used up" in run.state.attempts[0].reason
        and "of work left (calibrated)" in run.state.attempts[0].reason
    )


def test_what_cannot_be_kept_is_refused_with_figures_before_anything_is_bought(
    folder: Path, store: DirectoryStore
) -> None:
    driver = timed_cloud(folder)

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            open_run(job_with(folder, store, **changes), driver, store, None, "light")

    refused("but even on demand the job takes 17 min: 10 min of work .calibrated.", deadline_hours=0.2)
    refused(
        "but even on demand the job takes 10.3 h: 10.0 h of work", deadline_hours=5, work_hours=10, max_run_hours=20
    )
    refused("is past, on the cloud's clock", deadline=driver.clock.now() - timedelta(hours=1))
    refused("max_run_hours: 1 machine hours are not enough", deadline_hours=50, work_hours=10)
    refused("keeping the deadline may take", deadline_hours=1, max_usd=0.02)
    refused("policy: 'best' is none; use one of", policy="best")
    assert driver.machines({}) == [] and list(store.list("runs/")) == []


def test_work_that_nobody_knows_is_measured_by_the_first_machine(folder: Path, store: DirectoryStore) -> None:
    driver = timed_cloud(folder)
    job = job_with(folder, store, deadline_hours=2)
    store.delete("profiles/light.json")
    run, summary = carry(job, driver, store, "light")
    assert outcomes(summary) == [("spot", "finished")]
    assert run.state.attempts[0].reason.endswith("measures how long a step takes")


def test_what_earlier_runs_on_the_store_have_seen_of_a_pool_is_in_the_first_decision(
    folder: Path, store: DirectoryStore
) -> None:
    driver = timed_cloud(folder)
    job = job_with(folder, store, deadline_hours=1.0)

    def expected_usd(name: str) -> float:
        with open_run(job, driver, store, None, name) as run:
            decision = run.decide()
            assert isinstance(decision, Launch) and decision.offer.pool.provisioning_model == "spot"
            assert "spot $" in decision.reason, decision.reason
            return float(decision.reason.split("spot $")[1].split(",")[0])

    before, now = expected_usd("before"), driver.clock.now()
    (pool,) = {one.pool for one in driver.offers() if one.pool.zone == "local-1a" and one.pool.instance_type == "c7i.large"
               and one.pool.provisioning_model == "spot"}  # fmt: skip
    lives = [
        Life(
            run="earlier",
            token=str(number),
            pool=pool,
            launched_at=now - timedelta(minutes=20 * number + 12),
            ended_at=now - timedelta(minutes=20 * number),
            recorded_at=now,
            outcome="preempted",
        )
        for number in range(1, 30)
    ]
    History(store).record(lives)
    assert expected_usd("after") > before
