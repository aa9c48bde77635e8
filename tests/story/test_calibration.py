"""Start small: one machine, some steps, a profile in the store, a simulation from it; and no step is trained twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks.accounts import LocalAccount
from flows.calibrate import calibrate
from flows.train import train
from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.errors import ConfigError
from holdfast.ledger.profiles import read_profile
from holdfast.model import Checkpointing, Resources
from holdfast.storage import DirectoryStore
from tests.chaos.runs import assert_nothing_left, light_job, trained_again

PLACE = Resources(instance_types=["c7i.large"], zones=["local-1a"])


def account_of(folder: Path, name: str, *fates: Fate) -> LocalAccount:
    account = LocalAccount(root=folder / "cloud", market=ScriptedMarket(spot=list(fates)))
    account.save(name, overwrite=True)
    return account


def test_calibration_measures_one_machine_simulates_the_run_and_training_goes_on_from_it(
    folder: Path, store: DirectoryStore
) -> None:
    account = account_of(folder, "calibrating")
    job = light_job(
        folder, steps=1500, resources=PLACE, deadline_hours=5, checkpointing=Checkpointing(every="50 steps")
    )
    told = calibrate(job, steps=60, account="calibrating", run_id="small")
    profile = read_profile(store, "light")
    (measured,) = profile.measurements
    assert profile.total_steps == 1500 and 60 <= measured.steps < 1500
    assert 0.009 < measured.step_seconds < 1 and measured.boot_seconds > 0.1 and measured.stop_seconds > 0
    assert measured.commit_seconds > 0 and measured.checkpoint_bytes > 0 and measured.upload_bytes_per_second > 0
    assert told["profile"]["measurements"][0]["steps"] == measured.steps
    assert told["simulation"]["sentence"].endswith("never late")
    assert told["simulation"]["work_hours"] == pytest.approx(1500 * measured.step_seconds / 3600, abs=1e-3)
    assert "from launch to the first step" in told["markdown"] and "omniscient bound" in told["markdown"]
    assert_nothing_left(account.driver())

    summary = train(job, account="calibrating", run_id="small")
    assert summary["state"] == "finished" and summary["steps_total"] == 1500
    assert summary["attempts"][-1]["first_step"] == summary["attempts"][-2]["last_step"] + 1
    assert trained_again(folder, "light") == 0
    (after,) = read_profile(store, "light").measurements
    assert after.steps > measured.steps  # what a run has seen is in the profile too


def test_a_job_that_is_over_before_is_measured_whole_and_one_that_tells_no_steps_not_at_all(
    folder: Path, store: DirectoryStore
) -> None:
    account_of(folder, "short")
    told = calibrate(light_job(folder, "short", steps=30, resources=PLACE), account="short")
    assert told["profile"]["measurements"][0]["steps"] == 30
    silent = light_job(folder, "silent", resources=PLACE).model_copy(update={"script": "", "command": ["true"]})
    with pytest.raises(ConfigError, match="its program told no steps"):
        calibrate(silent, account="short")
    with pytest.raises(ConfigError, match="steps is 1; a measurement needs at least 2"):
        calibrate(silent, steps=1, account="short")
