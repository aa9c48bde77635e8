"""Where the next attempt goes."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from holdfast.ledger.run_state import Attempt
from holdfast.placement.policy import GiveUp, Launch, Wait
from holdfast.supervision.training_run import TrainingRun
from tasks.retrying import only_transient

API_RETRIES = {
    "retries": 8,
    "retry_delay_seconds": [1, 2, 5, 15, 45, 120, 300, 600],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": only_transient,
}
"""A cloud or a store that is away for a quarter of an hour ends no run."""


@task(cache_policy=NO_CACHE, **API_RETRIES)
def choose_pool(run: TrainingRun) -> Launch | Wait | GiveUp:
    return run.decide()


@task(cache_policy=NO_CACHE, **API_RETRIES)
def reserve(run: TrainingRun, launch: Launch) -> Attempt:
    return run.reserve(launch)
