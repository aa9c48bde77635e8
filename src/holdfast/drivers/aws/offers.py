"""What EC2 offers now and at which price, and what it cost before."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from holdfast.drivers.aws.account import Account
from holdfast.drivers.aws.cached import Cached
from holdfast.drivers.aws.places import Places
from holdfast.drivers.aws.prices import Prices
from holdfast.drivers.protocol import CapacityPool, Offer, PricePoint
from holdfast.errors import ConfigError, HoldfastError, TransientError

log = logging.getLogger(__name__)

SPOT_SECONDS = 300.0
DAY = 24 * 3600.0
SCORE_SECONDS = 3600.0
PRODUCTS = ["Linux/UNIX"]


@dataclass(frozen=True, slots=True)
class InstanceType:
    name: str
    vcpus: int
    memory_gib: float
    gpus: int
    gpu_name: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Spot placement scores by (region, zone id, has GPUs): 10 is the best, 1 the worst."""

    by_zone: dict[tuple[str, str, bool], int]
    refusal: str = ""


def interruptions_per_hour(kind: InstanceType, score: int | None) -> float:
    """A prior, until a run has history of its own; expected per running hour.

    Small CPU machines 0.02, one GPU 0.06, several 0.1, a whole host of eight 0.15: the Spot Instance Advisor's bands (less
    than 5 % to more than 20 % of machines a month: https://aws.amazon.com/ec2/spot/instance-advisor/) are for machines that
    mostly end by themselves within hours, and are no better known. A placement score of 10 halves it, of 1 doubles it.
    """
    base = 0.02 if kind.gpus == 0 else 0.06 if kind.gpus == 1 else 0.1 if kind.gpus < 8 else 0.15
    return round(base * 2 ** ((5.5 - score) / 4.5), 4) if score else base


class Market:
    def __init__(self, account: Account, places: Places) -> None:
        self._account = account
        self._config = account.config
        self._places = places
        self.prices = Prices(account)
        self._types: Cached[str, dict[str, InstanceType]] = Cached(self._ask_types, DAY)
        self._offered: Cached[str, dict[str, set[str]]] = Cached(self._ask_offered, DAY)
        self._spot: Cached[str, dict[tuple[str, str], float]] = Cached(self._ask_spot, SPOT_SECONDS)
        self._zone_ids: Cached[str, dict[str, str]] = Cached(self._ask_zone_ids, DAY)
        self._scores: Cached[str, Scores] = Cached(self._ask_scores, SCORE_SECONDS)

    def offers(self) -> list[Offer]:
        return [offer for region in self._config.regions for offer in self._offers_of(region)]

    def offered_types(self, region: str) -> set[str]:
        """Of the account's instance types, those that some zone of `region` has."""
        return set().union(*self._offered.get(region).values())

    def scores(self) -> Scores:
        return self._scores.get("")

    def max_usd_per_hour(self, pool: CapacityPool) -> float | None:
        """What a spot machine may cost at most; None: the on-demand price, which EC2 takes by itself."""
        share = self._config.max_spot_price_share
        if share is None or pool.provisioning_model == "on-demand":
            return None
        on_demand = self.prices.on_demand(pool.region).usd_per_hour.get(pool.instance_type)
        if on_demand is None:
            raise ConfigError(
                f"aws account: max_spot_price_share is {share:g}, and the on-demand price of {pool.instance_type!r} in "
                f"{pool.region} is not known; add it to usd_per_hour"
            )
        return share * on_demand

    def history(self, pool: CapacityPool, start: datetime, end: datetime) -> list[PricePoint]:
        """EC2 keeps 90 days of spot prices; before them, the oldest that is known counts."""
        if pool.provisioning_model == "on-demand":
            usd = self.prices.on_demand(pool.region).usd_per_hour.get(pool.instance_type)
            if usd is None:
                raise ConfigError(
                    f"aws account: the on-demand price of {pool.instance_type!r} in {pool.region} is not known; add it to "
                    "usd_per_hour"
                )
            return [PricePoint(at=start, usd_per_hour=usd)]
        asked = {
            "InstanceTypes": [pool.instance_type],
            "AvailabilityZone": pool.zone,
            "ProductDescriptions": PRODUCTS,
            "StartTime": start,
            "EndTime": end,
        }
        with self._account.calling("ec2", pool):
            found = sorted(
                {
                    (one["Timestamp"].astimezone(UTC), float(one["SpotPrice"]))
                    for one in self._spot_pages(pool.region, asked)
                }
            )
        if not found:
            raise TransientError(f"EC2 has no spot prices for {pool} from {start} to {end}")
        points = [PricePoint(at=at, usd_per_hour=usd) for at, usd in found]
        before = [point for point in points if point.at <= start]
        first = before[-1] if before else PricePoint(at=start, usd_per_hour=points[0].usd_per_hour)
        return [first, *(point for point in points if start < point.at <= end)]

    # -----------------------------------------------------------------------------------------------------------------

    def _offers_of(self, region: str) -> Iterator[Offer]:
        types, offered = self._types.get(region), self._offered.get(region)
        spot, on_demand = self._spot.get(region), self.prices.on_demand(region).usd_per_hour
        scores, zone_ids = self.scores().by_zone, self._zone_ids.get(region)
        for zone in self._places.subnets(region):
            for name in self._config.instance_types:
                kind, full = types.get(name), on_demand.get(name)
                if kind is None or full is None or name not in offered.get(zone, ()):
                    continue
                common: dict[str, Any] = {
                    "on_demand_usd_per_hour": full,
                    "vcpus": kind.vcpus,
                    "memory_gib": kind.memory_gib,
                    "gpus": kind.gpus,
                    "gpu_name": kind.gpu_name,
                }
                if (zone, name) in spot:
                    score = scores.get((region, zone_ids.get(zone, ""), kind.gpus > 0))
                    yield Offer(
                        pool=CapacityPool("aws", region, zone, name, "spot"),
                        usd_per_hour=spot[zone, name],
                        interruptions_per_hour=interruptions_per_hour(kind, score),
                        capacity_advice=f"placement score {score} of 10" if score else "",
                        **common,
                    )
                yield Offer(pool=CapacityPool("aws", region, zone, name, "on-demand"), usd_per_hour=full, **common)

    def _ask_types(self, region: str) -> dict[str, InstanceType]:
        # By filter, not by name: a name that the region does not have would fail the call for all of them.
        filters = [{"Name": "instance-type", "Values": self._config.instance_types}]
        with self._account.calling("ec2"):
            pages = (
                self._account.client("ec2", region).get_paginator("describe_instance_types").paginate(Filters=filters)
            )
            found = [kind for page in pages for kind in page["InstanceTypes"]]
        return {kind["InstanceType"]: _instance_type(kind) for kind in found}

    def _ask_offered(self, region: str) -> dict[str, set[str]]:
        filters = [{"Name": "instance-type", "Values": self._config.instance_types}]
        with self._account.calling("ec2"):
            paginator = self._account.client("ec2", region).get_paginator("describe_instance_type_offerings")
            pages = paginator.paginate(LocationType="availability-zone", Filters=filters)
            found = [offering for page in pages for offering in page["InstanceTypeOfferings"]]
        zones: dict[str, set[str]] = {}
        for offering in found:
            zones.setdefault(offering["Location"], set()).add(offering["InstanceType"])
        return zones

    def _ask_spot(self, region: str) -> dict[tuple[str, str], float]:
        asked = {
            "InstanceTypes": self._config.instance_types,
            "ProductDescriptions": PRODUCTS,
            # EC2 answers with the price that held then and every later one. Not quite now: clocks differ.
            "StartTime": datetime.now(UTC) - timedelta(minutes=5),
        }
        newest: dict[tuple[str, str], tuple[datetime, float]] = {}
        with self._account.calling("ec2"):
            for one in self._spot_pages(region, asked):
                key = (one["AvailabilityZone"], one["InstanceType"])
                if key not in newest or newest[key][0] < one["Timestamp"]:
                    newest[key] = (one["Timestamp"], float(one["SpotPrice"]))
        return {key: usd for key, (_, usd) in newest.items()}

    def _spot_pages(self, region: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
        paginator = self._account.client("ec2", region).get_paginator("describe_spot_price_history")
        return [one for page in paginator.paginate(**asked) for one in page["SpotPriceHistory"]]

    def _ask_zone_ids(self, region: str) -> dict[str, str]:
        with self._account.calling("ec2"):
            answer = self._account.client("ec2", region).describe_availability_zones()
        return {zone["ZoneName"]: zone["ZoneId"] for zone in answer["AvailabilityZones"]}

    def _ask_scores(self, _: str) -> Scores:
        """Two questions, CPU and GPU: an account may ask only so many different ones in a day."""
        found: dict[tuple[str, str, bool], int] = {}
        try:
            types = {name: kind for region in self._config.regions for name, kind in self._types.get(region).items()}
            for has_gpus in (False, True):
                names = sorted(name for name, kind in types.items() if (kind.gpus > 0) == has_gpus)
                if not names:
                    continue
                with self._account.calling("ec2"):
                    answer = self._account.client("ec2", self._config.regions[0]).get_spot_placement_scores(
                        InstanceTypes=names,
                        TargetCapacity=1,
                        SingleAvailabilityZone=True,
                        RegionNames=self._config.regions,
                    )
                for score in answer["SpotPlacementScores"]:
                    found[score["Region"], score["AvailabilityZoneId"], has_gpus] = score["Score"]
        except HoldfastError as error:
            log.info("there are no spot placement scores: %s", error)
            return Scores(found, str(error))
        return Scores(found)


def _instance_type(kind: dict[str, Any]) -> InstanceType:
    gpus = kind.get("GpuInfo", {}).get("Gpus", [])
    return InstanceType(
        name=kind["InstanceType"],
        vcpus=kind["VCpuInfo"]["DefaultVCpus"],
        memory_gib=kind["MemoryInfo"]["SizeInMiB"] / 1024,
        gpus=sum(gpu.get("Count", 0) for gpu in gpus),
        gpu_name=gpus[0].get("Name", "") if gpus else "",
    )
