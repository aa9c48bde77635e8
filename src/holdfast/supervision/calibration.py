"""Start small: one machine, a few hundred steps, and what they tell of the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from holdfast.errors import ConfigError
from holdfast.ledger.profiles import JobProfile, Measurement, measured, read_profile, write_profile
from holdfast.ledger.run_state import Attempt
from holdfast.model import TrainingJob
from holdfast.runtime.contract import Outcome
from holdfast.supervision.training_run import TrainingRun

STEPS = 300
SILENT_SECONDS = 1800.0
"""A program that has told no step by then will tell none."""


class CalibrationRun(TrainingRun):
    """A run that is stopped, with a commit, after some steps. A training under the same run id goes on from there."""

    steps = STEPS

    def why_stop(self, attempt: Attempt, report: Mapping[str, Any], now: datetime) -> tuple[Outcome, str] | None:
        done = (report.get("step") or 0) - (report.get("resumed_step") or 0)
        if report.get("step") and done >= self.steps:
            return "cancelled", f"calibrated over {done} steps"
        if (
            attempt.launched_at
            and not report.get("step")
            and now - attempt.launched_at > timedelta(seconds=SILENT_SECONDS)
        ):
            return "cancelled", "the program tells no steps"
        return None

    @property
    def is_enough(self) -> bool:
        """Was the last machine stopped because it had done its steps, or did it finish before?"""
        if not self.state.attempts:
            return False
        last = self.state.attempts[-1]
        return last.outcome == "finished" or bool(last.asked_to_end and last.outcome == "cancelled")

    def write_profile(self) -> JobProfile:
        """What was measured, now in the store. Raises ConfigError when it is nothing."""
        found = measured(self.state.attempts)
        if not found:
            raise ConfigError(
                f"job {self.job.name!r}: its program told no steps, so nothing was measured; wrap its loop in "
                "holdfast.attach, or say work_hours in the job"
            )
        totals = [one.report["total_steps"] for one in self.state.attempts if one.report.get("total_steps")]
        profile = read_profile(self.store, self.job.name).with_measurements(found, totals[-1] if totals else None)
        write_profile(self.store, profile)
        return profile


def without_hurry(job: TrainingJob) -> TrainingJob:
    """The same program on one machine after another, for a measurement: its deadline is the whole run's."""
    return job.model_copy(update={"deadline": None, "deadline_hours": None, "policy": ""})


def to_markdown(profile: JobProfile, newest: Measurement, usd: float, run_id: str) -> str:
    total = profile.total_steps
    work = f"{total} steps, {total * newest.step_seconds / 3600:.2f} h of work" if total else "unknown"
    speed = newest.upload_bytes_per_second
    rows = {
        "machine": f"{newest.cloud} {newest.instance_type}",
        "steps measured": f"{newest.steps}",
        "a step": f"{newest.step_seconds:.4g} s",
        "the whole job": work,
        "from launch to the first step": f"{newest.boot_seconds:.1f} s",
        "from the last step to the end of billing": f"{newest.stop_seconds:.1f} s",
        "a save holds the training up for": f"{newest.save_seconds * 1000:.1f} ms",
        "a save is durable after": f"{newest.commit_seconds:.2f} s",
        "a checkpoint": f"{newest.checkpoint_bytes / 1e6:.2f} MB, {speed / 1e6:.1f} MB/s" if speed else "none was made",
        "this cost": f"${usd:.4f}",
        "to go on from its last step": f"the same job with run id {run_id}",
    }
    return "\n".join(["| measured | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
