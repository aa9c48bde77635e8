"""What a job will probably cost, and when it will end, before it is paid for: the production policies on recorded markets."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.runtime import flow_run

from blocks import load_driver, load_store
from holdfast.drivers.protocol import Driver
from holdfast.ledger.profiles import read_profile
from holdfast.market.history import History
from holdfast.model import TrainingJob
from holdfast.simulation.asking import ask, markets_of, with_prices
from holdfast.simulation.plots import draw
from holdfast.simulation.study import Study, carry_out
from holdfast.storage import ObjectStore
from holdfast.supervision.preflight import fitting_offers


@flow(name="simulate", flow_run_name="simulate-{job.name}")
def simulate(
    job: TrainingJob,
    trace: str = "",
    runs: int = 500,
    fitted: bool = False,
    together: bool = False,
    account: str | list[str] = "local",
    store: str = "local",
    seed: int = 0,
) -> dict[str, Any]:
    """Hundreds of simulated runs under every policy: cost, end, lost work, interruptions; nothing is launched.

    Args:
        job: The job as it would be trained.
        trace: A trace file, a folder of them, `history` (what this store's runs have seen), or empty: the market's rates.
        runs: How many of each policy.
        fitted: Draw new markets from a model fitted to the traces, instead of replaying them.
        together: Every trace is a pool of its own, all of them at once.
        account: Whose prices.
        store: Where the job's profile and the history are.
        seed: The same one again gives the same runs.
    """
    told = simulated(job, load_driver(account), load_store(store).store(), trace, runs, fitted, together, seed)
    publish(told, str(flow_run.id)[:8])
    get_run_logger().info(told.sentence)
    return told.to_json()


def simulated(
    job: TrainingJob,
    driver: Driver,
    store: ObjectStore,
    trace: str = "",
    runs: int = 500,
    fitted: bool = False,
    together: bool = False,
    seed: int = 0,
    prices: tuple[float | None, float | None] = (None, None),
    progress: Callable[[int], None] = lambda runs: None,
) -> Study:
    """`prices`: of spot and on-demand an hour, instead of the market's."""
    now = driver.clock.now()
    offers = with_prices(fitting_offers(job.resources, driver.offers()), *prices)
    markets = markets_of(trace, offers, History(store), now, fitted, together)
    return carry_out(ask(job, offers, read_profile(store, job.name), markets, now, runs, seed), progress)


def picture(told: Study) -> bytes:
    seconds = told.question.workload.deadline_seconds
    hours = seconds / 3600 if seconds < timedelta.max.total_seconds() else None
    return draw(
        told.distributions,
        told.bound_usd,
        hours,
        f"{told.question.job}: {told.sentence}  ({told.question.markets.name})",
    )


def publish(told: Study, name: str) -> None:
    key = f"simulation-{told.question.job}-{name}"
    image = "data:image/png;base64," + base64.b64encode(picture(told)).decode()
    create_markdown_artifact(
        f"{told.to_markdown()}\n\n![Cost and time to the end, by policy]({image})\n", key=key, description=told.sentence
    )
    create_image_artifact(image, key=f"{key}-plot", description=f"Simulated runs of {told.question.job}")
