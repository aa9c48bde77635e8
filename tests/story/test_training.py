"""What happens to a training run when its machines are taken away. Every machine here is a real process group."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.checkpoint.reader import read_metrics
from holdfast.drivers.local.config import Fate
from holdfast.errors import ProgramFailedError
from holdfast.model import Fallback
from holdfast.storage import DirectoryStore
from tests.chaos.runs import (
    assert_lost_steps_were_trained_again,
    assert_nothing_left,
    carry,
    cloud,
    light_job,
    outcomes,
    summary_of,
    trained_again,
)


def test_a_preemption_with_notice_loses_no_step(folder: Path, store: DirectoryStore) -> None:
    summary = summary_of(folder, light_job(folder), [Fate(at_step=55, notice=True)], store)
    first, second = summary["attempts"]
    assert first["outcome"] == "preempted" and first["notice"] == "preemption"
    assert first["last_committed_step"] == first["last_step"] >= 55
    assert second["first_step"] == first["last_step"] + 1
    assert summary["lost_steps"] == trained_again(folder, "light") == 0


def test_a_preemption_without_notice_loses_at_most_one_interval_and_a_commit(
    folder: Path, store: DirectoryStore
) -> None:
    summary = summary_of(folder, light_job(folder), [Fate(at_step=55, notice=False)], store)
    assert 0 < summary["lost_steps"] <= 20  # one interval, and what is trained while a commit is under way
    assert_lost_steps_were_trained_again(summary, folder, "light")
    assert summary["steps_total"] == 100
    assert sorted(read_metrics(store, "light")) == list(range(1, 101))


def test_a_progress_bar_hides_no_step_that_was_lost(folder: Path, store: DirectoryStore) -> None:
    job = light_job(folder, "bar").model_copy(update={"script": "progress_bar.py", "args": []})
    summary = summary_of(folder, job, [Fate(at_step=55, notice=False)], store)
    assert outcomes(summary) == [("spot", "preempted"), ("spot", "finished")]
    assert 0 < summary["lost_steps"] <= 20  # one interval, and what is trained while a commit is under way
    assert_lost_steps_were_trained_again(summary, folder, "bar")


def test_three_failed_spot_attempts_in_a_row_lead_to_on_demand_in_another_zone(
    folder: Path, store: DirectoryStore
) -> None:
    fates = [Fate(refuse=True), Fate(after_seconds=0, notice=False), Fate(refuse=True), Fate(refuse=True)]
    job = light_job(folder, fallback=Fallback())
    summary = summary_of(folder, job, fates, store)
    assert outcomes(summary) == [
        ("spot", "no-capacity"),
        ("spot", "preempted"),
        ("spot", "no-capacity"),
        ("on-demand", "finished"),
    ]
    assert summary["attempts"][3]["zone"] != summary["attempts"][2]["zone"]
    assert (summary["refusals"], summary["interruptions"]) == (2, 1)


def test_progress_between_preemptions_keeps_a_run_on_spot(folder: Path, store: DirectoryStore) -> None:
    fates = [Fate(at_step=step, notice=False) for step in (30, 50, 70, 90)]
    summary = summary_of(folder, light_job(folder, fallback=Fallback()), fates, store)
    assert outcomes(summary) == [("spot", "preempted")] * 4 + [("spot", "finished")]


def test_progress_that_is_too_small_counts_as_failure(folder: Path, store: DirectoryStore) -> None:
    fates = [Fate(at_step=step, notice=False) for step in (30, 50, 70, 90)]
    job = light_job(folder, fallback=Fallback(progress_to_reset=40))
    assert outcomes(summary_of(folder, job, fates, store)) == [("spot", "preempted")] * 3 + [("on-demand", "finished")]


def test_a_run_returns_to_spot_where_the_job_says_so(folder: Path, store: DirectoryStore) -> None:
    fallback = Fallback(after_failed_spot_attempts=1, return_to_spot_after_seconds=40)
    job = light_job(folder, steps=400, fallback=fallback)
    summary = summary_of(folder, job, [Fate(refuse=True)], store, clock_speed=20.0)
    assert outcomes(summary) == [("spot", "no-capacity"), ("on-demand", "moved"), ("spot", "finished")]
    assert summary["lost_steps"] == trained_again(folder, "light") == 0
    assert summary["clock_speed"] == 20


def test_a_failing_program_is_not_retried_and_its_last_fifty_lines_are_shown(
    folder: Path, store: DirectoryStore
) -> None:
    job = light_job(folder)
    job = job.model_copy(update={"env": {**job.env, "FAIL_AT": "25"}})
    driver = cloud(folder, [])
    with pytest.raises(ProgramFailedError, match="status 3") as failure:
        carry(job, driver, store, "light")
    lines = str(failure.value).splitlines()[1:]
    assert lines == [f"line {number} before the end" for number in range(30, 80)]
    assert len(driver.machines({})) == 1
    assert_nothing_left(driver)


def test_a_failing_program_has_a_budget_of_its_own(folder: Path, store: DirectoryStore) -> None:
    job = light_job(folder, max_program_failures=1)
    job = job.model_copy(update={"env": {**job.env, "FAIL_AT": "25"}})
    summary = summary_of(folder, job, [], store)  # it fails in its first attempt only
    assert outcomes(summary) == [("spot", "program-failed"), ("spot", "finished")]
