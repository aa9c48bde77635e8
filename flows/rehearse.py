"""Run a job on the local cloud with preemptions, compare it with an uninterrupted run, and judge it."""

from __future__ import annotations

import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows.train import carry_out
from holdfast.checkpoint.planner import MARGIN_SECONDS
from holdfast.checkpoint.reader import read_metrics, tensor_digest
from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.errors import ConfigError, HoldfastError
from holdfast.ledger.run_state import RunState
from holdfast.model import Fallback, TrainingJob
from holdfast.storage import DirectoryStore
from holdfast.supervision.opening import open_run
from holdfast.supervision.rehearsal import Evidence, Verdict, judge
from holdfast.supervision.training_run import TrainingRun

FOLDER = Path(".holdfast/rehearsals")
NEVER_FALL_BACK = 10_000
NOTICE_POLL_SECONDS = 0.1
"""A short job would be over before its own poll heard the notice; the verdict adds the job's poll to the flush."""

NOTICE_SECONDS = 10.0
"""For a program that is only told to end; one that plans what to do with a window gets one that just fits a commit."""

Preemption = Literal["notice", "no-notice", "during-commit"]


@flow(name="rehearse", flow_run_name="rehearse-{job.name}")
def rehearse(
    job: TrainingJob,
    preemptions: int = 3,
    kinds: list[Preemption] = ["notice", "no-notice", "during-commit"],  # noqa: B006 (Prefect shows it in the form)
) -> dict[str, Any]:
    """Does the job survive preemption? The verdict first, the evidence below. Costs nothing: all of it runs here.

    Args:
        job: The job as it will run in the cloud.
        preemptions: How many times its machine is taken away.
        kinds: In turn: with a notice, without one, in the middle of a commit.
    """
    if preemptions < 1:
        raise ConfigError(f"preemptions is {preemptions}; a rehearsal needs at least 1")
    name = f"{job.name}-{str(flow_run.id)[:8]}"
    folder = (FOLDER / name).absolute()
    steady = rehearsal_run(job, folder, f"{name}-steady", [])
    problem = run_it(steady)
    total = steady.state.attempts[-1].last_step or 0 if steady.state.attempts else 0
    interrupted = None
    if not problem:
        window = notice_seconds(steady)
        fates = [
            fate(kind, total * number // (preemptions + 1), window)
            for number, kind in enumerate(turns(kinds, preemptions), 1)
        ]
        interrupted = rehearsal_run(job, folder, f"{name}-interrupted", fates)
        problem = run_it(interrupted)
    verdict = judge(
        job,
        preemptions,
        evidence(steady),
        evidence(interrupted) if interrupted else None,
        problem,
    )
    return publish_verdict(verdict, name, folder)


def turns(kinds: list[Preemption], preemptions: int) -> list[Preemption]:
    return list(islice(cycle(kinds or ["no-notice"]), preemptions))


def fate(kind: Preemption, step: int, window_seconds: float) -> Fate:
    if kind == "during-commit":
        return Fate(in_phase="commit", after_step=max(1, step), notice=False)
    return Fate(at_step=max(1, step), notice=kind == "notice", notice_seconds=window_seconds)


def notice_seconds(steady: TrainingRun) -> float:
    """Long enough for one commit like the slowest in peace, too short for a second: in a real window of 120 s a short job
    would train on to its end, and never be resumed.
    """
    commits = [attempt.report.get("longest", {}).get("wall_commit_seconds") for attempt in steady.state.attempts]
    known = [seconds for seconds in commits if seconds]
    return MARGIN_SECONDS + NOTICE_POLL_SECONDS + 1.5 * max(known) if known else NOTICE_SECONDS


def rehearsal_run(job: TrainingJob, folder: Path, run_id: str, fates: list[Fate]) -> TrainingRun:
    """A run on a cloud of its own, whose spot machines meet `fates` one after another."""
    cloud = LocalCloudConfig(root=folder / run_id / "cloud", market=ScriptedMarket(spot=fates))
    patient = job.model_copy(
        update={
            "fallback": Fallback(after_failed_spot_attempts=NEVER_FALL_BACK),
            "provisioning": "spot",
            "notice_poll_seconds": NOTICE_POLL_SECONDS,
        }
    )
    return open_run(patient, LocalDriver(cloud), DirectoryStore(folder / "store"), None, run_id)


def run_it(run: TrainingRun) -> str:
    """What went wrong, in words; empty when the run finished."""
    try:
        carry_out(run)
    except HoldfastError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def evidence(run: TrainingRun) -> Evidence:
    state: RunState = run.state
    return Evidence(
        state=state,
        metrics=read_metrics(run.store, run.run_id),
        digest=tensor_digest(run.store, run.run_id),
    )


def publish_verdict(verdict: Verdict, name: str, folder: Path) -> dict[str, Any]:
    result = verdict.to_json()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verdict.json").write_text(json.dumps(result, indent=2))
    (folder / "verdict.md").write_text(result["markdown"])
    create_markdown_artifact(result["markdown"], key=f"rehearsal-{name}", description=verdict.headline)
    return result
