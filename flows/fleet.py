"""Run a program on many machines at once, a share of them spot, however often some are taken away."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.transactions import CommitMode, transaction

from blocks import load_budget, load_driver, load_store
from flows.fleet_display import fleet_watchers
from flows.train import state_after
from holdfast.errors import CapacityError, OverBudgetError, QuotaError, RunTakenError
from holdfast.model import FleetJob, GangJob
from holdfast.placement.fleet_policy import LaunchRound
from holdfast.placement.policy import GiveUp, Wait
from holdfast.supervision.fleet_opening import open_fleet_run
from holdfast.supervision.fleet_run import FleetRun
from holdfast.supervision.preflight import check_reachable
from tasks.costs import load_notification
from tasks.fleet import (
    FleetWatcher,
    choose_round,
    launch_round,
    publish_fleet_summary,
    reserve_round,
    settle_fleet,
    watch_members,
)
from tasks.progress import Watcher


@flow(name="fleet", flow_run_name="fleet-{job.name}")
def fleet(
    job: FleetJob,
    account: str | list[str] = "local",
    store: str = "local",
    budget: str = "",
    run_id: str = "",
    notify: str = "",
) -> dict[str, Any]:
    """Run a program on many machines at once; replace what is taken, in the share of spot that the job asks for.

    Args:
        job: What to run, on how many machines, what share of them spot, and within which limits.
        account: Name of the account block that machines come from, or several. `local` is the cloud in a box.
        store: Name of the checkpoint-store block. `local` is the folder .holdfast.
        budget: Name of the spending-budget block that caps the cost. Empty: only the job's own max_run_hours.
        run_id: Name of the run. The same name again goes on with that run, from its journal. Empty: a new run.
        notify: A notification block, as type/name, that gets the summary. Empty: none.
    """
    return open_and_carry_out(job, account, store, budget, run_id, notify)


def open_and_carry_out(
    job: FleetJob | GangJob, account: str | list[str], store: str, budget: str, run_id: str, notify: str
) -> dict[str, Any]:
    """What a flow of many machines does with its parameters; the summary."""
    if notify:
        load_notification(notify)
    driver, objects = load_driver(account), load_store(store).store()
    check_reachable(objects.url, driver.name)
    run = open_fleet_run(  # refuses everything that can be known to be wrong; nothing is launched before it returns
        job,
        driver,
        objects,
        load_budget(budget) if budget else None,
        run_id or f"{job.name}-{str(flow_run.id)[:8]}",
    )
    summary = carry_out_fleet(run, notify)
    get_run_logger().info(run.headline(summary))
    return summary


def carry_out_fleet(run: FleetRun, notify: str = "") -> dict[str, Any]:
    """Run to the end, settle, publish: whatever happens, no machine is left and the summary is there."""

    def to_the_end(watchers: list[Watcher]) -> None:
        keep_the_fleet_until_it_is_done(run, watchers)
        settle_fleet(run)

    return settled_and_published(run, to_the_end, notify)


def settled_and_published(
    run: FleetRun, to_the_end: Callable[[list[Watcher]], None], notify: str = ""
) -> dict[str, Any]:
    """The summary of a run that `to_the_end` brings to its end, if it can: no machine outlives it."""
    with run, fleet_watchers(run) as watchers:
        try:
            if run.state.state == "running":
                watchers.append(FleetWatcher(run.run_id, run.job.name))
                to_the_end(watchers)
                run.close("finished")
        except RunTakenError:
            raise  # another process has the run, its machines and its summary
        except BaseException as error:  # no machine outlives its flow
            try:
                run.end(state_after(error), f"{type(error).__name__}: {error}".rstrip(": "))
            finally:
                if not run.taken:
                    publish_fleet_summary(run, notify)
            raise
        return publish_fleet_summary(run, notify)


def keep_the_fleet_until_it_is_done(run: FleetRun, watchers: list[Watcher]) -> None:
    """Rounds of machines, each for the places that are empty; in between, all members are watched together."""
    # What the tasks have done stays done: else Prefect would name them RolledBack once the run fails.
    with transaction(commit_mode=CommitMode.EAGER):
        while not run.complete:
            until = None
            if run.state.open_round:
                launch_what_was_asked_for(run, watchers)  # by an orchestrator that did not live to hear the answer
            else:
                match choose_round(run):
                    case GiveUp(reason=reason):
                        raise OverBudgetError(reason)
                    case LaunchRound() as launch:
                        reserve_round(run, launch)
                        if launch.fell_back:
                            tell(watchers, run, "fallback", launch.reason)
                        if not launch_what_was_asked_for(run, watchers):
                            continue  # to the next pools at once
                    case Wait(until=until, reason=reason):
                        tell(watchers, run, "waiting", f"{reason}; asking again at {until:%H:%M:%S}")
            watch(run, watchers, until)


def launch_what_was_asked_for(run: FleetRun, watchers: list[Watcher]) -> bool:
    """One round, a row in the UI: who sells the machines, where, and how many of each model. False when it was refused."""
    asked = run.state.open_round
    assert asked
    name = f"round {asked.number}: {asked.cloud} {asked.region}, {asked.spot} spot + {asked.on_demand} on-demand"
    try:
        launched = launch_round.with_options(task_run_name=name)(run)  # no tags: see flows.train.row_of
    except (CapacityError, QuotaError) as error:
        tell(watchers, run, "refused", f"refused: {error}")
        return False
    machines = {member.machine: str(member.pool) for member in launched.members}
    spot = sum(member.model == "spot" for member in launched.members)
    text = f"launched {len(machines)} of {asked.spot + asked.on_demand} machines in {asked.region}, {spot} of them spot"
    tell(watchers, run, "launched", text, machines)
    return True


def watch(run: FleetRun, watchers: list[Watcher], until: datetime | None) -> None:
    name = f"members after round {len(run.state.rounds)}"
    watch_members.with_options(task_run_name=name)(run, watchers, until)


def tell(watchers: list[Watcher], run: FleetRun, kind: Any, text: str, machines: dict[str, str] | None = None) -> None:
    update = run.update(kind, text, machines)
    for watcher in watchers:
        watcher(update)
