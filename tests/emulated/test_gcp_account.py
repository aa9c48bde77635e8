"""What an account of Google Cloud says about itself: its configuration, offers, prices and examination."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from holdfast.drivers.gcp import GcpConfig
from holdfast.drivers.gcp.catalogue import CURATED
from holdfast.drivers.gcp.prices import Kind, SkuPrices
from holdfast.drivers.protocol import CapacityPool, Finding, Offer
from holdfast.errors import ConfigError
from tests.emulated.gce import ZONES, GceEmulator
from tests.emulated.test_gcp_launch import SPOT, asked

IOWA, NETHERLANDS = "us-central1", "europe-west4"


@pytest.fixture
def gce(tmp_path: Path) -> Iterator[GceEmulator]:
    with GceEmulator(tmp_path / "gce") as emulator:
        yield emulator


def pool(zone: str, machine_type: str, model: Any = "spot") -> CapacityPool:
    return CapacityPool("gcp", zone.rpartition("-")[0], zone, machine_type, model)


def offers(gce: GceEmulator, **config: Any) -> dict[CapacityPool, Offer]:
    return {offer.pool: offer for offer in gce.driver(**config).offers()}


def examined(gce: GceEmulator, **config: Any) -> dict[str, Finding]:
    return {finding.subject: finding for finding in gce.driver(**config).examine()}


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"project": "Bad Project"}, "project"),
        ({"regions": []}, "regions"),
        ({"regions": ["us-central1-a"]}, "'us-central1-a' is no region's name"),
        ({"zones": ["europe-west1-b"]}, "lies in none of the regions"),
        ({"machine_types": []}, "machine_types is empty"),
        ({"gpus": {"n2-standard-2": {"type": "nvidia-tesla-t4", "count": 1}}}, "only N1 does"),
        ({"image": "pytorch-latest"}, "is no image's path"),
        ({"api_endpoint": "compute.internal"}, "begin it with https://"),
        ({"preemption_notice_seconds": 60}, "0 or 120"),
        ({"usd_per_hour": {"n2-standard-2": {"spot": 0, "on_demand": 1}}}, "greater than 0"),
        ({"machine_type": ["n2-standard-2"]}, "machine_type"),
    ],
)
def test_a_mistake_in_the_account_is_named_with_its_remedy(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GcpConfig(**{"project": "a-project", "regions": [IOWA], **changes})


def test_the_shortest_account_is_a_project_and_a_region() -> None:
    config = GcpConfig(project="a-project", regions=[IOWA])
    assert config.machine_types == list(CURATED) and not config.zones and not config.api_endpoint


# -- offers and prices ------------------------------------------------------------------------------------------------


def test_offers_are_of_every_zone_and_type_with_the_catalogue_s_prices(gce: GceEmulator) -> None:
    found = offers(gce)
    assert {offer.zone for offer in found} == {zone for zones in ZONES.values() for zone in zones}
    n2 = found[pool("us-central1-a", "n2-standard-2")]
    assert (n2.vcpus, n2.memory_gib, n2.gpus) == (2, 8.0, 0)
    assert n2.usd_per_hour == pytest.approx(2 * 0.009483 + 8 * 0.001271)
    assert n2.on_demand_usd_per_hour == pytest.approx(2 * 0.031611 + 8 * 0.004237)
    l4 = found[pool("europe-west4-b", "g2-standard-4", "on-demand")]
    assert (l4.gpus, l4.gpu_name) == (1, "L4")
    assert l4.usd_per_hour == pytest.approx(1.1 * (4 * 0.024988 + 16 * 0.002927 + 0.560040))
    a100 = found[pool("us-central1-b", "a2-highgpu-1g")]
    assert (a100.gpus, a100.gpu_name) == (1, "A100") and a100.interruptions_per_hour > n2.interruptions_per_hour > 0
    assert found[pool("us-central1-b", "a2-highgpu-1g", "on-demand")].interruptions_per_hour == 0


def test_attached_gpus_are_part_of_the_offer_and_of_its_price(gce: GceEmulator) -> None:
    gpus = {"n1-standard-4": {"type": "nvidia-tesla-t4", "count": 2}}
    found = offers(gce, machine_types=["n1-standard-4"], gpus=gpus)
    t4 = found[pool("us-central1-a", "n1-standard-4", "on-demand")]
    assert (t4.gpus, t4.gpu_name) == (2, "T4")
    assert t4.usd_per_hour == pytest.approx(4 * 0.031611 + 15 * 0.004237 + 2 * 0.35)


def test_zones_and_prices_of_the_account_go_first(gce: GceEmulator) -> None:
    price = {"n2-standard-2": {"spot": 0.5, "on_demand": 0.75}}
    found = offers(gce, zones=["us-central1-b"], machine_types=["n2-standard-2"], usd_per_hour=price)
    assert {offer.zone for offer in found} == {"us-central1-b"}
    assert sorted(offer.usd_per_hour for offer in found.values()) == [0.5, 0.75]


def test_without_the_catalogue_the_shipped_prices_hold_and_the_examination_says_so(gce: GceEmulator) -> None:
    gce.billing_answers = False
    found = offers(gce)
    listed = CURATED["g2-standard-4"]
    assert found[pool("us-central1-a", "g2-standard-4")].usd_per_hour == listed.spot_usd_per_hour
    finding = examined(gce)["prices"]
    assert finding.ok and "2026-11-01" in finding.detail and "Cloud Billing API" in finding.detail


def test_offers_are_asked_for_once_a_day_whoever_asks(gce: GceEmulator) -> None:
    driver = gce.driver()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: len(driver.offers()), range(8)))
    assert set(found) == {5 * 4 * 2}
    pages = gce.calls["cloudbilling.skus.list"]
    driver.offers()
    assert gce.calls["machineTypes.aggregatedList"] == 1 and gce.calls["cloudbilling.skus.list"] == pages > 1


def test_the_cloud_s_own_advice_is_in_the_rate_and_told_in_words(gce: GceEmulator) -> None:
    plain = offers(gce)
    gce.advice = {
        ("n2-standard-2", "us-central1-a"): (0.85, "172800s"),
        ("n2-standard-2", "us-central1-b"): (0.2, "1800s"),
    }
    found = offers(gce)
    steady, shaky = (found[pool(f"us-central1-{zone}", "n2-standard-2")] for zone in "ab")
    assert steady.interruptions_per_hour < plain[steady.pool].interruptions_per_hour < shaky.interruptions_per_hour
    assert steady.capacity_advice == "capacity advice 0.85 of 1, most last 48 h"
    silent = found[pool("us-central1-b", "g2-standard-4")]
    assert silent.capacity_advice == "" and silent.interruptions_per_hour == plain[silent.pool].interruptions_per_hour
    assert found[pool("us-central1-a", "n2-standard-2", "on-demand")].capacity_advice == ""


def test_advice_that_is_refused_is_asked_for_once_an_hour_and_changes_nothing(gce: GceEmulator) -> None:
    driver = gce.driver()
    before = gce.calls["advice.capacity"]
    assert [offer.capacity_advice for offer in driver.offers() if offer.capacity_advice] == []
    finding = examined(gce)["capacity advice"]
    assert finding.ok and finding.detail.startswith("not used: ") and "compute.advice.capacity" in finding.detail
    before += 1  # the examination's own
    driver.offers()
    assert gce.calls["advice.capacity"] == before + 1


def test_a_price_s_history_is_the_price(gce: GceEmulator) -> None:
    driver = gce.driver()
    now = driver.clock.now()
    (point,) = driver.price_history(SPOT, now - timedelta(hours=3), now)
    assert point.at == now - timedelta(hours=3) and point.usd_per_hour == offers(gce)[SPOT].usd_per_hour
    with pytest.raises(ConfigError, match="no-such"):
        driver.price_history(pool("us-central1-a", "no-such"), now, now)


@pytest.mark.parametrize(
    ("description", "usage", "what"),
    [
        ("C3 Instance Core running in Americas", "OnDemand", ("core", "c3", "r", "on-demand")),
        ("Spot Preemptible C3 Instance Ram running in Iowa", "Preemptible", ("ram", "c3", "r", "spot")),
        ("C2D AMD Instance Core running in Iowa", "OnDemand", ("core", "c2d", "r", "on-demand")),
        ("N1 Predefined Instance Ram running in Iowa", "OnDemand", ("ram", "n1", "r", "on-demand")),
        ("A3Plus Instance Core running in Iowa", "OnDemand", ("core", "a3-megagpu", "r", "on-demand")),
        ("Nvidia Tesla A100 80GB GPU running in Iowa", "OnDemand", ("gpu", "nvidia-a100-80gb", "r", "on-demand")),
        (
            "Nvidia L4 GPU attached to Spot Preemptible VMs running in Iowa",
            "Preemptible",
            ("gpu", "nvidia-l4", "r", "spot"),
        ),
        ("N2 Custom Instance Core running in Iowa", "OnDemand", None),
        ("N2 Instance Core running in Iowa", "Commit1Yr", None),
        ("Reserved Nvidia L4 GPU running in Iowa", "OnDemand", None),
    ],
)
def test_the_catalogue_s_descriptions_are_read(description: str, usage: str, what: Any) -> None:
    prices = SkuPrices()
    rate = {"unitPrice": {"units": "1", "nanos": 500_000_000}}
    prices.add(
        {
            "description": description,
            "category": {"usageType": usage},
            "serviceRegions": ["r"],
            "pricingInfo": [{"pricingExpression": {"tieredRates": [{"unitPrice": {"units": "0"}}, rate]}}],
        }
    )
    assert prices.of == ({what: 1.5} if what else {})


def test_a_machine_with_a_part_that_has_no_price_has_none() -> None:
    prices = SkuPrices()
    prices.of["core", "n2", "r", "spot"] = 0.01
    assert prices.usd_per_hour(Kind("n2-standard-2", "r-a", 2, 8), "r", "spot") is None


# -- examination ------------------------------------------------------------------------------------------------------


def test_a_good_account_is_told_line_by_line(gce: GceEmulator) -> None:
    found = examined(gce)
    assert list(found) == [
        "credentials",
        "permissions",
        "image",
        "network",
        f"quota {IOWA}",
        f"quota {NETHERLANDS}",
        "prices",
        "capacity advice",
    ]
    assert all(finding.ok for finding in found.values())
    assert "PREEMPTIBLE_CPUS 0 of 1000" in found[f"quota {IOWA}"].detail
    assert "pytorch-test-v20261101 (50 GiB)" in found["image"].detail
    assert "cheapest: us-central1-a/n2-standard-2/spot at $0.0291 per hour" in found["prices"].detail


def test_what_is_in_use_counts_against_the_quota(gce: GceEmulator) -> None:
    gce.limits[IOWA, "PREEMPTIBLE_CPUS"] = 2.0
    gce.limits[IOWA, "CPUS"] = 0.0
    gce.driver().launch(asked())
    finding = examined(gce)[f"quota {IOWA}"]
    assert not finding.ok and "PREEMPTIBLE_CPUS 2 of 2" in finding.detail and "ask for more" in finding.detail


def test_what_is_missing_is_named_and_nothing_is_raised(gce: GceEmulator) -> None:
    gce.denied |= {"compute.instances.create", "compute.images.getFromFamily"}
    found = examined(gce, network="no-such", machine_types=["n9-standard-1"])
    assert (
        not found["permissions"].ok
        and "missing: compute.images.getFromFamily, compute.instances.create" in found["permissions"].detail
    )
    assert not found["image"].ok and "compute.images.getFromFamily" in found["image"].detail
    assert not found["network"].ok and "no-such" in found["network"].detail
    assert not found["prices"].ok and "machine_types" in found["prices"].detail
    assert found["credentials"].ok


def test_refused_credentials_are_found_first(gce: GceEmulator) -> None:
    gce.expired = True
    found = examined(gce)
    assert not found["credentials"].ok and "renew" in found["credentials"].detail
    assert not any(finding.ok for finding in found.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"project": "another-project"}, "another-project"),
        ({"image": "projects/p/global/images/family/none"}, "family/none"),
    ],
)
def test_a_check_names_what_is_not_there(gce: GceEmulator, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gce.driver(**changes).check()
    gce.driver().check()
    gce.driver(image="projects/own/global/images/mine").check()
