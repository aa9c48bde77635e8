"""Opening a run: everything that can be wrong is found before anything is launched or written."""

from __future__ import annotations

import re
from typing import Any

from holdfast.checkpoint.importing import IMPORTED
from holdfast.drivers.protocol import Driver
from holdfast.errors import ConfigError, OverBudgetError
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.model import TrainingJob
from holdfast.placement.policy import Launch
from holdfast.runtime.contract import checkpoint_prefix
from holdfast.storage import ObjectStore
from holdfast.supervision.preflight import check_job, check_store
from holdfast.supervision.spending import worst_case_usd
from holdfast.supervision.training_run import IDENTITY, TrainingRun, fingerprint

RUN_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")
"""Part of keys, tags, file names and artifact keys."""


def open_run(
    job: TrainingJob,
    driver: Driver,
    store: ObjectStore,
    budget: Budget | None = None,
    run_id: str = "",
    kind: type[TrainingRun] = TrainingRun,
) -> TrainingRun:
    """Check everything that can be wrong, then return the run, to be entered. Nothing is launched or written before.

    Raises ConfigError with every problem in one message; entering raises RunTakenError when another process has it.
    """
    run_id = run_id or f"{job.name}-{driver.clock.now():%Y%m%d-%H%M%S}"
    if not RUN_ID.fullmatch(run_id):
        raise ConfigError(f"run_id: {run_id!r} is no name of a run; use up to 80 small letters, digits and dashes")
    check_store(store)
    offers = check_job(job, driver)
    run = kind(job, driver, store, budget, run_id, offers)
    state = run.read()
    if state.state == "new":
        refuse_what_others_left(store, run_id)
        run.check_plan()
        _refuse_small_budget(run, budget)
    elif state.fingerprint != fingerprint(job):
        raise ConfigError(_difference(state.job, job, run_id))
    _refuse_missing_accounts(run)
    return run


def refuse_what_others_left(store: ObjectStore, run_id: str) -> None:
    """What was imported is there to begin with."""
    imported = f"{checkpoint_prefix(run_id)}{IMPORTED:04d}-"
    if any(not info.key.startswith(imported) for info in store.list(checkpoint_prefix(run_id))):
        raise ConfigError(
            f"store: {store.url!r} holds checkpoints under run id {run_id!r} that no journal explains: they are another "
            "job's; use another run_id, or another store"
        )


def _refuse_missing_accounts(run: TrainingRun) -> None:
    """Of a cloud that can't be asked, a living machine would be taken for one that was never launched."""
    used = {attempt.pool.cloud for attempt in run.state.attempts}
    if missing := sorted(used - set(run.driver.name.split("+"))):
        raise ConfigError(
            f"account: run {run.run_id!r} has used {' and '.join(missing)}, and {run.driver.name} has no account there; "
            "name that account too"
        )


def _refuse_small_budget(run: TrainingRun, budget: Budget | None) -> None:
    decision = run.decide()
    if not isinstance(decision, Launch):  # nothing was tried yet, so there is nothing to wait for
        raise ConfigError(f"resources: {decision.reason}")
    try:
        worst = worst_case_usd(run.job, run.state, decision.offer)
    except OverBudgetError as error:
        raise ConfigError(f"max_usd: {error}") from error
    if budget is None:
        return
    ledger = BudgetLedger(run.store, budget)
    if why := ledger.why_too_long(run.job.max_run_hours):
        raise ConfigError(why)
    left = budget.max_usd - ledger.standing().committed_usd
    if worst > left + 1e-9:
        raise ConfigError(
            f"budget {budget.name!r}: ${left:.2f} is left of max_usd {budget.max_usd:.2f}, but the first attempt may cost "
            f"${worst:.2f} ({run.job.max_run_hours:g} h at ${decision.offer.on_demand_usd_per_hour:.3f}/h, the on-demand "
            "price); raise max_usd, or lower the job's max_run_hours"
        )


def _difference(before: dict[str, Any], job: TrainingJob, run_id: str) -> str:
    now = job.model_dump(mode="json")
    for field in IDENTITY:
        if before.get(field) != now[field]:
            return (
                f"run_id {run_id!r} belongs to another job: its {field} is {before.get(field)!r}, this one's is "
                f"{now[field]!r}; use another run_id, or another store"
            )
    return f"run_id {run_id!r} belongs to another job; use another"
