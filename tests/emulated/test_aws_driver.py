"""What the AWS driver really asks of EC2, and what it makes of the answers, bad ones included."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers.aws import AwsDriver
from holdfast.drivers.aws.launching import client_token
from holdfast.drivers.local.config import Fate
from holdfast.drivers.protocol import CapacityPool, LaunchRequest
from holdfast.errors import CapacityError, ConfigError, CredentialsError, QuotaError, TransientError
from tests.contract.machines import SLEEP, described, ended, wait_for
from tests.emulated.aws import PROFILE, AwsEmulator
from tests.emulated.wire import Wire

SPOT = CapacityPool("aws", "us-east-1", "us-east-1a", "c7i.large", "spot")
ON_DEMAND = CapacityPool("aws", "us-east-1", "us-east-1a", "c7i.large", "on-demand")


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[AwsEmulator]:
    with AwsEmulator(tmp_path) as emulator:
        yield emulator


def asked(token: str = "run-1", pool: CapacityPool = SPOT, script: str = SLEEP, **changes: Any) -> LaunchRequest:
    given: dict[str, Any] = {"tags": {"holdfast-run": "run", "holdfast-attempt": "1"}, "environment": {}, **changes}
    return LaunchRequest(token=token, pool=pool, startup_script=f"#!/bin/bash\n{script}\n", **given)


def sent(aws: AwsEmulator, action: str = "RunInstances") -> dict[str, str]:
    return dict([request for request in aws.requests if request.action == action][-1].parameters)


# -- launching --------------------------------------------------------------------------------------------------------


def test_a_spot_machine_is_asked_for_with_everything_that_keeps_it_safe_and_cheap(aws: AwsEmulator) -> None:
    driver = aws.driver(security_group_ids=["sg-0123456789abcdef0"], kms_key_id="alias/holdfast")
    group = aws.client("ec2").create_security_group(GroupName="holdfast", Description="none is open")["GroupId"]
    driver = aws.driver(security_group_ids=[group], kms_key_id="alias/holdfast")
    machine = driver.launch(asked(disk_gib=123.4))
    form = sent(aws)
    assert (form["MinCount"], form["MaxCount"], form["InstanceType"]) == ("1", "1", "c7i.large")
    assert form["ClientToken"] == "run-1"
    assert form["InstanceMarketOptions.MarketType"] == "spot"
    assert form["InstanceMarketOptions.SpotOptions.SpotInstanceType"] == "one-time"
    assert form["InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior"] == "terminate"
    assert "InstanceMarketOptions.SpotOptions.MaxPrice" not in form
    assert (form["MetadataOptions.HttpTokens"], form["MetadataOptions.HttpPutResponseHopLimit"]) == ("required", "1")
    assert form["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert form["IamInstanceProfile.Name"] == PROFILE
    volume = {
        key.rpartition(".")[2]: value for key, value in form.items() if key.startswith("BlockDeviceMapping.1.Ebs")
    }
    assert volume == {
        "Encrypted": "true",
        "VolumeType": "gp3",
        "VolumeSize": "124",
        "DeleteOnTermination": "true",
        "KmsKeyId": "alias/holdfast",
    }
    (image,) = aws.client("ec2").describe_images(ImageIds=[form["ImageId"]])["Images"]
    assert form["BlockDeviceMapping.1.DeviceName"] == image["RootDeviceName"]
    (subnet,) = aws.client("ec2").describe_subnets(SubnetIds=[form["SubnetId"]])["Subnets"]
    assert subnet["AvailabilityZone"] == "us-east-1a"
    assert form["SecurityGroupId.1"] == group
    assert base64.b64decode(form["UserData"]).decode() == f"#!/bin/bash\n{SLEEP}\n"
    kinds = {form[f"TagSpecification.{number}.ResourceType"] for number in (1, 2)}
    assert kinds == {"instance", "volume"}
    wanted = {"holdfast-run": "run", "holdfast-token": "run-1", "ResourceType": "Spot", "Name": "holdfast run-1"}
    assert wanted.items() <= machine.tags.items()
    (volume_of,) = aws.client("ec2").describe_volumes(
        Filters=[{"Name": "attachment.instance-id", "Values": [machine.id]}]
    )["Volumes"]
    assert wanted.items() <= {tag["Key"]: tag["Value"] for tag in volume_of["Tags"]}.items()


def test_an_on_demand_machine_has_no_market_options_and_says_so(aws: AwsEmulator) -> None:
    machine = aws.driver().launch(asked(pool=ON_DEMAND))
    assert not [key for key in sent(aws) if key.startswith("InstanceMarketOptions")]
    assert machine.tags["ResourceType"] == "OnDemand"


def test_a_launch_template_gives_what_the_account_does_not_say_and_keeps_its_interface(aws: AwsEmulator) -> None:
    ec2 = aws.client("ec2")
    image = ec2.describe_images(Owners=["amazon"])["Images"][-1]["ImageId"]
    group = ec2.create_security_group(GroupName="holdfast", Description="none is open")["GroupId"]
    data = {"ImageId": image, "NetworkInterfaces": [{"DeviceIndex": 0, "Groups": [group], "DeleteOnTermination": True}]}
    ec2.create_launch_template(LaunchTemplateName="ours", LaunchTemplateData=data)
    aws.driver(launch_template="ours:1").launch(asked())
    form = sent(aws)
    assert (form["LaunchTemplate.LaunchTemplateName"], form["LaunchTemplate.Version"]) == ("ours", "1")
    assert form["ImageId"] == image
    assert form["NetworkInterface.1.SubnetId"].startswith("subnet-") and "SubnetId" not in form
    assert form["InstanceMarketOptions.MarketType"] == "spot"
    with pytest.raises(ConfigError, match=r"launch_template 'theirs'"):
        aws.driver(launch_template="theirs").launch(asked("run-2"))


def test_the_highest_spot_price_is_a_share_of_the_on_demand_price(aws: AwsEmulator) -> None:
    aws.driver(max_spot_price_share=0.5).launch(asked())
    assert sent(aws)["InstanceMarketOptions.SpotOptions.MaxPrice"] == "0.044650"


def test_a_refusal_costs_one_call_and_no_wait(tmp_path: Path) -> None:
    with AwsEmulator(tmp_path, spot_fates=[Fate(refuse=True)]) as aws:
        driver = aws.driver()
        driver.offers()
        began = time.monotonic()
        with pytest.raises(CapacityError, match=r"us-east-1a/c7i\.large/spot"):
            driver.launch(asked())
        assert aws.calls["RunInstances"] == 1
        assert time.monotonic() - began < 2


def test_throttling_is_waited_out_and_a_lasting_outage_is_transient(aws: AwsEmulator) -> None:
    driver = aws.driver()
    aws.refuse("RunInstances", "RequestLimitExceeded", status=503, count=2)
    driver.launch(asked())
    assert aws.calls["RunInstances"] == 3
    aws.refuse("RunInstances", "InternalError", status=500, count=99)
    with pytest.raises(TransientError, match="ec2:RunInstances"):
        driver.launch(asked("run-2"))
    assert aws.calls["RunInstances"] == 7


def test_a_lost_answer_and_its_repetition_make_one_machine(tmp_path: Path) -> None:
    with AwsEmulator(tmp_path, wire=Wire) as aws:
        aws.wire.inject("lost", when=lambda request: request.action == "RunInstances")
        machine = aws.driver().launch(asked())
        assert (aws.wire.calls()["RunInstances"], aws.calls["RunInstances"]) == (2, 2)
        assert [one.id for one in aws.driver().machines({})] == [machine.id]
        assert aws.host.ids() == [machine.id]


def test_however_calls_fail_each_token_has_one_machine(tmp_path: Path) -> None:
    with AwsEmulator(tmp_path, wire=lambda url: Wire(url, probability=0.3, seed=7)) as aws:
        driver = aws.driver(client_parameters={"endpoint_url": aws.endpoint, "config": {"retries": QUICK}})
        tokens = {f"run-{number}" for number in range(8)}
        for token in sorted(tokens):
            wait_for(lambda token=token: launched_or_not(driver, token))
        aws.wire.heal()
        assert sorted(machine.tags["holdfast-token"] for machine in driver.machines({})) == sorted(tokens)
        assert len(aws.host.ids()) == len(tokens)
        assert sum(bool(request.fault) for request in aws.wire.requests) > 5


QUICK = {"mode": "standard", "total_max_attempts": 2}


def launched_or_not(driver: AwsDriver, token: str) -> bool:
    try:
        return bool(driver.launch(asked(token)).id)
    except TransientError:
        return False


def test_threads_that_launch_the_same_attempt_get_the_same_machine(aws: AwsEmulator) -> None:
    driver = aws.driver()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(driver.launch(asked()).id)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1 and aws.host.ids() == found[:1]


def test_a_launch_that_differs_in_a_tag_adopts_the_machine_of_its_token(aws: AwsEmulator) -> None:
    """As after a crash between launch and journal: the lease in the tags is another one then."""
    once = aws.driver().launch(asked(tags={"holdfast-run": "run", "holdfast-lease": "1"}))
    again = aws.driver().launch(asked(tags={"holdfast-run": "run", "holdfast-lease": "2"}))
    assert (again.id, again.launched_at) == (once.id, once.launched_at)
    assert aws.host.ids() == [once.id]


def test_a_launch_whose_machine_has_ended_returns_the_ended_machine(aws: AwsEmulator) -> None:
    once = aws.driver().launch(asked(script="true"))
    over = ended(aws.driver(), once)
    again = aws.driver().launch(asked(script="true"))
    assert (again.id, again.state, again.reason) == (over.id, "terminated", "ended-itself")
    assert again.terminated_at


def test_a_machine_that_is_hidden_is_waited_for_before_it_is_adopted(aws: AwsEmulator) -> None:
    aws.hide_new_machines(1.5)
    once = aws.driver().launch(asked(tags={"holdfast-run": "run", "holdfast-lease": "1"}))
    again = aws.driver().launch(asked(tags={"holdfast-run": "run", "holdfast-lease": "2"}))
    assert again.id == once.id and aws.host.ids() == [once.id]


def test_a_launch_whose_machine_is_forgotten_makes_no_other(aws: AwsEmulator) -> None:
    once = aws.driver().launch(asked(script="true"))
    ended(aws.driver(), once)
    aws.forget_machine(once.id)
    with pytest.raises(CapacityError, match="ended so long ago"):
        aws.driver().launch(asked(script="true"))
    assert aws.host.ids() == [once.id]


def test_long_tokens_become_their_hash() -> None:
    assert client_token("run-1") == "run-1"
    for token in ("run-" + "x" * 70, "über-1"):
        assert len(client_token(token)) == 64 and client_token(token).isascii()
    assert client_token("a" * 65) != client_token("a" * 66)


def test_what_can_never_be_launched_is_refused_before_anything_is_asked(aws: AwsEmulator) -> None:
    driver = aws.driver()
    with pytest.raises(ConfigError, match=r"16384 of user data"):
        driver.launch(asked(script="x" * 17_000))
    with pytest.raises(ConfigError, match="'holdfast-job'"):
        driver.launch(asked(tags={"holdfast-job": "x" * 257}))
    with pytest.raises(ConfigError, match="'eu-west-1'"):
        driver.launch(asked(pool=CapacityPool("aws", "eu-west-1", "eu-west-1a", "c7i.large", "spot")))
    with pytest.raises(ConfigError, match="us-east-1z"):
        driver.launch(asked(pool=CapacityPool("aws", "us-east-1", "us-east-1z", "c7i.large", "spot")))
    assert aws.calls["RunInstances"] == 0


# -- describing -------------------------------------------------------------------------------------------------------


def test_a_machine_that_ec2_does_not_show_yet_is_pending_and_can_t_be_lost(aws: AwsEmulator) -> None:
    aws.hide_new_machines(1.5)
    driver = aws.driver()
    machine = driver.launch(asked())
    assert aws.driver().machines({}) == []  # another process can't know it
    assert [(one.id, one.state) for one in driver.machines({"holdfast-run": "run"})] == [(machine.id, "pending")]
    with pytest.raises(TransientError, match="terminate it again"):
        driver.terminate(machine.id, machine.pool)
    assert driver.console(machine.id, machine.pool) == ""
    wait_for(lambda: described(driver, machine).state == "running")
    assert len(driver.machines({})) == 1


def test_a_machine_that_ec2_forgets_stays_as_it_was_last_seen(aws: AwsEmulator) -> None:
    driver = aws.driver()
    machine = driver.launch(asked(script="true"))
    over = ended(driver, machine)
    aws.forget_machine(machine.id)
    assert driver.machines({}) == [over]
    assert aws.driver().machines({}) == []


def test_descriptions_are_paged_through(aws: AwsEmulator) -> None:
    aws.serve_pages_of(2)
    driver = aws.driver()
    machines = {driver.launch(asked(f"run-{number}", script="true")).id for number in range(5)}
    assert {machine.id for machine in aws.driver().machines({})} == machines
    assert aws.calls["DescribeInstances"] == 3


def test_ten_threads_share_one_description(aws: AwsEmulator) -> None:
    driver = aws.driver()
    machine = driver.launch(asked())
    aws.delay("DescribeInstances", 0.5)
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append([one.id for one in driver.machines({"holdfast-run": "run"})]))
        for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[machine.id]] * 10
    assert aws.calls["DescribeInstances"] == 1
    driver.machines({}, max_age_seconds=60)
    assert aws.calls["DescribeInstances"] == 1
    driver.machines({})
    assert aws.calls["DescribeInstances"] == 2


def test_a_description_that_fails_fails_for_all_who_wait_for_it_and_is_asked_for_again(aws: AwsEmulator) -> None:
    driver = aws.driver()
    aws.refuse("DescribeInstances", "ExpiredToken", count=1)
    with pytest.raises(CredentialsError):
        driver.machines({}, max_age_seconds=60)
    assert driver.machines({}, max_age_seconds=60) == []


def test_machines_of_all_regions_are_found_and_of_another_cloud_none(aws: AwsEmulator) -> None:
    driver = aws.driver(regions=["us-east-1", "us-west-2"])
    there = driver.launch(asked("run-1", CapacityPool("aws", "us-west-2", "us-west-2b", "c7i.large", "spot")))
    here = driver.launch(asked("run-2"))
    assert {machine.id: machine.pool.region for machine in driver.machines({})} == {
        here.id: "us-east-1",
        there.id: "us-west-2",
    }
    assert driver.machines({}, cloud="gcp") == []
    assert len(driver.machines({}, cloud="aws")) == 2


def test_machines_that_are_not_ours_are_never_shown(aws: AwsEmulator) -> None:
    image = aws.front.image_ids["us-east-1"]
    aws.client("ec2").run_instances(ImageId=image, InstanceType="c7i.large", MinCount=1, MaxCount=1)
    assert aws.driver().machines({}) == []


# -- ending -----------------------------------------------------------------------------------------------------------


def test_protection_is_removed_where_it_is_what_refuses(aws: AwsEmulator) -> None:
    driver = aws.driver()
    machine = driver.launch(asked(pool=ON_DEMAND))
    aws.client("ec2").modify_instance_attribute(InstanceId=machine.id, DisableApiTermination={"Value": True})
    driver.terminate(machine.id, machine.pool)
    over = ended(driver, machine)
    assert over.reason == "terminated-by-user"
    assert over.terminated_at and over.terminated_at.microsecond == 0  # EC2's own time


def test_a_console_is_cut_to_its_last_64_kib(aws: AwsEmulator) -> None:
    driver = aws.driver()
    machine = driver.launch(asked(script="head -c 100000 /dev/zero | tr '\\0' x; echo; echo end"))
    ended(driver, machine)
    said = driver.console(machine.id, machine.pool)
    assert len(said) <= 64 * 1024 and said.endswith("x\nend\n")


# -- the market -------------------------------------------------------------------------------------------------------


def test_prices_come_from_the_price_list_and_the_spot_history_and_are_kept(aws: AwsEmulator) -> None:
    driver = aws.driver(usd_per_hour={"m7i.2xlarge": 0.3})
    offers = {(offer.pool.instance_type, offer.pool.provisioning_model): offer for offer in driver.offers()}
    assert offers["c7i.large", "on-demand"].usd_per_hour == pytest.approx(0.0893)
    assert offers["m7i.2xlarge", "on-demand"].usd_per_hour == 0.3
    gpu = offers["g5.xlarge", "spot"]
    assert (gpu.gpus, gpu.gpu_name, gpu.vcpus, gpu.memory_gib) == (1, "A10G", 4, 16)
    assert gpu.interruptions_per_hour > offers["c7i.large", "spot"].interruptions_per_hour > 0
    assert offers["c7i.large", "on-demand"].interruptions_per_hour == 0
    before = dict(aws.calls)
    driver.offers()
    assert dict(aws.calls) == before
    assert before["GetProducts"] == 2 and before["DescribeSpotPriceHistory"] == 1


def test_without_the_price_list_a_dated_table_is_used_and_it_is_said(aws: AwsEmulator) -> None:
    aws.deny("GetProducts", "GetSpotPlacementScores")
    driver = aws.driver()
    assert all(offer.usd_per_hour > 0 for offer in driver.offers())
    findings = {finding.subject: finding for finding in driver.examine()}
    prices = findings["prices us-east-1"]
    assert prices.ok and "table of November 2026" in prices.detail and "pricing:GetProducts" in prices.detail
    scores = findings["placement scores"]
    assert scores.ok and "ec2:GetSpotPlacementScores" in scores.detail


def test_the_price_that_held_at_the_start_is_known_and_history_is_paged_through(aws: AwsEmulator) -> None:
    aws.serve_pages_of(3)
    now = datetime.now(UTC)
    points = aws.driver().price_history(SPOT, now - timedelta(hours=30), now)
    assert points[0].at <= now - timedelta(hours=30) < points[1].at
    assert [point.at for point in points] == sorted(point.at for point in points)
    assert 8 <= len(points) <= 9 and len({point.usd_per_hour for point in points}) > 3
    assert aws.calls["DescribeSpotPriceHistory"] == 3
    (point,) = aws.driver().price_history(ON_DEMAND, now - timedelta(hours=30), now)
    assert point.at == now - timedelta(hours=30)


# -- examining --------------------------------------------------------------------------------------------------------


def test_the_examination_names_every_missing_permission_and_launches_nothing(aws: AwsEmulator) -> None:
    aws.deny("TerminateInstances", "RunInstances")
    findings = {finding.subject: finding for finding in aws.driver().examine()}
    for action in ("RunInstances", "TerminateInstances"):
        finding = findings[f"ec2:{action} us-east-1"]
        assert not finding.ok
        assert f'{{"Effect": "Allow", "Action": "ec2:{action}", "Resource": "*"}}' in finding.detail
    assert findings["ec2:DescribeInstances us-east-1"].ok
    assert "123456789012" in findings["credentials"].detail
    assert aws.host.ids() == []
    with pytest.raises(ConfigError, match="ec2:RunInstances"):
        aws.driver().check()


def test_a_permission_that_is_granted_for_our_machines_alone_is_granted(aws: AwsEmulator) -> None:
    """As deployments/aws-orchestrator-policy.json grants it: the tag is a condition."""
    aws.allow_for_tagged_machines_only("TerminateInstances", "ModifyInstanceAttribute", "GetConsoleOutput")
    findings = {finding.subject: finding for finding in aws.driver().examine()}
    assert findings["ec2:TerminateInstances us-east-1"].ok
    assert "machines of Holdfast" in findings["ec2:GetConsoleOutput us-east-1"].detail
    aws.deny("SimulatePrincipalPolicy")
    findings = {finding.subject: finding for finding in aws.driver().examine()}
    finding = findings["ec2:TerminateInstances us-east-1"]
    assert not finding.ok and "iam:SimulatePrincipalPolicy" in finding.detail


def test_the_examination_ends_with_the_credentials_where_they_are_not_accepted(aws: AwsEmulator) -> None:
    aws.refuse("GetCallerIdentity", "InvalidClientTokenId", status=403, count=99)
    (finding,) = aws.driver().examine()
    assert (finding.subject, finding.ok) == ("credentials", False)
    with pytest.raises(CredentialsError):
        aws.driver().check()


def test_zones_without_a_subnet_are_told_and_regions_without_zones_are_left_alone(aws: AwsEmulator) -> None:
    driver = aws.driver(regions=["us-east-1", "us-west-2"], zones=["us-east-1a", "us-east-1-bos-1a"])
    findings = {finding.subject: finding for finding in driver.examine()}
    assert "us-east-1-bos-1a have no subnet" in findings["subnets us-east-1"].detail
    assert "image us-west-2" not in findings
    assert {offer.pool.zone for offer in driver.offers()} == {"us-east-1a"}


def test_an_empty_quota_an_unknown_image_and_a_misplaced_subnet_are_findings(aws: AwsEmulator) -> None:
    aws.set_quota("L-3819A6DF", 0)
    subnets = aws.client("ec2").describe_subnets(Filters=[{"Name": "availability-zone", "Values": ["us-east-1b"]}])
    wrong = {"us-east-1a": subnets["Subnets"][0]["SubnetId"]}
    findings = [one for one in aws.driver(image="ami-00000000", subnets=wrong).examine() if not one.ok]
    said = {finding.subject: finding.detail for finding in findings}
    assert "L-3819A6DF" in said["quota us-east-1"] and "g5.xlarge" in said["quota us-east-1"]
    assert "image 'ami-00000000'" in said["image us-east-1"]
    assert "us-east-1b, not in us-east-1a" in said["subnets us-east-1"]


def test_a_quota_is_named_with_its_code_and_the_place_where_it_is_raised(aws: AwsEmulator) -> None:
    driver = aws.driver()
    aws.refuse("RunInstances", "MaxSpotInstanceCountExceeded", "Max spot instance count exceeded")
    with pytest.raises(QuotaError, match=r"L-34B43A08.*us-east-1\.console\.aws\.amazon\.com/servicequotas"):
        driver.launch(asked())
    assert aws.calls["RunInstances"] == 1
