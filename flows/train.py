"""Train a job to its last step, however often its machine is taken away."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.transactions import CommitMode, transaction

from blocks import load_budget, load_driver, load_store
from flows.display import terminal_watchers
from holdfast.errors import CapacityError, OverBudgetError, ProgramFailedError, QuotaError, RunTakenError
from holdfast.ledger.run_state import Attempt
from holdfast.ledger.summary import headline
from holdfast.model import TrainingJob
from holdfast.placement.policy import GiveUp, Launch
from holdfast.supervision.opening import open_run
from holdfast.supervision.plan import most_attempts
from holdfast.supervision.preflight import check_reachable
from holdfast.supervision.training_run import TrainingRun
from holdfast.supervision.updates import Update
from tasks.costs import load_notification, publish_summary
from tasks.machines import launch_machine, settle_machines
from tasks.placement import choose_pool, reserve
from tasks.progress import PrefectWatcher, Watcher, watch_machine
from tasks.retrying import only_preemption, raise_unless_finished


@flow(name="train", flow_run_name="train-{job.name}")
def train(
    job: TrainingJob,
    account: str | list[str] = "local",
    store: str = "local",
    budget: str = "",
    run_id: str = "",
    notify: str = "",
) -> dict[str, Any]:
    """Train a job on spot machines; fall back to on-demand when spot fails; end with a cost summary that adds up.

    Args:
        job: What to train, and within which limits.
        account: Name of the account block that machines come from, or several: a run that one cloud refuses goes on in
            another. `local` is the cloud in a box.
        store: Name of the checkpoint-store block. `local` is the folder .holdfast.
        budget: Name of the spending-budget block that caps the cost. Empty: only the job's own max_run_hours.
        run_id: Name of the run. The same name again goes on with that run, from its journal. Empty: a new run.
        notify: A notification block, as type/name, that gets the summary. Empty: none.
    """
    if notify:
        load_notification(notify)
    driver, objects = load_driver(account), load_store(store).store()
    check_reachable(objects.url, driver.name)
    run = open_run(  # refuses everything that can be known to be wrong; nothing is launched before it returns
        job,
        driver,
        objects,
        load_budget(budget) if budget else None,
        run_id or f"{job.name}-{str(flow_run.id)[:8]}",
    )
    summary = carry_out(run, notify)
    get_run_logger().info(headline(summary))
    return summary


def carry_out(run: TrainingRun, notify: str = "") -> dict[str, Any]:
    """Train to the end, settle, publish: whatever happens, no machine is left and the summary is there."""
    with run, terminal_watchers(run) as watchers:
        try:
            if run.state.state == "running":
                watchers.append(PrefectWatcher(run.run_id, run.job.name))
                train_to_the_end(run, watchers)
                settle_machines(run)
                run.close("finished")
        except RunTakenError:
            raise  # another process has the run, its machines and its summary
        except BaseException as error:  # no machine outlives its flow
            try:
                run.end(state_after(error), f"{type(error).__name__}: {error}".rstrip(": "))
            finally:
                if not run.taken:
                    publish_summary(run, notify)
            raise
        return publish_summary(run, notify)


def state_after(error: BaseException) -> str:
    """How a run is closed that `error` has ended."""
    if isinstance(error, OverBudgetError):
        return "over-budget"
    # Ctrl-C and Prefect's cancellation are no Exception.
    return "failed" if isinstance(error, Exception) else "cancelled"


def train_to_the_end(run: TrainingRun, watchers: list[Watcher]) -> None:
    """Attempts until one finishes. Preemption is retried by the task; a failing program has a budget of its own."""
    if run.complete:
        return  # an orchestrator died, or met an error, between that and the run's last word
    # What an attempt's tasks have done stays done: else Prefect would name them all RolledBack once it is preempted.
    with transaction(commit_mode=CommitMode.EAGER):
        for left in range(run.job.max_program_failures, -1, -1):
            try:
                one_attempt.with_options(retries=most_attempts(run.job))(run, watchers)
                return
            except ProgramFailedError:
                if not left:
                    raise


@task(name="attempts", retry_condition_fn=only_preemption, cache_policy=NO_CACHE)
def one_attempt(run: TrainingRun, watchers: list[Watcher]) -> None:
    """One machine: chosen, reserved, launched (or adopted after a crash), watched to its end."""
    attempt = run.state.open_attempt
    if attempt is None:
        launch = wait_for_a_pool(run, watchers)
        attempt = reserve(run, launch)
        if launch.fell_back:
            tell(watchers, run, "fallback", launch.reason, attempt)
    try:
        launch_machine(run)
    except (CapacityError, QuotaError):
        refused = run.state.attempts[-1]
        row_of(refused)(run, refused, watchers, return_state=True)
        raise
    attempt = run.state.attempts[-1]
    tell(watchers, run, "launched", f"launched {attempt.machine} in {attempt.pool}", attempt)
    row = row_of(attempt)(run, attempt, watchers, return_state=True)
    ended = run.state.attempts[-1]
    if ended.outcome is None:
        row.result()  # raises what stopped the watch: the attempt has not ended, and must not be taken for finished
    raise_unless_finished(ended)


def wait_for_a_pool(run: TrainingRun, watchers: list[Watcher]) -> Launch:
    """The decision where to go, once there is somewhere to go."""
    while not isinstance(decision := choose_pool(run), Launch):
        if isinstance(decision, GiveUp):
            raise OverBudgetError(decision.reason)
        tell_plans(watchers, run)
        tell(watchers, run, "waiting", f"{decision.reason}; asking again at {decision.until:%H:%M:%S}")
        run.pause(decision.until)
    tell_plans(watchers, run)
    return decision


def tell_plans(watchers: list[Watcher], run: TrainingRun) -> None:
    for update in run.told_plans():
        for watcher in watchers:
            watcher(update)


def row_of(attempt: Attempt) -> Any:
    """The task of the attempt's row in the UI: who sells the machine, where, of which type and how.

    Without tags: for a task that has any, Prefect asks its API for a concurrency slot first, and while a busy server's
    database is locked that takes a minute in which nobody supervises the machine.
    """
    pool = attempt.pool
    where = f"{pool.cloud} {pool.zone} {pool.instance_type} {pool.provisioning_model}"
    return watch_machine.with_options(task_run_name=f"attempt {attempt.number}: {where}")


def tell(watchers: list[Watcher], run: TrainingRun, kind: Any, text: str, attempt: Attempt | None = None) -> None:
    fields = {"usd": run.state.usd_total, "phase": "starting" if attempt else "waiting"}
    if attempt:
        fields |= {"machine": attempt.machine, "pool": str(attempt.pool)}
    number = attempt.number if attempt else len(run.state.attempts) + 1
    update = Update(kind=kind, at=run.driver.clock.now(), attempt=number, text=text, fields=fields)
    for watcher in watchers:
        watcher(update)
