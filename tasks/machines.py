"""Machines: bought once, watched to the end, proven gone."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from holdfast.drivers.protocol import Driver, Machine
from holdfast.storage import ObjectStore
from holdfast.supervision.reap import Reaped, reap
from holdfast.supervision.training_run import TrainingRun
from tasks.placement import API_RETRIES


@task(cache_policy=NO_CACHE, **API_RETRIES)
def launch_machine(run: TrainingRun) -> Machine:
    return run.launch()


@task(cache_policy=NO_CACHE, **API_RETRIES)
def settle_machines(run: TrainingRun) -> None:
    run.settle()


@task(cache_policy=NO_CACHE, **API_RETRIES)
def reap_machines(driver: Driver, store: ObjectStore) -> list[Reaped]:
    return reap(driver, store)
