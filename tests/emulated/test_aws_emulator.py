"""The emulator itself: what it wraps is still there, and what it adds behaves as AWS's documentation says."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import moto
import pytest
from botocore.exceptions import ClientError
from moto.autoscaling.models import FakeAutoScalingGroup
from moto.ec2.models.instances import Instance, InstanceBackend

from holdfast.drivers.local.config import Fate
from tests.contract.machines import wait_for
from tests.emulated import aws_machines
from tests.emulated.aws import REGIONS, AwsEmulator


@pytest.fixture
def aws(tmp_path: Path) -> Iterator[AwsEmulator]:
    with AwsEmulator(tmp_path, spot_fates=[Fate(after_seconds=0.3, notice=False)]) as emulator:
        yield emulator


def test_what_is_wrapped_in_moto_has_the_shape_it_had() -> None:
    assert moto.__version__ == "5.2.5", "read moto's changes to what aws_machines.py wraps, then change this"
    aws_machines.wrap_moto()
    shapes = {
        "terminate": ["self"],
        "run": ["self", "image_id", "count", "user_data", "security_group_names", "kwargs"],
        "reservations": ["self", "filters"],
        "fleet": ["self"],
        "fill": ["self", "count_needed", "propagated_tags"],
        "activities": ["self"],
    }
    assert {name: list(inspect.signature(call).parameters) for name, call in aws_machines.ORIGINAL.items()} == shapes
    aws_machines.wrap_moto()
    assert aws_machines.ORIGINAL["run"] is not InstanceBackend.run_instances
    assert aws_machines.ORIGINAL["run"].__module__ == Instance.__module__
    assert aws_machines.ORIGINAL["fill"].__module__ == FakeAutoScalingGroup.__module__


def run(aws: AwsEmulator, **changes: Any) -> dict[str, Any]:
    image = aws.front.image_ids["us-east-1"]
    given = {"ImageId": image, "InstanceType": "c7i.large", "MinCount": 1, "MaxCount": 1, **changes}
    return aws.client("ec2").run_instances(**given)["Instances"][0]


def described(aws: AwsEmulator, machine_id: str) -> dict[str, Any]:
    return aws.client("ec2").describe_instances(InstanceIds=[machine_id])["Reservations"][0]["Instances"][0]


def refused(code: str) -> Any:
    return pytest.raises(ClientError, match=code)


def test_user_data_really_runs_and_the_end_is_told_as_ec2_tells_it(aws: AwsEmulator) -> None:
    machine_id = run(aws, UserData="#!/bin/bash\necho hello from $((40 + 2))\n")["InstanceId"]
    wait_for(lambda: described(aws, machine_id)["State"]["Name"] == "terminated")
    over = described(aws, machine_id)
    assert over["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"
    assert aws.client("ec2").get_console_output(InstanceId=machine_id)["Output"] == "hello from 42\n"
    taken = run(aws, InstanceMarketOptions={"MarketType": "spot"}, UserData="#!/bin/bash\nsleep 99\n")["InstanceId"]
    wait_for(lambda: described(aws, taken)["State"]["Name"] == "terminated")
    assert described(aws, taken)["StateReason"]["Code"] == "Server.SpotInstanceTermination"
    assert described(aws, taken)["InstanceLifecycle"] == "spot"
    assert aws.client("ec2").describe_volumes()["Volumes"] == []


def test_a_client_token_is_for_one_request(aws: AwsEmulator) -> None:
    script = "#!/bin/bash\nexec sleep 300\n"
    once = run(aws, ClientToken="t", UserData=script)["InstanceId"]
    assert run(aws, ClientToken="t", UserData=script)["InstanceId"] == once
    with refused("IdempotentParameterMismatch"):
        run(aws, ClientToken="t", UserData=script, EbsOptimized=True)
    aws.client("ec2").terminate_instances(InstanceIds=[once])
    wait_for(lambda: described(aws, once)["State"]["Name"] == "terminated")
    with refused("IdempotentInstanceTerminated"):
        run(aws, ClientToken="t", UserData=script)
    assert aws.host.ids() == [once]


def test_what_is_protected_unknown_or_not_there_is_refused_as_by_ec2(aws: AwsEmulator) -> None:
    ec2 = aws.client("ec2")
    machine_id = run(aws, DisableApiTermination=True)["InstanceId"]
    with refused("OperationNotPermitted"):
        ec2.terminate_instances(InstanceIds=[machine_id])
    with refused("InvalidParameterValue"):
        run(aws, InstanceType="no-such.type")
    with refused("InvalidAMIID"):
        run(aws, ImageId="ami-00000000")
    with refused("InvalidParameterValue"):
        run(aws, IamInstanceProfile={"Name": "nobody"})
    with refused("DryRunOperation"):
        run(aws, DryRun=True)
    with refused("InvalidInstanceID.NotFound"):
        ec2.get_console_output(InstanceId="i-00000000000000000")
    assert aws.host.ids() == [machine_id]


def test_spot_prices_are_newest_first_and_reach_back_to_the_start(aws: AwsEmulator) -> None:
    start = datetime.now(UTC) - timedelta(hours=9)
    history = aws.client("ec2").describe_spot_price_history(
        InstanceTypes=["c7i.large"], AvailabilityZone="us-east-1a", StartTime=start
    )["SpotPriceHistory"]
    times = [one["Timestamp"] for one in history]
    assert times == sorted(times, reverse=True) and times[-1] <= start < times[-2]
    assert {one["AvailabilityZone"] for one in history} == {"us-east-1a"}
    assert all(0 < float(one["SpotPrice"]) < 0.0893 for one in history)


def test_s3_is_at_the_same_address_and_the_next_emulator_knows_nothing_of_it(aws: AwsEmulator, tmp_path: Path) -> None:
    s3 = aws.client("s3")
    s3.create_bucket(Bucket="runs")
    s3.put_object(Bucket="runs", Key="a/b", Body=b"x")
    assert s3.get_object(Bucket="runs", Key="a/b")["Body"].read() == b"x"
    assert (aws.calls["PutObject"], aws.calls["GetObject"]) == (1, 1)
    with pytest.raises(AssertionError, match="another AwsEmulator"), AwsEmulator(tmp_path / "second"):
        pass
    assert s3.get_object(Bucket="runs", Key="a/b")["Body"].read() == b"x"


def test_an_emulator_begins_empty_in_every_region(aws: AwsEmulator) -> None:
    assert aws.client("s3").list_buckets()["Buckets"] == []
    for region in REGIONS:
        assert aws.client("ec2", region).describe_instances()["Reservations"] == []
