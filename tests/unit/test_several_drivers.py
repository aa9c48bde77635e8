"""Several accounts as one cloud: every call goes to the cloud that it is about, and one that is away keeps no run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.protocol import CapacityPool, LaunchRequest, Machine
from holdfast.drivers.several import SeveralDrivers
from holdfast.errors import ConfigError, TransientError
from tests.contract.machines import wait_for
from tests.emulated.aws import AwsEmulator
from tests.emulated.gce import GceEmulator

AWS = CapacityPool("aws", "us-east-1", "us-east-1a", "c7i.large", "spot")
GCP = CapacityPool("gcp", "us-central1", "us-central1-a", "n2-standard-2", "spot")
TAGS = {"holdfast-run": "wanderer"}


def local(folder: Path, clock_speed: float = 1.0) -> LocalDriver:
    return LocalDriver(LocalCloudConfig(root=folder, clock_speed=clock_speed))


def test_two_accounts_of_one_cloud_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names a cloud twice; one account of each cloud"):
        SeveralDrivers([local(tmp_path / "one"), local(tmp_path / "two")])


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[AwsEmulator]:
    with AwsEmulator(tmp_path / "aws") as aws:
        yield aws


@pytest.fixture
def gce(tmp_path: Path) -> Iterator[GceEmulator]:
    with GceEmulator(tmp_path / "gce") as gce:
        yield gce


@pytest.fixture
def both(aws: AwsEmulator, gce: GceEmulator) -> SeveralDrivers:
    return SeveralDrivers([aws.driver(), gce.driver()])


def launch(driver: SeveralDrivers, pool: CapacityPool) -> Machine:
    script = f"#!/bin/bash\necho here is {pool.cloud}\nexec sleep 300\n"
    return driver.launch(
        LaunchRequest(token=f"wanderer-{pool.cloud}", pool=pool, tags=TAGS, environment={}, startup_script=script)
    )


def states(driver: SeveralDrivers, cloud: str = "") -> dict[str, str]:
    return {machine.pool.cloud: machine.state for machine in driver.machines(TAGS, cloud=cloud)}


def test_clocks_of_different_speeds_are_refused(aws: AwsEmulator, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the clocks of .* differ"):
        SeveralDrivers([aws.driver(), local(tmp_path / "local", clock_speed=60)])


def test_launch_machines_console_and_terminate_go_to_the_cloud_of_the_pool(both: SeveralDrivers) -> None:
    here, there = launch(both, AWS), launch(both, GCP)
    wait_for(lambda: states(both) == {"aws": "running", "gcp": "running"}, 60)
    assert states(both, "aws") == {"aws": "running"}
    assert states(both, "gcp") == {"gcp": "running"}
    for machine in (here, there):
        wait_for(lambda machine=machine: f"here is {machine.pool.cloud}" in both.console(machine.id, machine.pool), 60)
    both.terminate(there.id, there.pool)
    wait_for(lambda: states(both).get("gcp", "terminated") == "terminated", 60)
    assert states(both, "aws") == {"aws": "running"}
    both.terminate(here.id, here.pool)
    wait_for(lambda: set(states(both).values()) <= {"terminated"}, 60)


def test_one_cloud_that_is_away_leaves_the_other_s_offers(
    both: SeveralDrivers, aws: AwsEmulator, gce: GceEmulator
) -> None:
    assert {offer.pool.cloud for offer in both.offers()} == {"aws", "gcp"}
    gce.expired = True
    afresh = SeveralDrivers([aws.driver(), gce.driver()])
    assert {offer.pool.cloud for offer in afresh.offers()} == {"aws"}
    aws.refuse("DescribeInstanceTypeOfferings", "RequestExpired", "Request has expired.", count=99)
    with pytest.raises(TransientError):
        SeveralDrivers([aws.driver(), gce.driver()]).offers()


def test_a_machine_of_a_cloud_whose_account_is_not_named_is_a_clear_refusal(
    both: SeveralDrivers, aws: AwsEmulator, tmp_path: Path
) -> None:
    machine = launch(both, GCP)
    others = SeveralDrivers([aws.driver(), local(tmp_path / "local")])
    for call in (
        lambda: others.machines(TAGS, cloud="gcp"),
        lambda: others.terminate(machine.id, machine.pool),
        lambda: others.console(machine.id, machine.pool),
    ):
        with pytest.raises(ConfigError, match=r"has used cloud 'gcp', .* name its account too"):
            call()
    assert states(both)["gcp"] != "terminated"


def test_an_examination_names_the_cloud_of_every_line(both: SeveralDrivers) -> None:
    findings = list(both.examine())
    assert {finding.subject.split()[0] for finding in findings} == {"aws", "gcp"}
    assert all(finding.ok for finding in findings)
