"""Opening a serving run: everything that can be wrong is found before anything is launched or written."""

from __future__ import annotations

from holdfast.drivers.protocol import Driver
from holdfast.ledger.budget import Budget
from holdfast.model import ServeJob
from holdfast.serving.opening import open_balancer
from holdfast.storage import ObjectStore
from holdfast.supervision.fleet_opening import checked_run_id, refuse_what_can_not_go_on
from holdfast.supervision.preflight import check_job, check_store, fitting_offers
from holdfast.supervision.serve_run import ServeRun


def open_serve_run(
    job: ServeJob, driver: Driver, store: ObjectStore, budget: Budget | None = None, run_id: str = ""
) -> ServeRun:
    """Check everything that can be wrong, then return the run, to be entered. Nothing is launched or written before.

    Raises ConfigError with every problem in one message; entering raises RunTakenError when another process has it.
    """
    run_id = checked_run_id(run_id, job, driver)
    check_store(store)
    check_job(job, driver)
    balancer = open_balancer(job, driver, run_id, store.url)
    balancer.check(sorted({offer.pool for offer in fitting_offers(job.resources, driver.offers())}))
    run = ServeRun(job, driver, store, budget, run_id, balancer)
    refuse_what_can_not_go_on(run, budget)
    return run
