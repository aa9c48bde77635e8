"""The table of offers as AWS and Google tell it: live prices of zones, their own advice on capacity, both clouds at once."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from holdfast.drivers.protocol import CapacityPool
from holdfast.drivers.several import SeveralDrivers
from holdfast.market.history import History, Life
from holdfast.market.plots import draw_offers
from holdfast.model import Resources
from holdfast.storage import DirectoryStore
from tasks.market import Wanted, find_offers, price_histories
from tests.emulated.aws import AwsEmulator
from tests.emulated.gce import GceEmulator

GPU = Wanted(resources=Resources(gpus=1))


def test_a_row_has_the_zone_s_prices_and_the_placement_score_in_its_evidence(tmp_path: Path) -> None:
    with AwsEmulator(tmp_path / "aws") as aws:
        driver = aws.driver()
        rows = find_offers(driver, DirectoryStore(tmp_path / "store"), GPU)
        first = rows[0]
        assert (first.cloud, first.instance_type, first.gpu_name) == ("aws", "g5.xlarge", "A10G")
        assert first.spot_usd_per_hour and first.on_demand_usd_per_hour
        assert first.discount == 1 - first.spot_usd_per_hour / first.on_demand_usd_per_hour
        assert "prior with placement score 9 of 10" in first.evidence
        assert first.interruptions_per_day_low < first.interruptions_per_day < first.interruptions_per_day_high
        prices = price_histories(driver, rows)
        assert len(prices[f"{first.zone} g5.xlarge"]) > 20  # they changed every four hours
        assert draw_offers(rows, prices)[:4] == b"\x89PNG"


def test_two_clouds_are_ranked_as_one_and_the_history_of_one_zone_turns_the_order(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    with AwsEmulator(tmp_path / "aws") as aws, GceEmulator(tmp_path / "gce") as gce:
        gce.advice = {("g2-standard-4", "us-central1-a"): (0.9, "360000s")}
        driver = SeveralDrivers([aws.driver(), gce.driver(machine_types=["g2-standard-4"])])
        rows = find_offers(driver, store, GPU)
        assert {row.cloud for row in rows} == {"aws", "gcp"}
        assert [row.usd_per_unit for row in rows] == sorted(row.usd_per_unit for row in rows)
        advised = next(row for row in rows if row.zone == "us-central1-a")
        assert "prior with capacity advice 0.90 of 1, most last 100 h" in advised.evidence
        assert rows[0].cloud == "gcp"  # half the price

        now = driver.clock.now()
        lost = [
            Life(
                run="lost",
                token=f"{row.zone}-{number}",
                pool=CapacityPool("gcp", row.region, row.zone, row.instance_type, "spot"),
                launched_at=now - timedelta(minutes=1, seconds=number),
                ended_at=now - timedelta(seconds=number),
                recorded_at=now,
                outcome="preempted",
            )
            for row in rows
            if row.cloud == "gcp"
            for number in range(1500)
        ]
        History(store).record(lost)
        assert find_offers(driver, store, GPU)[0].cloud == "aws"
