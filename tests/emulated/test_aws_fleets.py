"""Fleets of AWS: what is asked for, what is left when something fails in between, and that nothing stays behind."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers.aws.fleets import fleet_name
from holdfast.drivers.local.config import Fate
from holdfast.drivers.protocol import CapacityPool, Driver, FleetRequest, Machine
from holdfast.errors import CapacityError, ConfigError, QuotaError
from tests.contract.machines import SLEEP, wait_for
from tests.emulated.aws import AwsEmulator


def pool(zone: str = "us-east-1a", model: str = "spot", kind: str = "c7i.large") -> CapacityPool:
    return CapacityPool("aws", zone[:-1], zone, kind, model)  # type: ignore[arg-type]


POOLS = [
    pool("us-east-1a"),
    pool("us-east-1b"),
    pool("us-east-1b", kind="m7i.2xlarge"),
    pool("us-east-1c", "on-demand"),
]


def fleet(kind: str = "instant", machines: int = 3, spot_share: float = 0.67, **changes: Any) -> FleetRequest:
    given: dict[str, Any] = {"pools": POOLS, "tags": {"holdfast-run": "run"}, "token": "fleet-1", **changes}
    return FleetRequest(
        kind=kind,  # type: ignore[arg-type]
        machines=machines,
        spot_share=spot_share,
        startup_script=f"#!/bin/bash\n{SLEEP}\n",
        **given,
    )


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[AwsEmulator]:
    with AwsEmulator(tmp_path) as emulator:
        yield emulator


def sent(aws: AwsEmulator, action: str) -> list[dict[str, str]]:
    return [dict(request.parameters) for request in aws.requests if request.action == action]


def templates(aws: AwsEmulator) -> list[str]:
    return [one["LaunchTemplateName"] for one in aws.client("ec2").describe_launch_templates()["LaunchTemplates"]]


def living(driver: Driver) -> list[Machine]:
    return [one for one in driver.machines({"holdfast-run": "run"}) if one.state in ("pending", "running")]


# -- asked for once ---------------------------------------------------------------------------------------------------


def test_each_model_has_a_fleet_of_its_own_pools(aws: AwsEmulator) -> None:
    machines = aws.driver().launch_fleet(fleet())
    spot, on_demand = sent(aws, "CreateFleet")
    assert spot["Type"] == on_demand["Type"] == "instant"
    assert spot["SpotOptions.AllocationStrategy"] == "price-capacity-optimized"
    assert spot["SpotOptions.InstanceInterruptionBehavior"] == "terminate"
    key = "TargetCapacitySpecification"
    assert (spot[f"{key}.SpotTargetCapacity"], spot[f"{key}.OnDemandTargetCapacity"]) == ("2", "0")
    assert (on_demand[f"{key}.SpotTargetCapacity"], on_demand[f"{key}.OnDemandTargetCapacity"]) == ("0", "1")
    types = [spot[f"LaunchTemplateConfigs.1.Overrides.{number}.InstanceType"] for number in (1, 2, 3)]
    assert types == ["c7i.large", "c7i.large", "m7i.2xlarge"]
    assert "LaunchTemplateConfigs.1.Overrides.2.InstanceType" not in on_demand
    assert spot["ClientToken"] != on_demand["ClientToken"]
    assert {machine.pool for machine in machines} <= set(POOLS)
    tags = {machine.pool.provisioning_model: machine.tags for machine in machines}
    assert (tags["spot"]["ResourceType"], tags["on-demand"]["ResourceType"]) == ("Spot", "OnDemand")
    assert templates(aws) == []  # made for the call and gone with it


def test_its_machines_are_as_safe_as_single_ones_and_on_demand_members_are_protected(aws: AwsEmulator) -> None:
    driver = aws.driver()
    machines = driver.launch_fleet(fleet())
    for form in sent(aws, "CreateLaunchTemplate"):
        assert form["LaunchTemplateData.MetadataOptions.HttpTokens"] == "required"
        assert form["LaunchTemplateData.MetadataOptions.HttpPutResponseHopLimit"] == "1"
        assert form["LaunchTemplateData.BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
        assert form["LaunchTemplateData.IamInstanceProfile.Name"] == "holdfast-machine"
        assert form["LaunchTemplateData.InstanceInitiatedShutdownBehavior"] == "terminate"
        assert base64.b64decode(form["LaunchTemplateData.UserData"]).decode() == f"#!/bin/bash\n{SLEEP}\n"
    protected = [form.get("LaunchTemplateData.DisableApiTermination") for form in sent(aws, "CreateLaunchTemplate")]
    assert protected == [None, "true"]
    (member,) = [machine for machine in machines if machine.pool.provisioning_model == "on-demand"]
    answer = aws.client("ec2").describe_instance_attribute(InstanceId=member.id, Attribute="disableApiTermination")
    assert answer["DisableApiTermination"]["Value"]
    driver.end_fleet("fleet-1", "us-east-1")
    wait_for(lambda: living(driver) == [])


def test_a_launch_template_of_the_account_s_own_is_the_base_of_the_fleet_s(aws: AwsEmulator) -> None:
    ec2 = aws.client("ec2")
    group = ec2.create_security_group(GroupName="holdfast", Description="none is open")["GroupId"]
    data = {
        "InstanceType": "c7i.xlarge",
        "InstanceMarketOptions": {"MarketType": "spot"},
        "NetworkInterfaces": [{"DeviceIndex": 0, "DeleteOnTermination": True}],
        "Monitoring": {"Enabled": True},
    }
    ec2.create_launch_template(LaunchTemplateName="ours", LaunchTemplateData=data)
    driver = aws.driver(launch_template="ours", security_group_ids=[group], image=aws.front.image_ids["us-east-1"])
    (machine,) = driver.launch_fleet(fleet(machines=1, spot_share=0.0))
    form = sent(aws, "CreateLaunchTemplate")[-1]
    assert form["LaunchTemplateData.Monitoring.Enabled"] == "true"
    assert form["LaunchTemplateData.NetworkInterface.1.SecurityGroupId.1"] == group
    assert not [key for key in form if "InstanceMarketOptions" in key or key == "LaunchTemplateData.InstanceType"]
    assert machine.pool == POOLS[3]
    assert templates(aws) == ["ours"]


def test_what_can_be_had_is_had_and_nothing_is_a_capacity_error(tmp_path: Path) -> None:
    refused = [Fate(refuse=True)] * 3
    with AwsEmulator(tmp_path, spot_fates=refused * 2, on_demand_fates=[Fate(), Fate(refuse=True)]) as aws:
        (machine,) = aws.driver().launch_fleet(fleet(machines=2, spot_share=0.5))
        assert machine.pool == POOLS[3]
        assert aws.driver().launch_fleet(fleet(machines=2, spot_share=0.5))[0].id == machine.id
        assert len(aws.host.ids()) == 1
        with pytest.raises(CapacityError, match="us-east-1a"):
            aws.driver().launch_fleet(fleet(machines=2, spot_share=0.5, token="fleet-2"))
        assert templates(aws) == []


def test_a_fleet_that_was_cut_off_between_its_halves_is_completed(aws: AwsEmulator) -> None:
    whole = aws.driver().launch_fleet(fleet(machines=1, spot_share=1.0))
    machines = aws.driver().launch_fleet(fleet(machines=2, spot_share=0.5))
    assert whole[0].id in {machine.id for machine in machines} and len(machines) == 2
    assert len(aws.host.ids()) == 2


def test_a_quota_and_a_missing_permission_are_told_apart_from_an_empty_pool(aws: AwsEmulator) -> None:
    aws.refuse("CreateFleet", "MaxSpotFleetRequestCountExceeded")
    with pytest.raises(QuotaError):
        aws.driver().launch_fleet(fleet(spot_share=1.0))
    aws.deny("CreateLaunchTemplate")
    with pytest.raises(ConfigError, match="ec2:CreateLaunchTemplate"):
        aws.driver().launch_fleet(fleet(token="fleet-2"))


def test_a_fleet_is_of_one_region_and_has_pools_of_what_it_is_to_be(aws: AwsEmulator) -> None:
    driver = aws.driver(regions=["us-east-1", "us-west-2"])
    with pytest.raises(ConfigError, match="name pools of one"):
        driver.launch_fleet(fleet(pools=[pool("us-east-1a"), pool("us-west-2a")]))
    with pytest.raises(ConfigError, match="to be on-demand, and no pool is"):
        driver.launch_fleet(fleet(pools=[pool()], spot_share=0.0))
    with pytest.raises(ConfigError, match="'eu-west-1'"):
        driver.end_fleet("fleet-1", "eu-west-1")


# -- kept whole -------------------------------------------------------------------------------------------------------


def test_a_group_is_asked_for_exact_numbers_and_rebalances_before_it_is_taken_from(aws: AwsEmulator) -> None:
    driver = aws.driver()
    driver.launch_fleet(fleet("maintained", 5, 0.8))
    (form,) = sent(aws, "CreateAutoScalingGroup")
    assert (form["MinSize"], form["MaxSize"], form["DesiredCapacity"]) == ("5", "5", "5")
    assert form["CapacityRebalance"] == "true"
    distribution = "MixedInstancesPolicy.InstancesDistribution"
    assert (
        form[f"{distribution}.OnDemandBaseCapacity"],
        form[f"{distribution}.OnDemandPercentageAboveBaseCapacity"],
    ) == (
        "1",
        "0",
    )
    assert form[f"{distribution}.SpotAllocationStrategy"] == "price-capacity-optimized"
    assert len(form["VPCZoneIdentifier"].split(",")) == 3
    wait_for(lambda: len(living(driver)) == 5)
    assert sorted(one.pool.provisioning_model for one in living(driver)) == ["on-demand"] + ["spot"] * 4
    assert {one.tags["holdfast-fleet"] for one in living(driver)} == {"fleet-1"}
    aws.driver().launch_fleet(fleet("maintained", 5, 0.8))
    assert len(living(driver)) == 5 and len(aws.host.ids()) == 5
    driver.end_fleet("fleet-1", "us-east-1")
    wait_for(lambda: living(driver) == [])
    assert templates(aws) == [] and len(aws.host.ids()) == 5


def test_what_is_taken_is_replaced_by_its_like(tmp_path: Path) -> None:
    with AwsEmulator(tmp_path, spot_fates=[Fate(after_seconds=0.5, notice=False)]) as aws:
        driver = aws.driver()
        driver.launch_fleet(fleet("maintained", 2, 0.5))
        wait_for(lambda: [one for one in driver.machines({}) if one.reason == "preempted"])
        wait_for(lambda: sorted(one.pool.provisioning_model for one in living(driver)) == ["on-demand", "spot"])
        assert [one.token for one in driver.fleets({"holdfast-run": "run"})] == ["fleet-1"]
        assert driver.fleets({"holdfast-run": "another"}) == []
        driver.end_fleet("fleet-1", "us-east-1")
        wait_for(lambda: living(driver) == [])


def test_a_group_that_gets_no_machine_is_a_capacity_error_and_is_gone(tmp_path: Path) -> None:
    with AwsEmulator(tmp_path, spot_fates=[Fate(refuse=True)] * 99) as aws:
        driver = aws.driver()
        with pytest.raises(CapacityError, match="capacity"):
            driver.launch_fleet(fleet("maintained", 1, 1.0))
        assert driver.fleets({}) == [] and templates(aws) == [] and aws.host.ids() == []


def test_ending_takes_away_what_a_crash_left_of_a_fleet(aws: AwsEmulator) -> None:
    aws.refuse("CreateAutoScalingGroup", "AccessDenied", status=403)
    driver = aws.driver()
    with pytest.raises(ConfigError, match="autoscaling:CreateAutoScalingGroup"):
        driver.launch_fleet(fleet("maintained", 1, 1.0))
    assert templates(aws) == [fleet_name("fleet-1")]
    for _ in range(2):
        driver.end_fleet("fleet-1", "us-east-1")
    assert templates(aws) == []
