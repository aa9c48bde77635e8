"""Start small: one machine trains a few hundred steps, and the whole run is simulated from what they tell."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from blocks import load_budget, load_driver, load_store
from flows.display import terminal_watchers
from flows.simulate import publish, simulated
from flows.train import state_after, train_to_the_end
from holdfast.errors import ConfigError, HoldfastError, RunTakenError
from holdfast.ledger.profiles import JobProfile
from holdfast.model import TrainingJob
from holdfast.supervision.calibration import STEPS, CalibrationRun, to_markdown, without_hurry
from holdfast.supervision.opening import open_run
from holdfast.supervision.preflight import check_reachable
from tasks.costs import publish_summary
from tasks.machines import settle_machines
from tasks.progress import PrefectWatcher


@flow(name="calibrate", flow_run_name="calibrate-{job.name}")
def calibrate(
    job: TrainingJob,
    steps: int = STEPS,
    trace: str = "",
    account: str | list[str] = "local",
    store: str = "local",
    budget: str = "",
    run_id: str = "",
) -> dict[str, Any]:
    """Measure step, save, upload and boot on one machine, write the job's profile, and simulate the full run.

    Args:
        job: The job as it will be trained.
        steps: So many are trained, then the machine commits and ends.
        trace: What the full run is simulated on: a trace file, a folder, `history`, or empty: the market's rates.
        account: Name of the account block that the machine comes from.
        store: Name of the checkpoint-store block, where the profile goes too.
        budget: Name of a spending-budget block. Empty: only the job's own limits.
        run_id: Name of the run, which a training may go on with. Empty: a new one.
    """
    if steps < 2:
        raise ConfigError(f"steps is {steps}; a measurement needs at least 2")
    driver, objects = load_driver(account), load_store(store).store()
    check_reachable(objects.url, driver.name)
    run = open_run(
        without_hurry(job),
        driver,
        objects,
        load_budget(budget) if budget else None,
        run_id or f"{job.name}-calibrate-{str(flow_run.id)[:8]}",
        CalibrationRun,
    )
    assert isinstance(run, CalibrationRun)
    run.steps = steps
    profile = carry_out(run)
    newest = profile.measurements[-1]
    said: dict[str, Any] = {"run_id": run.run_id, "profile": profile.to_dict(), "usd": run.state.usd_total}
    markdown = to_markdown(profile, newest, run.state.usd_total, run.run_id)
    try:
        told = simulated(job, driver, objects, trace)
        publish(told, str(flow_run.id)[:8])
        said["simulation"], markdown = told.to_json(), f"{told.to_markdown()}\n\n{markdown}"
        get_run_logger().info(told.sentence)
    except ConfigError as error:
        said["not_simulated"], markdown = str(error), f"{markdown}\n\nNot simulated: {error}"
    create_markdown_artifact(markdown, key=f"calibration-{run.run_id}", description=f"What {job.name} takes")
    return {**said, "markdown": markdown}


def carry_out(run: CalibrationRun) -> JobProfile:
    """One machine, stopped when it has done its steps; another when it was taken before."""
    with run, terminal_watchers(run) as watchers:
        try:
            watchers.append(PrefectWatcher(run.run_id, run.job.name))
            try:
                train_to_the_end(run, watchers)
            except HoldfastError:
                if not run.is_enough:
                    raise
            settle_machines(run)
            profile = run.write_profile()
            run.close("calibrated")
        except RunTakenError:
            raise
        except BaseException as error:  # no machine outlives its flow
            run.end(state_after(error), f"{type(error).__name__}: {error}".rstrip(": "))
            raise
        finally:
            if not run.taken:
                publish_summary(run)
        return profile
