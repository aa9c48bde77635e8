"""Running the flow's story on a cloud made for one test, and looking for what it left behind."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow

from flows.train import carry_out
from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.drivers.local.processes import marked
from holdfast.ledger.billing import add_usd
from holdfast.model import Checkpointing, Fallback, TrainingJob
from holdfast.storage import DirectoryStore
from holdfast.supervision.opening import open_run
from holdfast.supervision.training_run import TrainingRun
from tests.conftest import PROGRAMS


def tiny_job(folder: Path, name: str = "tiny", steps: int = 150, **changes: Any) -> TrainingJob:
    """150 steps of 10 ms with a checkpoint every 10, in which every kind of randomness takes part."""
    job = TrainingJob(
        name=name,
        script="tiny.py",
        args=[str(steps), "0.01"],
        code=str(PROGRAMS),
        env={"TRAINED": str(folder / f"trained-{name}")},
        checkpointing=Checkpointing(every="10 steps"),
        fallback=Fallback(after_failed_spot_attempts=100),
        notice_poll_seconds=0.05,
        max_run_hours=1,
    )
    return job.model_copy(update=changes)


def light_job(folder: Path, name: str = "light", steps: int = 100, **changes: Any) -> TrainingJob:
    """100 steps of 10 ms without PyTorch, with a checkpoint every 10."""
    return tiny_job(folder, name, steps, script="light.py", **changes)


def cloud(folder: Path, fates: list[Fate], name: str = "cloud", **changes: Any) -> LocalDriver:
    """Its notices leave time for one commit: with the 30 or 120 s of a real one a short job would be finished."""
    fates = [
        fate if fate.notice_seconds is not None else fate.model_copy(update={"notice_seconds": 2.0}) for fate in fates
    ]
    return LocalDriver(LocalCloudConfig(root=folder / name, market=ScriptedMarket(spot=fates), **changes))


def carry(
    job: TrainingJob, driver: LocalDriver, store: DirectoryStore, run_id: str
) -> tuple[TrainingRun, dict[str, Any]]:
    run = open_run(job, driver, store, None, run_id)
    return run, story_of(run)()


def story_of(run: TrainingRun) -> Callable[[], dict[str, Any]]:
    """The flow's story, as a flow of this test's."""

    @flow(name="test-run")
    def story() -> dict[str, Any]:
        return carry_out(run)

    return story


def summary_of(
    folder: Path, job: TrainingJob, fates: list[Fate], store: DirectoryStore, **changes: Any
) -> dict[str, Any]:
    """The summary of a run on a cloud that was made for it, of which nothing is left and whose bill adds up."""
    driver = cloud(folder, fates, **changes)
    _, summary = carry(job, driver, store, job.name)
    assert_nothing_left(driver)
    assert summary["usd_total"] == add_usd(attempt["usd"] for attempt in summary["attempts"])
    assert summary["lost_steps"] == sum(attempt["lost_steps"] for attempt in summary["attempts"])
    return summary


def outcomes(summary: dict[str, Any]) -> list[tuple[str, str]]:
    return [(attempt["provisioning_model"], attempt["outcome"]) for attempt in summary["attempts"]]


def trained_again(folder: Path, name: str) -> int:
    """Steps that the program itself wrote down more than once."""
    counts = Counter((folder / f"trained-{name}").read_text().split())
    return sum(count - 1 for count in counts.values())


def assert_nothing_left(driver: LocalDriver) -> None:
    machines = driver.machines({})
    assert machines
    assert [machine.id for machine in machines if machine.state != "terminated"] == []
    assert [process for machine in machines for process in marked(machine.id)] == []


def wait_until(condition: Callable[[], Any], seconds: float = 180.0) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "timed out"
        time.sleep(0.01)


def assert_lost_steps_were_trained_again(summary: dict[str, Any], folder: Path, name: str) -> None:
    """The ledger's lost steps are the steps that the program itself wrote down twice.

    A kill without notice may come between the program's note, the last line of its loop, and the end of the step: then
    the note has one step more, which was never complete.
    """
    kills = sum(a["outcome"] in ("preempted", "lost") and a["notice"] is None for a in summary["attempts"])
    assert 0 <= trained_again(folder, name) - summary["lost_steps"] <= kills
