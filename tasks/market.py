"""What the market offers for a job, and what of it is worth knowing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from holdfast.drivers.protocol import CapacityPool, Driver, PricePoint
from holdfast.errors import HoldfastError
from holdfast.ledger.profiles import read_profile
from holdfast.market.exporting import to_cloudwatch, to_google
from holdfast.market.history import History
from holdfast.market.informed import HORIZON
from holdfast.market.monitor import WINDOW, Judgement, judge, read_judgement, write_judgement
from holdfast.market.table import Row, offers_table
from holdfast.market.traces import read_traces
from holdfast.model import Resources
from holdfast.runtime.contract import store_tag
from holdfast.storage import ObjectStore
from holdfast.supervision.preflight import fitting_offers
from tasks.placement import API_RETRIES

log = logging.getLogger(__name__)

PRICED_POOLS, PRICE_DAYS = 5, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What pools are looked for."""

    resources: Resources
    job: str = ""
    """Name of the job whose measured step times count; empty: useful hours are priced."""
    traces: Path | None = None
    records_per_second: float | None = None


def find_offers(driver: Driver, store: ObjectStore, wanted: Wanted) -> list[Row]:
    """Raises ConfigError where nothing fits, TransientError when neither cloud nor store answers."""
    now = driver.clock.now()
    profile = read_profile(store, wanted.job) if wanted.job else None
    return offers_table(
        fitting_offers(wanted.resources, driver.offers()),
        now,
        lives=History(store).lives(now - HORIZON),
        judgement=read_judgement(store, now),
        traces=read_traces(wanted.traces) if wanted.traces else (),
        measured={one.instance_type: one for one in profile.measurements} if profile else {},
        records_per_second=wanted.records_per_second,
    )


@task(cache_policy=NO_CACHE, **API_RETRIES)
def rank_offers(driver: Driver, store: ObjectStore, wanted: Wanted) -> list[Row]:
    return find_offers(driver, store, wanted)


def price_histories(driver: Driver, rows: Sequence[Row]) -> Mapping[str, Sequence[PricePoint]]:
    """Spot prices of the first pools in the last days, by a label; without those that the cloud does not tell."""
    now = driver.clock.now()
    found: dict[str, Sequence[PricePoint]] = {}
    for row in rows[:PRICED_POOLS]:
        if row.spot_usd_per_hour is None:
            continue
        pool = CapacityPool(row.cloud, row.region, row.zone, row.instance_type, "spot")
        try:
            points = list(driver.price_history(pool, now - timedelta(days=PRICE_DAYS), now))
        except HoldfastError as error:
            log.info("no price history of %s: %s", pool, error)
            continue
        found[f"{row.zone} {row.instance_type}"] = [*points, PricePoint(at=now, usd_per_hour=points[-1].usd_per_hour)]
    return found


@task(cache_policy=NO_CACHE, **API_RETRIES)
def judge_market(driver: Driver, store: ObjectStore) -> tuple[Judgement, Judgement]:
    """The judgement before, and the new one, which runs read from now on."""
    now = driver.clock.now()
    before = read_judgement(store, now)
    living = driver.machines({"holdfast-store": store_tag(store.url)})
    after = judge(History(store).lives(now - WINDOW), living, now)
    write_judgement(store, after)
    return before, after


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10)
def export_to_cloudwatch(judgement: Judgement, region: str) -> None:
    import boto3

    to_cloudwatch(judgement, boto3.client("cloudwatch", region_name=region))


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=10)
def export_to_google(judgement: Judgement, project: str) -> None:
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/monitoring.write"])
    to_google(judgement, AuthorizedSession(credentials), project)
