"""Where a job would run and why: the command, the flow rank, and the monitor whose alarms change the ranking."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from blocks import load_driver
from blocks.accounts import LocalAccount
from flows.__main__ import main
from flows.monitor import monitor
from flows.rank import rank
from holdfast.drivers.local.config import ScriptedMarket
from holdfast.drivers.protocol import CapacityPool
from holdfast.market.history import History, Life
from holdfast.model import Resources
from holdfast.storage import DirectoryStore
from tests.conftest import PROGRAMS

A10G = Resources(instance_types=["g5.xlarge"], regions=["local-1"])


def job_file(folder: Path) -> Path:
    path = folder / "job.yaml"
    job = {"name": "light", "script": "light.py", "code": str(PROGRAMS), "resources": A10G.model_dump()}
    path.write_text(yaml.safe_dump(job))
    return path


def lose(store: DirectoryStore, zone: str, machines: int, hours: float = 0.5) -> None:
    """So many spot machines of the zone were taken within the last hour, on the local cloud's clock."""
    now = load_driver("local").clock.now()
    lives = [
        Life(
            run=f"lost-in-{zone}",
            token=str(number),
            pool=CapacityPool("local", "local-1", zone, "g5.xlarge", "spot"),
            launched_at=now - timedelta(hours=hours, seconds=number),
            ended_at=now - timedelta(seconds=number),
            recorded_at=now,
            outcome="preempted",
        )
        for number in range(1, machines + 1)
    ]
    History(store).record(lives)


def asked(api: str, what: str, **body: Any) -> list[dict[str, Any]]:
    answer = requests.post(f"{api}/{what}/filter", json=body, timeout=60)
    answer.raise_for_status()
    return answer.json()["events"] if what == "events" else answer.json()


def test_the_command_prints_the_pools_in_order_and_draws_them(
    folder: Path, store: DirectoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["offers", str(job_file(folder)), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted(row["zone"] for row in rows) == ["local-1a", "local-1b", "local-1c"]
    assert rows == sorted(rows, key=lambda row: row["usd_per_unit"]) and rows[0]["evidence"].startswith("prior")
    assert rows[0]["spot_usd_per_hour"] < rows[0]["on_demand_usd_per_hour"] == 1.006
    assert main(["offers", str(job_file(folder)), "--records-per-second", "100", "--plot", "offers.png"]) == 0
    said = capsys.readouterr().out
    assert " g5.xlarge: the least expected dollars" in said and "per million records" in said
    assert (folder / "offers.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_answers_by_list_prices_alone_and_refuses_to_guess_what_is_wanted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["offers", "--gpus", "A100:8"]) == 0
    assert "p4d.24xlarge" in capsys.readouterr().out
    assert main(["offers", "--gpus", "A100:8", "--json"]) == 0
    assert {row["cloud"] for row in json.loads(capsys.readouterr().out)} == {"aws", "gcp"}
    assert main(["offers"]) == main(["offers", "--gpus", "B999"]) == 2


def test_rank_puts_what_was_taken_often_last_and_shows_it_in_the_ui(store: DirectoryStore, prefect_api: str) -> None:
    # The usual local cloud's prices change by 15 % from hour to hour, and the order with them.
    LocalAccount(market=ScriptedMarket()).save("steady", overwrite=True)
    lose(store, "local-1a", machines=1000, hours=0.02)
    rows = rank(A10G, account="steady")
    assert [row["zone"] for row in rows][-1] == "local-1a"
    worst, best = rows[-1], rows[0]
    assert "own history: 1e+03 in 20 h" in worst["evidence"] and "g5 in local-1: 1e+03 in 20 h" in best["evidence"]
    assert worst["interruptions_per_day_low"] < worst["interruptions_per_day"] < worst["interruptions_per_day_high"]
    assert worst["usd_per_unit"] > 1.1 * best["usd_per_unit"]
    keys = {"key": {"any_": ["ranking-steady", "offers-steady"]}}
    artifacts = {one["key"]: one for one in asked(prefect_api, "artifacts/latest", artifacts=keys)}
    ranking = artifacts["ranking-steady"]["data"]
    assert best["why"] in ranking and "data:image/png" in ranking
    assert len(json.loads(artifacts["offers-steady"]["data"])) == 3


def test_the_monitor_cools_a_pool_tells_of_it_and_of_its_end(
    folder: Path, store: DirectoryStore, prefect_api: str
) -> None:
    lose(store, "local-1a", machines=4)
    began_at = datetime.now(UTC)
    (why,) = monitor(metrics_file=str(folder / "holdfast.prom"))
    assert why.startswith("local/local-1a/g5.xlarge: 4 of 4 spot machines were taken in 6 h")
    cooled = 'holdfast_spot_cooled{cloud="local",family="g5",instance_type="g5.xlarge",level="pool",region="local-1",zone="local-1a"} 1.0'
    assert cooled in (folder / "holdfast.prom").read_text()
    rows = rank(A10G)
    assert rows[-1]["zone"] == "local-1a" and rows[-1]["cooled"].startswith(why) and "cooled" in rows[0]["why"]
    assert monitor() == [why]  # nothing new, nothing told
    for info in store.list("history/"):
        store.delete(info.key)
    assert monitor() == []
    names = ["holdfast.market.unstable", "holdfast.market.calm"]
    wanted = {
        "event": {"name": names},
        "resource": {"id": ["holdfast.market.local/local-1a/g5.xlarge"]},
        "occurred": {"since": began_at.isoformat()},
    }
    give_up_at = time.monotonic() + 120  # the server writes events down every few seconds
    while len(told := asked(prefect_api, "events", filter=wanted)) < 2:
        assert time.monotonic() < give_up_at, told
        time.sleep(0.2)
    assert sorted(event["event"] for event in told) == sorted(names)
