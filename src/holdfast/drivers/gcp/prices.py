"""Offers: machine types from Compute Engine, prices from the billing catalogue.

https://cloud.google.com/billing/docs/reference/rest/v1/services.skus/list
"""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from holdfast.clock import Clock
from holdfast.drivers.gcp.advice import AllAdvice, Wanted, read_advice
from holdfast.drivers.gcp.api import PAGE, ComputeApi
from holdfast.drivers.gcp.catalogue import (
    CURATED,
    PRICED_ON,
    PRICED_REGION,
    gpu_name,
    typical_interruptions_per_hour,
)
from holdfast.drivers.gcp.config import region_of
from holdfast.drivers.protocol import CapacityPool, Offer, ProvisioningModel
from holdfast.errors import ConfigError, HoldfastError

if TYPE_CHECKING:
    from google.cloud import compute_v1

log = logging.getLogger(__name__)

COMPUTE_ENGINE_SERVICE = "6F81-5844-456A"
FRESH = timedelta(hours=24)
"""The catalogue changes at most once a day."""
TRY_AGAIN = timedelta(minutes=15)
ADVICE_FRESH = timedelta(hours=1)
LOCAL_SSD_HOURS_A_MONTH = 730

Resource = Literal["core", "ram", "gpu"]
# "Spot Preemptible N2 Instance Core running in Americas", "N2 Instance Ram running in Belgium"
CORE_OR_RAM = re.compile(r"^(?:Spot Preemptible )?(.+?) (?:Predefined )?(?:Instance )?(Core|Ram) running in", re.I)
# "Nvidia L4 GPU running in Iowa", "Nvidia Tesla A100 80GB GPU attached to Spot Preemptible VMs running in Iowa"
GPU = re.compile(r"^(Nvidia .+?) GPU (?:running|attached to Spot Preemptible VMs running) in", re.I)
LOCAL_SSD = re.compile(r"^SSD backed Local Storage", re.I)
NOT_A_MACHINE = re.compile(r"Sole Tenancy|Reserved|Custom|Commitment|suspended|DWS|Calendar|Premium", re.I)
GPU_SKUS = {
    "nvidia-tesla-a100-80gb": "nvidia-a100-80gb",
    "nvidia-h100-80gb-mega": "nvidia-h100-mega-80gb",
    "nvidia-h100-80gb-plus": "nvidia-h100-mega-80gb",
    "nvidia-h200-141gb-vm": "nvidia-h200-141gb",
}
FAMILIES = {"a3plus": "a3-megagpu", "compute optimized": "c2", "memory-optimized": "m1"}


@dataclass(frozen=True, slots=True)
class Kind:
    """A machine type in a zone, attached GPUs included."""

    name: str
    zone: str
    vcpus: int
    memory_gib: float
    accelerator: str = ""
    gpus: int = 0
    local_ssds: int = 0


@dataclass
class SkuPrices:
    """Dollars per hour of one core, GiB, GPU or GiB of local SSD, by (family or accelerator, region, model)."""

    of: dict[tuple[Resource, str, str, ProvisioningModel], float] = field(default_factory=dict)
    local_ssd_gib: dict[tuple[str, ProvisioningModel], float] = field(default_factory=dict)

    def add(self, sku: Mapping[str, Any]) -> None:
        category = sku.get("category", {})
        model = {"OnDemand": "on-demand", "Preemptible": "spot"}.get(category.get("usageType", ""))
        description = sku.get("description", "")
        usd = _usd(sku)
        if model is None or usd is None or NOT_A_MACHINE.search(description):
            return
        regions = sku.get("serviceRegions", [])
        if LOCAL_SSD.match(description):
            self.local_ssd_gib |= {(region, model): usd / LOCAL_SSD_HOURS_A_MONTH for region in regions}  # type: ignore[misc]
        elif found := GPU.match(description):
            accelerator = found[1].lower().replace(" ", "-")
            self._set("gpu", GPU_SKUS.get(accelerator, accelerator), regions, model, usd)
        elif found := CORE_OR_RAM.match(description):
            self._set("core" if found[2].lower() == "core" else "ram", _family(found[1]), regions, model, usd)

    def _set(self, resource: Resource, what: str, regions: Iterable[str], model: Any, usd: float) -> None:
        for region in regions:
            self.of[resource, what, region, model] = usd

    def usd_per_hour(self, kind: Kind, region: str, model: ProvisioningModel) -> float | None:
        """None when one of its parts has no price."""
        family = "a3-megagpu" if kind.name.startswith("a3-megagpu") else kind.name.partition("-")[0]
        parts = [
            (kind.vcpus, self.of.get(("core", family, region, model))),
            (kind.memory_gib, self.of.get(("ram", family, region, model))),
            (kind.gpus, self.of.get(("gpu", kind.accelerator, region, model)) if kind.gpus else 0.0),
            (kind.local_ssds * 375, self.local_ssd_gib.get((region, model)) if kind.local_ssds else 0.0),
        ]
        total = 0.0
        for amount, usd in parts:
            if usd is None:
                return None
            total += amount * usd
        return round(total, 6)


class Market:
    """What machines cost. Asked for once a day; thread-safe."""

    def __init__(self, api: ComputeApi, clock: Clock) -> None:
        self._api, self._clock = api, clock
        self._lock = threading.Lock()
        self._offers: list[Offer] = []
        self._read_at: datetime | None = None
        self.advice = AllAdvice()
        self._advised_at: datetime | None = None
        self._wanted: list[Wanted] = []
        self.source = ""
        """Where the prices come from, in words."""
        self.live = False

    def offers(self, zones: Sequence[str]) -> list[Offer]:
        with self._lock:
            age = self._clock.now() - self._read_at if self._read_at else FRESH
            if age >= (FRESH if self.live else TRY_AGAIN):
                self._offers = self._read(zones)
                self._read_at = self._clock.now()
            return [self._advised(offer) for offer in self._offers]

    def usd_per_hour(self, pool: CapacityPool, zones: Sequence[str]) -> float:
        """Raises ConfigError for a pool that the account does not offer."""
        for offer in self.offers(zones):
            if offer.pool == pool:
                return offer.usd_per_hour
        raise ConfigError(
            f"the account offers no {pool.instance_type!r} in {pool.zone!r}; add it to machine_types and zones"
        )

    def _advised(self, offer: Offer) -> Offer:
        """With what the cloud says of its capacity just now, where it says something."""
        if self._advised_at is None or self._clock.now() - self._advised_at >= ADVICE_FRESH:
            self.advice = read_advice(self._api, self._wanted)
            self._advised_at = self._clock.now()
        advice = self.advice.of.get((offer.pool.instance_type, offer.pool.zone))
        if advice is None or offer.pool.provisioning_model != "spot":
            return offer
        rate = round(advice.interruptions_per_hour(offer.interruptions_per_hour), 4)
        return dataclasses.replace(offer, interruptions_per_hour=rate, capacity_advice=advice.words)

    def _read(self, zones: Sequence[str]) -> list[Offer]:
        prices = self._prices()
        offers, unpriced = [], set()
        kinds = self._kinds(zones)
        self._wanted = [Wanted(kind.name, kind.zone, kind.accelerator, kind.gpus) for kind in kinds]
        for kind in kinds:
            region = region_of(kind.zone)
            usd: dict[ProvisioningModel, float | None] = {}
            for model in ("spot", "on-demand"):
                usd[model] = self._price(kind, region, model, prices)  # type: ignore[index, arg-type]
            if usd["spot"] is None or usd["on-demand"] is None:
                unpriced.add(f"{kind.name} in {region}")
                continue
            for model, price in usd.items():
                assert price
                offers.append(
                    Offer(
                        pool=CapacityPool("gcp", region, kind.zone, kind.name, model),
                        usd_per_hour=price,
                        on_demand_usd_per_hour=usd["on-demand"],
                        vcpus=kind.vcpus,
                        memory_gib=kind.memory_gib,
                        gpus=kind.gpus,
                        gpu_name=gpu_name(kind.accelerator) if kind.gpus else "",
                        interruptions_per_hour=typical_interruptions_per_hour(kind.gpus) if model == "spot" else 0.0,
                    )
                )
        if unpriced:
            log.warning("not offered, for want of a price (set usd_per_hour): %s", ", ".join(sorted(unpriced)))
        return offers

    def _price(self, kind: Kind, region: str, model: ProvisioningModel, prices: SkuPrices | None) -> float | None:
        if override := self._api.config.usd_per_hour.get(kind.name):
            return override.spot if model == "spot" else override.on_demand
        if prices and (usd := prices.usd_per_hour(kind, region, model)) is not None:
            return usd
        if (listed := CURATED.get(kind.name)) and listed.gpus == kind.gpus:
            return listed.spot_usd_per_hour if model == "spot" else listed.on_demand_usd_per_hour
        return None

    def _kinds(self, zones: Sequence[str]) -> list[Kind]:
        doing, permission = "listing machine types", "compute.machineTypes.list"
        wanted, config = set(zones), self._api.config
        pager = self._api.call(
            self._api.machine_types.aggregated_list,
            doing,
            permission,
            project=self._api.project,
            filter=" OR ".join(f'(name = "{name}")' for name in dict.fromkeys(config.machine_types)),
            max_results=PAGE,
        )
        kinds = []
        for scope, scoped in self._api.pages(pager, doing, permission):
            zone = scope.rpartition("/")[2]
            if zone in wanted:
                kinds += [self._kind(found, zone) for found in scoped.machine_types]
        return sorted(kinds, key=lambda kind: (kind.zone, config.machine_types.index(kind.name)))

    def _kind(self, found: compute_v1.MachineType, zone: str) -> Kind:
        attached = self._api.config.gpus.get(found.name)
        own = found.accelerators[0] if found.accelerators else None
        return Kind(
            name=found.name,
            zone=zone,
            vcpus=found.guest_cpus,
            memory_gib=round(found.memory_mb / 1024, 2),
            accelerator=own.guest_accelerator_type if own else attached.type if attached else "",
            gpus=own.guest_accelerator_count if own else attached.count if attached else 0,
            local_ssds=found.bundled_local_ssds.partition_count,
        )

    def _prices(self) -> SkuPrices | None:
        prices, count = SkuPrices(), 0
        parameters: dict[str, Any] = {"currencyCode": "USD", "pageSize": 5000}
        try:
            while True:
                answer = self._api.json(
                    "GET",
                    "cloudbilling",
                    f"v1/services/{COMPUTE_ENGINE_SERVICE}/skus",
                    "reading the billing catalogue",
                    params=parameters,
                )
                for sku in answer.get("skus", []):
                    count += 1
                    prices.add(sku)
                if not answer.get("nextPageToken"):
                    break
                parameters["pageToken"] = answer["nextPageToken"]
        except HoldfastError as error:
            self.live = False
            self.source = f"the table of {PRICED_ON} that Holdfast ships ({PRICED_REGION}): the billing catalogue can't be read: {error}"
            log.warning("prices are %s", self.source)
            return None
        self.live = True
        self.source = f"the billing catalogue ({count} entries), read at {self._clock.now():%Y-%m-%d %H:%M} UTC"
        return prices


def _family(words: str) -> str:
    words = words.lower().removesuffix(" instance").removesuffix(" amd").removesuffix(" arm").removesuffix(" instance")
    return FAMILIES.get(words, words.split()[0] if words else "")


def _usd(sku: Mapping[str, Any]) -> float | None:
    """Of the newest price, the tier that is not free."""
    for info in reversed(sku.get("pricingInfo", [])):
        rates = info.get("pricingExpression", {}).get("tieredRates", [])
        for rate in reversed(rates):
            price = rate.get("unitPrice", {})
            return int(price.get("units", 0) or 0) + int(price.get("nanos", 0) or 0) / 1e9
    return None
