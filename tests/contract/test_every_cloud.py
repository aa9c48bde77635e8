"""What Holdfast asks of every cloud alike. What is the local cloud's alone is in test_driver.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from holdfast.drivers.local.config import Fate
from holdfast.drivers.protocol import CapacityPool, Driver, FleetRequest, LaunchRequest, Machine
from holdfast.errors import CapacityError, ConfigError
from tests.contract.clouds import CLOUDS, Cloud
from tests.contract.machines import SLEEP, described, ended, line_of, nothing_left, wait_for

Open = Callable[..., Cloud]


@pytest.fixture(params=CLOUDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the cloud with the fates of its spot machines; whatever lives in it ends with the test."""
    with ExitStack() as stack:

        def open_cloud(*spot: Fate, on_demand: list[Fate] | None = None) -> Cloud:
            cloud = stack.enter_context(CLOUDS[request.param](tmp_path, spot, on_demand or []))
            stack.enter_context(nothing_left(cloud.driver()))
            return cloud

        yield open_cloud


def asked(token: str, pool: CapacityPool, script: str = SLEEP, **tags: str) -> LaunchRequest:
    return LaunchRequest(
        token=token,
        pool=pool,
        tags={"holdfast-run": "run", **{f"holdfast-{name}": value for name, value in tags.items()}},
        environment={},
        startup_script=f"#!/bin/bash\n{script}\n",
        max_run_seconds=3600,
        disk_gib=100,
    )


def running(driver: Driver, machine: Machine) -> Machine:
    def is_running() -> Machine | None:
        now = described(driver, machine)
        return now if now.state == "running" else None

    return wait_for(is_running)


def test_a_machine_runs_its_start_up_script_and_ends_itself(opened: Open) -> None:
    cloud = opened()
    driver = cloud.driver()
    before = driver.clock.now()
    machine = driver.launch(asked("run-1", cloud.spot, 'echo "says: it is $((6 * 7))"', attempt="1"))
    over = ended(driver, machine)
    assert line_of(driver, machine, "says: ") == "it is 42"
    assert (over.reason, over.pool) == ("ended-itself", cloud.spot)
    assert over.tags["holdfast-run"] == "run" and over.tags["holdfast-attempt"] == "1"
    assert over.terminated_at
    second = timedelta(seconds=1)  # clouds tell whole seconds
    assert before - second <= over.launched_at <= over.terminated_at <= driver.clock.now() + second


def test_a_repeated_launch_adopts_the_machine_whoever_repeats_it(opened: Open) -> None:
    cloud = opened()
    once = cloud.driver().launch(asked("run-1", cloud.spot))
    again = cloud.driver().launch(asked("run-1", cloud.spot))
    assert (again.id, again.launched_at) == (once.id, once.launched_at)
    assert len(cloud.driver().machines({})) == 1
    other = cloud.driver().launch(asked("run-2", cloud.other_zone))
    assert other.id != once.id and other.pool == cloud.other_zone


def test_a_refusal_is_a_capacity_error_and_the_next_zone_may_have_a_machine(opened: Open) -> None:
    cloud = opened(Fate(refuse=True))
    driver = cloud.driver()
    with pytest.raises(CapacityError, match=cloud.spot.zone):
        driver.launch(asked("run-1", cloud.spot))
    assert driver.launch(asked("run-2", cloud.other_zone)).state in ("pending", "running")
    assert len(driver.machines({})) == 1


def test_what_the_cloud_does_not_have_is_refused_by_name(opened: Open) -> None:
    cloud = opened()
    pool = cloud.spot
    unknown = CapacityPool(pool.cloud, pool.region, pool.zone, "no-such.type", "spot")
    with pytest.raises(ConfigError, match=r"no-such\.type"):
        cloud.driver().launch(asked("run-1", unknown))
    assert cloud.driver().machines({}) == []


def test_machines_are_found_by_all_of_their_tags_the_terminated_ones_too(opened: Open) -> None:
    cloud = opened()
    driver = cloud.driver()
    first = driver.launch(asked("a-1", cloud.spot, "true", attempt="1"))
    driver.launch(asked("a-2", cloud.on_demand, attempt="2"))
    ended(driver, first)

    def found(**tags: str) -> list[str]:
        machines = cloud.driver().machines({f"holdfast-{name}": value for name, value in tags.items()})
        return sorted(machine.state for machine in machines)

    wait_for(lambda: found(run="run") == ["running", "terminated"])
    assert found(run="run", attempt="1") == ["terminated"]
    assert found(run="another") == found(colour="red") == []


def test_the_provisioning_model_is_told(opened: Open) -> None:
    cloud = opened()
    driver = cloud.driver()
    for token, pool in (("a-1", cloud.spot), ("a-2", cloud.on_demand)):
        assert described(driver, driver.launch(asked(token, pool))).pool == pool


def test_a_terminated_machine_may_say_its_last_words(opened: Open) -> None:
    cloud = opened()
    driver = cloud.driver()
    machine = driver.launch(
        asked("run-1", cloud.spot, "trap 'echo bye; exit' TERM\necho up\nwhile :; do sleep 0.01; done")
    )
    line_of(driver, machine, "up")
    driver.terminate(machine.id, machine.pool)
    assert described(driver, machine).state in ("stopping", "terminated")
    assert ended(driver, machine).reason == "terminated-by-user"
    assert driver.console(machine.id, machine.pool).splitlines()[-1] == "bye"


def test_terminating_what_is_gone_or_never_was_is_no_error(opened: Open) -> None:
    cloud = opened()
    driver = cloud.driver()
    machine = driver.launch(asked("run-1", cloud.spot, "true"))
    over = ended(driver, machine)
    for machine_id in (machine.id, "i-00000000000000000"):
        cloud.driver().terminate(machine_id, cloud.spot)
    assert described(driver, machine) == over
    assert driver.console("i-00000000000000000", cloud.spot) == ""


@pytest.mark.parametrize("notice", [True, False])
def test_a_preemption_is_told_from_every_other_end(opened: Open, notice: bool) -> None:
    cloud = opened(Fate(after_seconds=0.3, notice=notice))
    driver = cloud.driver()
    taken = driver.launch(asked("run-1", cloud.spot))
    itself = driver.launch(asked("run-2", cloud.on_demand, "true"))
    assert ended(driver, taken).reason == "preempted"
    assert ended(driver, taken).detail  # the cloud's own words
    assert ended(driver, itself).reason == "ended-itself"


def test_an_older_description_will_do_where_the_caller_says_so(opened: Open) -> None:
    cloud = opened()
    driver = cloud.driver()
    assert driver.machines({}) == []
    machine = cloud.driver().launch(asked("run-1", cloud.spot))
    old = driver.machines({}, max_age_seconds=600)
    assert [one.id for one in old] in ([], [machine.id])  # the local cloud is always fresh
    assert [one.id for one in driver.machines({})] == [machine.id]


def test_offers_have_prices_and_cover_the_pools(opened: Open) -> None:
    cloud = opened()
    driver = cloud.driver()
    offers = {offer.pool: offer for offer in driver.offers()}
    for pool in (cloud.spot, cloud.on_demand, cloud.other_zone):
        assert 0 < offers[pool].usd_per_hour <= offers[pool].on_demand_usd_per_hour
        assert offers[pool].vcpus > 0 and offers[pool].memory_gib > 0
    assert offers[cloud.spot].usd_per_hour < offers[cloud.on_demand].usd_per_hour
    now = driver.clock.now()
    points = driver.price_history(cloud.spot, now - timedelta(hours=2), now)
    assert points[0].at <= now - timedelta(hours=2) and all(point.usd_per_hour > 0 for point in points)


def test_the_account_is_examined_line_by_line(opened: Open) -> None:
    cloud = opened()
    cloud.driver().check()
    findings = list(cloud.driver().examine())
    assert findings and all(finding.ok for finding in findings), findings


# -- fleets -----------------------------------------------------------------------------------------------------------


def fleet(cloud: Cloud, kind: str, machines: int, spot_share: float, token: str = "fleet-1") -> FleetRequest:
    return FleetRequest(
        token=token,
        kind=kind,  # type: ignore[arg-type]
        pools=[cloud.spot, cloud.other_zone, cloud.on_demand],
        machines=machines,
        spot_share=spot_share,
        tags={"holdfast-run": "run", "holdfast-lease": "1"},
        startup_script=f"#!/bin/bash\n{SLEEP}\n",
    )


def living(driver: Driver) -> list[Machine]:
    return [machine for machine in driver.machines({"holdfast-run": "run"}) if machine.state in ("pending", "running")]


def test_a_share_of_an_instant_fleet_is_spot_and_repeating_it_adds_none(opened: Open) -> None:
    cloud = opened()
    machines = cloud.driver().launch_fleet(fleet(cloud, "instant", 5, 0.8))
    assert sorted(machine.pool.provisioning_model for machine in machines) == ["on-demand"] + ["spot"] * 4
    assert {machine.tags["holdfast-fleet"] for machine in machines} == {"fleet-1"}
    again = cloud.driver().launch_fleet(fleet(cloud, "instant", 5, 0.8))
    assert {machine.id for machine in again} == {machine.id for machine in machines}
    assert len(living(cloud.driver())) == 5
    for machine in machines:  # its on-demand members are protected; terminating them works all the same
        cloud.driver().terminate(machine.id, machine.pool)
    wait_for(lambda: living(cloud.driver()) == [])


def test_a_maintained_fleet_replaces_what_is_taken_until_it_is_ended(opened: Open) -> None:
    cloud = opened(Fate(after_seconds=0.5, notice=False))
    driver = cloud.driver()
    driver.launch_fleet(fleet(cloud, "maintained", 2, 1.0))
    wait_for(lambda: len(driver.machines({"holdfast-run": "run"})) >= 3, 60)
    wait_for(lambda: len(living(driver)) == 2, 60)
    (kept,) = driver.fleets({"holdfast-run": "run"})
    assert (kept.token, kept.machines, kept.region) == ("fleet-1", 2, cloud.spot.region)
    cloud.driver().end_fleet("fleet-1", cloud.spot.region)
    cloud.driver().end_fleet("fleet-1", cloud.spot.region)
    wait_for(lambda: living(driver) == [], 60)
    assert driver.fleets({}) == []
