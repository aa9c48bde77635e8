"""What moving checkpoints between regions and clouds costs: an estimate, beside the bill and not in it."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from holdfast.ledger.billing import round_usd
from holdfast.ledger.run_state import Attempt

CLOUD_OF_SCHEME = {"s3": "aws", "gs": "gcp"}
# First tier of the list prices, dollars per decimal GB that leaves, November 2026; bulk discounts and free tiers left out.
# https://aws.amazon.com/ec2/pricing/on-demand/#Data_Transfer, https://cloud.google.com/vpc/network-pricing
TO_ANOTHER_REGION_USD_PER_GB = {"aws": 0.02, "gcp": 0.02}
TO_ANOTHER_CLOUD_USD_PER_GB = {"aws": 0.09, "gcp": 0.12}


@dataclass(frozen=True, slots=True)
class Place:
    cloud: str
    """Empty: a folder, whose traffic nobody bills."""
    region: str
    """Empty: not known, taken for the machine's own."""


def place_of_store(url: str) -> Place:
    """Where a store is, as far as its URL says."""
    parts = urlsplit(url)
    return Place(CLOUD_OF_SCHEME.get(parts.scheme, ""), parse_qs(parts.query).get("region", [""])[0])


def egress_usd(attempt: Attempt, store: Place) -> float:
    """Commits leave the machine's region, a resumed checkpoint leaves the store's; each pays where it leaves."""
    size_gb = attempt.report.get("bytes_per_commit", 0) / 1e9
    machine = Place(attempt.pool.cloud, attempt.pool.region)
    written = size_gb * attempt.report.get("commits", 0)
    read = size_gb if attempt.resumed_step else 0.0
    return round_usd(written * _usd_per_gb(machine, store) + read * _usd_per_gb(store, machine))


def _usd_per_gb(source: Place, target: Place) -> float:
    if not source.cloud or not target.cloud or source.cloud not in TO_ANOTHER_CLOUD_USD_PER_GB:
        return 0.0
    if source.cloud != target.cloud:
        return TO_ANOTHER_CLOUD_USD_PER_GB[source.cloud]
    elsewhere = source.region and target.region and source.region != target.region
    return TO_ANOTHER_REGION_USD_PER_GB[source.cloud] if elsewhere else 0.0
