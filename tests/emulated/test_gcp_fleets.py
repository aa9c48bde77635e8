"""Fleets on Google Cloud: bulk inserts and managed instance groups, and what a crash in the middle leaves of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers.gcp import fleets as gcp_fleets
from holdfast.drivers.gcp.driver import GcpDriver
from holdfast.drivers.local.config import Fate
from holdfast.drivers.protocol import CapacityPool, FleetRequest, Machine
from holdfast.errors import CapacityError, ConfigError, QuotaError, TransientError
from tests.contract.machines import SLEEP, wait_for
from tests.emulated.gce import GceEmulator
from tests.emulated.wire import Wire

A, B, C = "us-central1-a", "us-central1-b", "us-central1-c"


def pool(zone: str, model: Any = "spot", machine_type: str = "n2-standard-2") -> CapacityPool:
    return CapacityPool("gcp", zone.rpartition("-")[0], zone, machine_type, model)


def fleet(kind: Any, machines: int, spot_share: float, *pools: CapacityPool, **changes: Any) -> FleetRequest:
    return FleetRequest(
        **{
            "token": "fleet-1",
            "kind": kind,
            "pools": list(pools) or [pool(A), pool(B), pool(B, "on-demand")],
            "machines": machines,
            "spot_share": spot_share,
            "tags": {"holdfast-run": "run", "holdfast-attempt": "1"},
            "startup_script": f"#!/bin/bash\n{SLEEP}\n",
            **changes,
        }
    )


@pytest.fixture
def gce(tmp_path: Path) -> Iterator[GceEmulator]:
    with GceEmulator(tmp_path / "gce") as emulator:
        yield emulator


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcp_fleets, "LOOK_SECONDS", 0.05)


def sent(gce: GceEmulator, method: str) -> list[dict[str, Any]]:
    return [body for name, body in gce.bodies if name == method]


def living(driver: GcpDriver) -> list[Machine]:
    return [one for one in driver.machines({"holdfast-run": "run"}) if one.state in ("pending", "running")]


# -- asked for once ---------------------------------------------------------------------------------------------------


def test_a_bulk_insert_asks_for_its_zones_only_and_for_whatever_can_be_had(gce: GceEmulator) -> None:
    machines = gce.driver().launch_fleet(fleet("instant", 4, 0.75, max_run_seconds=3600))
    spot, on_demand = sent(gce, "instances.bulkInsert")
    assert (spot["count"], spot["minCount"], len(spot["perInstanceProperties"])) == ("3", "1", 3)
    assert {zone: at["preference"] for zone, at in spot["locationPolicy"]["locations"].items()} == {
        f"zones/{A}": "ALLOW",
        f"zones/{B}": "ALLOW",
        f"zones/{C}": "DENY",
    }
    scheduling = spot["instanceProperties"]["scheduling"]
    assert (scheduling["provisioningModel"], scheduling["instanceTerminationAction"]) == ("SPOT", "DELETE")
    assert scheduling["maxRunDuration"] == {"seconds": "3600"}
    assert on_demand["instanceProperties"]["scheduling"]["provisioningModel"] == "STANDARD"
    assert sorted(machine.id for machine in machines) == gce.names
    assert {machine.pool.zone for machine in machines} == {A, B}
    assert all(machine.tags["holdfast-run"] == "run" for machine in machines)


def test_what_could_be_had_is_had_and_repeating_adds_nothing(tmp_path: Path) -> None:
    with GceEmulator(tmp_path, spot_fates=[Fate(refuse=True)]) as gce:
        driver = gce.driver()
        machines = driver.launch_fleet(fleet("instant", 3, 1.0))
        assert len(machines) == 2
        assert {one.id for one in gce.driver().launch_fleet(fleet("instant", 3, 1.0))} == {one.id for one in machines}
        for machine in machines:
            driver.terminate(machine.id, machine.pool)
        wait_for(lambda: (driver.machines({}), gce.names == [])[1])
        again = gce.driver().launch_fleet(fleet("instant", 3, 1.0))
        assert [one.state for one in again] == ["terminated"] * 2 and gce.names == []


def test_a_lost_answer_to_a_bulk_insert_doubles_nothing(gce: GceEmulator) -> None:
    with Wire(gce.endpoint) as wire:
        fault = wire.inject("lost", when=lambda request: request.action == "instances.bulkInsert")
        machines = gce.driver(api_endpoint=wire.url).launch_fleet(fleet("instant", 3, 1.0))
        assert fault.hits == 1 and len(machines) == len(gce.names) == 3


def test_a_fleet_of_which_nothing_is_to_be_had_is_a_capacity_error(tmp_path: Path) -> None:
    with GceEmulator(tmp_path, spot_fates=[Fate(refuse=True)] * 2) as gce:
        with pytest.raises(CapacityError, match="VM_MIN_COUNT_NOT_REACHED"):
            gce.driver().launch_fleet(fleet("instant", 2, 1.0))
        assert gce.names == []


def test_several_machine_types_are_choices_in_their_order(gce: GceEmulator) -> None:
    pools = [pool(A), pool(A, machine_type="n2-standard-8")]
    gce.driver().launch_fleet(fleet("instant", 1, 1.0, *pools))
    (body,) = sent(gce, "instances.bulkInsert")
    assert body["instanceFlexibilityPolicy"]["instanceSelections"] == {
        "choice-0": {"machineTypes": ["n2-standard-2"], "rank": "0"},
        "choice-1": {"machineTypes": ["n2-standard-8"], "rank": "1"},
    }


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (fleet("instant", 2, 0.5, pool(A)), "none of its pools is"),
        (fleet("instant", 2, 1.0, pool(A), pool("europe-west4-a")), "name one"),
        (fleet("instant", 2, 1.0, pool("asia-east1-a")), "regions"),
    ],
)
def test_a_fleet_that_contradicts_itself_is_refused(gce: GceEmulator, request_: FleetRequest, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gce.driver().launch_fleet(request_)
    assert gce.names == [] and gce.groups == []


# -- kept by the cloud ------------------------------------------------------------------------------------------------


def test_a_maintained_fleet_is_a_group_for_each_model(gce: GceEmulator) -> None:
    driver = gce.driver(health_check="projects/own/global/healthChecks/alive")
    machines = driver.launch_fleet(fleet("maintained", 5, 0.8))
    assert sorted(one.pool.provisioning_model for one in machines) == ["on-demand"] + ["spot"] * 4
    assert len(gce.groups) == len(gce.templates) == 2
    spot, _ = sent(gce, "instanceGroupManagers.insert")
    assert spot["targetSize"] == 4 and spot["instanceLifecyclePolicy"]["defaultActionOnFailure"] == "REPAIR"
    assert spot["autoHealingPolicies"] == [
        {"healthCheck": "projects/own/global/healthChecks/alive", "initialDelaySec": 600}
    ]
    assert [zone["zone"].rpartition("/")[2] for zone in spot["distributionPolicy"]["zones"]] == [A, B]
    assert spot["distributionPolicy"]["targetShape"] == "ANY"
    assert spot["updatePolicy"]["instanceRedistributionType"] == "NONE"
    template, _ = sent(gce, "instanceTemplates.insert")
    assert template["properties"]["scheduling"]["provisioningModel"] == "SPOT"
    (kept,) = gce.driver().fleets({"holdfast-run": "run"})
    assert (kept.machines, kept.region, kept.tags["holdfast-attempt"]) == (5, "us-central1", "1")
    assert gce.driver().fleets({"holdfast-run": "another"}) == []
    driver.end_fleet("fleet-1", "us-central1")
    assert gce.names == gce.groups == gce.templates == []


def test_repeating_a_maintained_fleet_adds_nothing(gce: GceEmulator) -> None:
    first = gce.driver().launch_fleet(fleet("maintained", 2, 0.5))
    again = gce.driver().launch_fleet(fleet("maintained", 2, 0.5))
    assert {one.id for one in again} == {one.id for one in first} and len(gce.names) == 2
    gce.driver().end_fleet("fleet-1", "us-central1")


def test_a_replacement_under_the_same_name_is_another_machine(tmp_path: Path) -> None:
    with GceEmulator(tmp_path, spot_fates=[Fate(after_seconds=0.3, notice=False)]) as gce:
        driver = gce.driver()
        (first,) = driver.launch_fleet(fleet("maintained", 1, 1.0))
        wait_for(lambda: len(driver.machines({"holdfast-run": "run"})) == 2)
        (replacement,) = wait_for(lambda: living(driver))
        assert replacement.id != first.id and replacement.id.partition(".")[0] == first.id.partition(".")[0]
        (taken,) = [one for one in driver.machines({}) if one.id == first.id]
        assert (taken.state, taken.reason) == ("terminated", "preempted")
        assert {one.id for one in gce.driver().machines({"holdfast-fleet": "fleet-1"})} == {first.id, replacement.id}
        driver.end_fleet("fleet-1", "us-central1")
        over = wait_for(lambda: [one for one in driver.machines({}) if one.state == "terminated"])
        assert len(over) == 2 and living(driver) == []


def test_half_of_a_fleet_is_found_and_ended_too(gce: GceEmulator) -> None:
    """The orchestrator died between the template and its group, or between the two groups."""
    with Wire(gce.endpoint) as wire:
        wire.inject("reset", when=lambda request: request.action == "instanceGroupManagers.insert", count=float("inf"))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(TransientError):
            patch.setattr("holdfast.drivers.gcp.api.RETRY_SECONDS", 0.3)
            gce.driver(api_endpoint=wire.url).launch_fleet(fleet("maintained", 2, 1.0))
    assert gce.templates and not gce.groups
    (half,) = gce.driver().fleets({"holdfast-run": "run"})
    assert (half.token, half.region, half.machines) == ("fleet-1", "us-central1", 0)
    gce.driver().end_fleet(half.token, half.region)
    assert gce.driver().fleets({}) == [] and gce.templates == []


def test_an_ended_fleet_may_be_asked_for_again(gce: GceEmulator) -> None:
    driver = gce.driver()
    for _ in range(2):
        assert len(driver.launch_fleet(fleet("maintained", 1, 1.0))) == 1
        driver.end_fleet("fleet-1", "us-central1")
        assert gce.names == gce.groups == gce.templates == []


def test_a_maintained_fleet_that_gets_nothing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GceEmulator(tmp_path, spot_fates=[Fate(refuse=True)] * 50) as gce:
        with pytest.raises(CapacityError, match=r"no capacity.*ZONE_RESOURCE_POOL_EXHAUSTED"):
            gce.driver().launch_fleet(fleet("maintained", 1, 1.0))
        assert gce.names == gce.groups == gce.templates == []


def test_ending_a_fleet_ends_what_a_bulk_insert_made(gce: GceEmulator) -> None:
    driver = gce.driver()
    driver.launch_fleet(fleet("instant", 3, 1.0))
    gce.driver().end_fleet("fleet-1", "us-central1")
    wait_for(lambda: gce.names == [])
    assert {one.reason for one in driver.machines({})} == {"terminated-by-user"}


def test_a_quota_stops_a_fleet_and_names_itself(gce: GceEmulator) -> None:
    gce.limits["us-central1", "PREEMPTIBLE_CPUS"] = 1.0
    with pytest.raises(QuotaError, match="PREEMPTIBLE_CPUS is 1"):
        gce.driver().launch_fleet(fleet("instant", 2, 1.0))


def test_every_call_of_a_fleet_is_among_the_permissions_that_are_examined(gce: GceEmulator) -> None:
    from holdfast.drivers.gcp.examination import PERMISSIONS as EXAMINED
    from tests.emulated.gce import PERMISSIONS

    driver = gce.driver()
    for kind in ("instant", "maintained"):
        driver.launch_fleet(fleet(kind, 2, 0.5, token=kind))
    driver.fleets({})
    for kind in ("instant", "maintained"):
        driver.end_fleet(kind, "us-central1")
    needed = {name for method in gce.calls for name in PERMISSIONS[method]}
    assert needed - set(EXAMINED) == set()
