"""Which machine types there are at all: from the shipped snapshot, or from one made by gpuhunt."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import gpuhunt
import pytest

from holdfast.drivers.aws.prices import TABLE
from holdfast.drivers.gcp.catalogue import CURATED
from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.errors import ConfigError, TransientError
from holdfast.market import catalogue
from holdfast.market.catalogue import fitting, hint, parse_gpus, read_catalogue, refresh
from holdfast.model import Resources
from holdfast.supervision.preflight import fitting_offers

TODAY = date(2026, 11, 25)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_shipped_has_every_type_that_the_drivers_price_at_their_price():
    shipped = {one.instance_type: one for one in read_catalogue()}
    assert {name: shipped[name].usd_per_hour for name in TABLE} == TABLE
    assert {name: shipped[name].usd_per_hour for name in CURATED} == {
        name: kind.on_demand_usd_per_hour for name, kind in CURATED.items()
    }
    assert all((one.gpus > 0) == bool(one.gpu_name) == (one.gpu_memory_gib > 0) for one in shipped.values())


@pytest.mark.parametrize(
    ("text", "types"),
    [
        ("L4", ["g2-standard-4", "g6.xlarge"]),
        ("a100:8", ["p4d.24xlarge", "a2-highgpu-8g"]),
        ("H100:8", ["p5.48xlarge", "a3-highgpu-8g"]),
    ],
)
def test_the_cheapest_type_with_such_gpus_comes_first(text: str, types: list[str]):
    found = [one.instance_type for one in fitting(read_catalogue(), parse_gpus(text))]
    assert [one for one in found if one in types] == types


def test_a_number_alone_takes_any_gpu_and_nonsense_is_refused():
    assert parse_gpus("4") == Resources(gpus=4)
    for text in ("A100:0", "A100:x", "A100:-1"):
        with pytest.raises(ConfigError, match="such as A100:8"):
            parse_gpus(text)


def test_what_the_account_lacks_is_answered_with_types_that_would_do():
    offer = Offer(
        pool=CapacityPool("aws", "us-east-1", "us-east-1a", "c7i.large", "spot"),
        usd_per_hour=0.03,
        on_demand_usd_per_hour=0.09,
        vcpus=2,
        memory_gib=4,
    )
    with pytest.raises(
        ConfigError, match=r"prices of 2026-11-01 these would do: g4dn\.xlarge \(\$0\.526/h on demand\), g6"
    ):
        fitting_offers(Resources(gpus=1), [offer])
    with pytest.raises(ConfigError, match=r"has no 'H100'.*p5\.48xlarge"):
        fitting_offers(Resources(gpus=8, gpu_name="H100"), [offer])
    assert hint(Resources(gpus=64), {"aws"}) == ""


class Downloaded:
    """A catalogue of gpuhunt's that needs no network."""

    def __init__(self, items: list[gpuhunt.CatalogItem]) -> None:
        self._items = items

    def query(self, provider: list[str], spot: bool) -> list[gpuhunt.CatalogItem]:
        return [item for item in self._items if item.provider in provider and item.spot == spot]


def item(provider: str, name: str, location: str, price: float, spot: bool = False) -> gpuhunt.CatalogItem:
    return gpuhunt.CatalogItem(
        provider=provider,
        instance_name=name,
        location=location,
        price=price,
        cpu=8,
        memory=32.0,
        gpu_count=1,
        gpu_name="B200",
        gpu_memory=180.0,
        spot=spot,
        disk_size=None,
        gpu_vendor=gpuhunt.AcceleratorVendor.NVIDIA,
    )


def test_a_newer_snapshot_is_made_of_gpuhunt_s_and_read_in_place_of_the_shipped_one(elsewhere: Path):
    items = [
        item("aws", "new.large", "us-east-1", 3.0),
        item("aws", "new.large", "us-east-1", 1.0, spot=True),
        item("aws", "new.large", "ap-east-1", 2.0),
        item("gcp", "new-4", "us-central1-a", 2.5),
        item("gcp", "new-4", "us-central1-b", 2.4),
    ]
    assert refresh(catalogue.OWN, TODAY, Downloaded(items)) == 2
    found = fitting(read_catalogue(), parse_gpus("B200"))
    assert [(one.cloud, one.region, one.usd_per_hour, one.as_of) for one in found] == [
        ("gcp", "us-central1", 2.4, TODAY),
        ("aws", "us-east-1", 3.0, TODAY),
    ]


def test_a_download_that_brings_nothing_leaves_what_is_there(elsewhere: Path):
    path = elsewhere / "catalogue.csv"
    refresh(path, TODAY, Downloaded([item("aws", "new.large", "us-east-1", 3.0)]))
    with pytest.raises(TransientError, match="what is there stays"):
        refresh(path, TODAY, Downloaded([]))
    assert [one.instance_type for one in read_catalogue(path)] == ["new.large"]


def test_a_file_that_is_no_catalogue_is_told(elsewhere: Path):
    (elsewhere / "bad.csv").write_text("cloud,region\naws,us-east-1\n")
    with pytest.raises(ConfigError, match=r"bad\.csv: is none"):
        read_catalogue(elsewhere / "bad.csv")
    with pytest.raises(ConfigError, match=r"gone\.csv: cannot be read"):
        read_catalogue(elsewhere / "gone.csv")
