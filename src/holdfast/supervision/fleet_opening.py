"""Opening a fleet's run: everything that can be wrong is found before anything is launched or written."""

from __future__ import annotations

from holdfast.drivers.protocol import Driver
from holdfast.errors import ConfigError
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.model import FleetJob, GangJob, Job
from holdfast.placement.fleet_policy import LaunchRound
from holdfast.storage import ObjectStore
from holdfast.supervision.fleet_run import FleetRun
from holdfast.supervision.gang_run import GangRun
from holdfast.supervision.opening import RUN_ID, refuse_what_others_left
from holdfast.supervision.preflight import check_job, check_store


def open_fleet_run(
    job: FleetJob | GangJob, driver: Driver, store: ObjectStore, budget: Budget | None = None, run_id: str = ""
) -> FleetRun:
    """Check everything that can be wrong, then return the run, to be entered. Nothing is launched or written before.

    Raises ConfigError with every problem in one message; entering raises RunTakenError when another process has it.
    """
    run_id = checked_run_id(run_id, job, driver)
    check_store(store)
    check_job(job, driver)
    kind = GangRun if isinstance(job, GangJob) else FleetRun
    run = kind(job, driver, store, budget, run_id)
    refuse_what_can_not_go_on(run, budget)
    return run


def checked_run_id(run_id: str, job: Job, driver: Driver) -> str:
    """The name of the run, a new one where it is empty. Raises ConfigError."""
    run_id = run_id or f"{job.name}-{driver.clock.now():%Y%m%d-%H%M%S}"
    if not RUN_ID.fullmatch(run_id):
        raise ConfigError(f"run_id: {run_id!r} is no name of a run; use up to 80 small letters, digits and dashes")
    return run_id


def refuse_what_can_not_go_on(run: FleetRun, budget: Budget | None) -> None:
    """Raises ConfigError when the run can't begin, or is another job's, or needs an account that is not there."""
    state = run.read()
    if state.state == "new":
        if isinstance(run, GangRun):
            refuse_what_others_left(run.store, run.run_id)
        _refuse_what_can_not_begin(run, budget)
    elif state.fingerprint != run.fingerprint:
        raise ConfigError(_difference(run))
    refuse_missing_accounts(run.run_id, run.driver, run.clouds())


def _refuse_what_can_not_begin(run: FleetRun, budget: Budget | None) -> None:
    job, decision = run.job, run.decide()
    if not isinstance(decision, LaunchRound):  # nothing was tried yet, so there is nothing to wait for
        raise ConfigError(f"resources: {decision.reason if decision else 'no machine is asked for'}")
    if budget is None:
        return
    dearest = max(offer.on_demand_usd_per_hour for offer in decision.offers)
    worst = run.within_cap(dearest * job.max_run_hours)
    ledger = BudgetLedger(run.store, budget)
    if why := ledger.why_too_long(job.max_run_hours):
        raise ConfigError(why)
    standing = ledger.standing()
    left = budget.max_usd - standing.committed_usd
    if worst > left + 1e-9:
        raise ConfigError(
            f"budget {budget.name!r}: ${left:.2f} is left of max_usd {budget.max_usd:.2f}, but the fleet may cost "
            f"${worst:.2f} ({job.max_run_hours:g} machine hours at ${dearest:.3f}/h, the on-demand price); raise max_usd, "
            "or lower the job's max_run_hours"
        )
    if run.most_machines > budget.max_machines:
        raise ConfigError(
            f"machines: {run.most_machines} are more than max_machines of budget {budget.name!r}, {budget.max_machines}; "
            "lower the one, or raise the other"
        )


def refuse_missing_accounts(run_id: str, driver: Driver, used: list[str]) -> None:
    """Of a cloud that can't be asked, a living machine would be taken for one that was never launched."""
    if missing := sorted(set(used) - set(driver.name.split("+"))):
        raise ConfigError(
            f"account: run {run_id!r} has used {' and '.join(missing)}, and {driver.name} has no account there; name that "
            "account too"
        )


def _difference(run: FleetRun) -> str:
    before, now = run.state.job, run.job.model_dump(mode="json")
    for name in run.identity:
        if before.get(name) != now.get(name):
            return (
                f"run_id {run.run_id!r} belongs to another job: its {name} is {before.get(name)!r}, this one's is "
                f"{now.get(name)!r}; use another run_id, or another store"
            )
    return f"run_id {run.run_id!r} belongs to another job; use another"
