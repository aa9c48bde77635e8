"""Every refusal of AWS becomes the error that says what to do next; no message holds a secret."""

from __future__ import annotations

import logging
import math
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import exceptions as boto
from botocore.exceptions import ClientError

from holdfast.drivers.aws import AwsConfig, AwsDriver
from holdfast.drivers.aws.config import DEEP_LEARNING_IMAGE
from holdfast.drivers.aws.describe import REASONS, machine_of
from holdfast.drivers.aws.errors import quota_of, translate, translated
from holdfast.drivers.protocol import CapacityPool
from holdfast.errors import CapacityError, ConfigError, CredentialsError, HoldfastError, QuotaError, TransientError
from tests.emulated.aws import ACCESS_KEY, SECRET_KEY, SESSION_TOKEN, AwsEmulator
from tests.emulated.wire import Wire

POOL = CapacityPool("aws", "us-east-1", "us-east-1a", "g5.xlarge", "spot")
CONFIG = AwsConfig(
    regions=["us-east-1"],
    image="ami-0123456789abcdef0",
    instance_profile="holdfast-machine",
    kms_key_id="alias/ours",
    launch_template="ours",
    subnets={"us-east-1a": "subnet-0123456789abcdef0"},
    security_group_ids=["sg-0123456789abcdef0"],
)


def answered(code: str, message: str = "words", status: int = 400, action: str = "RunInstances") -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[arg-type]
        action,
    )


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (answered("InsufficientInstanceCapacity", status=500), CapacityError, "us-east-1a/g5.xlarge/spot"),
        (answered("Server.InsufficientInstanceCapacity", status=500), CapacityError, "us-east-1a"),
        (answered("InsufficientFreeAddressesInSubnet"), CapacityError, "us-east-1a"),
        (answered("SpotMaxPriceTooLow"), CapacityError, "us-east-1a"),
        (answered("Unsupported"), CapacityError, "us-east-1a"),
        (answered("UnfulfillableCapacity"), CapacityError, "us-east-1a"),
        (answered("MaxSpotInstanceCountExceeded"), QuotaError, "L-3819A6DF"),
        (answered("VcpuLimitExceeded"), QuotaError, "All G and VT Spot"),
        (answered("VolumeLimitExceeded"), QuotaError, "Service Quotas console"),
        (answered("RequestLimitExceeded", status=503), TransientError, "ec2:RunInstances"),
        (answered("Throttling"), TransientError, "Throttling"),
        (answered("SomethingNew", status=503), TransientError, "503|SomethingNew"),
        (answered("InternalError", status=500), TransientError, "may work shortly"),
        (answered("ExpiredToken"), CredentialsError, "renew them"),
        (answered("RequestExpired"), CredentialsError, "renew them"),
        (answered("InvalidClientTokenId", status=403), CredentialsError, "renew them"),
        (answered("AuthFailure", status=401), CredentialsError, "renew them"),
        (answered("AuthFailure", "Not authorized for images: [ami-1]"), ConfigError, "image 'ami-0123456789abcdef0'"),
        (answered("InvalidAMIID.NotFound"), ConfigError, "image 'ami-0123456789abcdef0'"),
        (answered("ParameterNotFound", action="GetParameter"), ConfigError, "image "),
        (answered("InvalidSubnetID.NotFound"), ConfigError, "subnets .*subnet-0123456789abcdef0"),
        (answered("InvalidGroup.NotFound"), ConfigError, "security_group_ids .*sg-0123456789abcdef0"),
        (answered("InvalidLaunchTemplateName.NotFoundException"), ConfigError, "launch_template 'ours'"),
        (answered("InvalidKMSKey.InvalidState"), ConfigError, "kms_key_id 'alias/ours'"),
        (answered("InvalidBlockDeviceMapping"), ConfigError, "volume_gib"),
        (
            answered("InvalidParameterValue", "Invalid IAM Instance Profile name"),
            ConfigError,
            "instance_profile 'holdf",
        ),
        (answered("InvalidParameterValue", "Invalid value 'g5.huge' for InstanceType"), ConfigError, r"g5\.huge"),
        (answered("OptInRequired", "accept the terms"), ConfigError, "accept the terms"),
        (answered("PendingVerification"), TransientError, "may work shortly"),
        (answered("NeverHeardOf"), ConfigError, "NeverHeardOf"),
        (boto.NoCredentialsError(), CredentialsError, "no usable AWS credentials"),
        (boto.UnauthorizedSSOTokenError(), CredentialsError, "log in again"),
        (boto.EndpointConnectionError(endpoint_url="https://x"), TransientError, "can't be reached"),
        (boto.ReadTimeoutError(endpoint_url="https://x"), TransientError, "can't be reached"),
        (boto.ConnectionClosedError(endpoint_url="https://x"), TransientError, "can't be reached"),
        (boto.NoRegionError(), ConfigError, "region"),
        (boto.ProfileNotFound(profile="theirs"), ConfigError, "theirs"),
        (boto.ParamValidationError(report="Unknown parameter"), ConfigError, "Unknown parameter"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, Exception) else "",
)
def test_the_error_says_what_to_do(error: Exception, kind: type[HoldfastError], says: str) -> None:
    raised = translate(error, "ec2", CONFIG, POOL)
    assert type(raised) is kind
    with pytest.raises(kind, match=says):
        raise raised


DENIED = (
    "You are not authorized to perform this operation. User: arn:aws:iam::123456789012:user/ann is not authorized to "
    "perform: iam:PassRole on resource: arn:aws:iam::123456789012:role/holdfast-machine because no identity-based policy "
    "allows the iam:PassRole action. Encoded authorization failure message: 4GtNnKq0Rzv3"
)


def test_a_missing_permission_is_named_with_the_line_that_grants_it() -> None:
    said = str(translate(answered("UnauthorizedOperation", DENIED, 403), "ec2", CONFIG, POOL))
    assert "arn:aws:iam::123456789012:user/ann may not iam:PassRole" in said
    assert '{"Effect": "Allow", "Action": "iam:PassRole", "Resource": "*"}' in said
    assert "deployments/aws-orchestrator-policy.json" in said and "4GtNnKq0Rzv3" not in said
    said = str(translate(answered("AccessDeniedException", "no", 400, "GetProducts"), "pricing", CONFIG))
    assert "may not pricing:GetProducts" in said
    barred = DENIED.replace("no identity-based policy allows the iam:PassRole action", "of an explicit deny")
    assert "service control policy" in str(translate(answered("UnauthorizedOperation", barred), "ec2", CONFIG))


def test_no_key_or_token_reaches_a_message_or_a_traceback() -> None:
    words = f"The request signature does not match. x-amz-security-token:{SESSION_TOKEN} Credential={ACCESS_KEY}/2026"
    try:
        with translated("ec2", CONFIG):
            raise answered("SignatureDoesNotMatch", words, 403)
    except CredentialsError as error:
        printed = "".join(traceback.format_exception(error))
    assert SESSION_TOKEN not in printed and ACCESS_KEY not in printed
    said = str(translate(answered("NeverHeardOf", words), "ec2", CONFIG))
    assert SESSION_TOKEN not in said and ACCESS_KEY not in said


def test_credentials_reach_no_log_whatever_happens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with AwsEmulator(tmp_path) as aws:
        driver = aws.driver()
        for code in ("ExpiredToken", "UnauthorizedOperation", "InternalError"):
            aws.refuse("DescribeInstances", code, f"for {ACCESS_KEY}", count=9, status=500 if code[0] == "I" else 403)
            with pytest.raises(HoldfastError) as raised:
                driver.machines({})
            aws.front.injected.clear()
            caplog.set_level(logging.INFO)
            assert ACCESS_KEY not in str(raised.value)
        printed = [finding.detail for finding in driver.examine()] + [repr(driver.config)]
    for secret in (ACCESS_KEY, SECRET_KEY, SESSION_TOKEN):
        assert secret not in caplog.text and not [text for text in printed if secret in text]


def test_a_session_without_credentials_is_told_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    nowhere = {"endpoint_url": "http://127.0.0.1:9"}
    driver = AwsDriver(AwsConfig(regions=["us-east-1"], client_parameters=nowhere), boto3.Session())
    with pytest.raises(CredentialsError, match="no usable AWS credentials"):
        driver.machines({})
    (finding,) = driver.examine()
    assert (finding.subject, finding.ok) == ("credentials", False)


def test_a_cloud_that_does_not_answer_is_transient() -> None:
    nowhere = {"endpoint_url": "http://127.0.0.1:9", "config": {"retries": {"total_max_attempts": 1}}}
    session = boto3.Session(aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY)
    with pytest.raises(TransientError, match="can't be reached"):
        AwsDriver(AwsConfig(regions=["us-east-1"], client_parameters=nowhere), session).machines({})


# -- quotas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "spot", "on_demand"),
    [
        ("c7i.large", "L-34B43A08", "L-1216C47A"),
        ("g6e.xlarge", "L-3819A6DF", "L-DB2E81BA"),
        ("p4d.24xlarge", "L-7212CCBC", "L-417A185B"),
        ("p5.48xlarge", "L-C4BD4855", "L-417A185B"),
    ],
)
def test_a_machine_type_counts_against_its_own_quota(kind: str, spot: str, on_demand: str) -> None:
    for model, code in (("spot", spot), ("on-demand", on_demand)):
        assert quota_of(CapacityPool("aws", "us-east-1", "us-east-1a", kind, model))[0] == code  # type: ignore[arg-type]


# -- what an instance's end means -------------------------------------------------------------------------------------


def instance(code: str = "", transition: str = "", state: str = "terminated", **changes: Any) -> dict[str, Any]:
    return {
        "InstanceId": "i-0123456789abcdef0",
        "InstanceType": "g5.xlarge",
        "Placement": {"AvailabilityZone": "us-east-1a"},
        "State": {"Name": state},
        "LaunchTime": datetime(2026, 11, 24, 20, 0, tzinfo=UTC),
        "StateReason": {"Code": code, "Message": f"{code}: words"} if code else {},
        "StateTransitionReason": transition,
        **changes,
    }


@pytest.mark.parametrize(
    ("code", "transition", "reason"),
    [
        ("Server.SpotInstanceTermination", "Server.SpotInstanceTermination", "preempted"),
        ("Server.SpotInstanceShutdown", "", "preempted"),
        ("", "Server.SpotInstanceTermination (2026-11-24 21:00:00 GMT)", "preempted"),
        ("Client.InstanceInitiatedShutdown", "", "ended-itself"),
        ("Client.UserInitiatedShutdown", "User initiated (2026-11-24 21:00:00 GMT)", "terminated-by-user"),
        ("", "User initiated (2026-11-24 21:00:00 GMT)", "terminated-by-user"),
        ("Server.InternalError", "Server.InternalError", "host-failed"),
        ("Server.ScheduledStop", "", "host-failed"),
        ("Server.InsufficientInstanceCapacity", "", "preempted"),
        ("Server.NeverHeardOf", "", "host-failed"),
        ("Client.InternalError", "Client.InternalError", "host-failed"),
        ("", "", ""),
    ],
)
def test_every_end_has_its_reason(code: str, transition: str, reason: str) -> None:
    assert machine_of(instance(code, transition), "us-east-1").reason == reason


def test_an_answer_that_is_no_aws_answer_may_be_another_next_time(tmp_path: Path) -> None:
    with AwsEmulator(tmp_path, wire=Wire) as aws:
        driver = aws.driver()
        page = b"<html><body><h1>Bad gateway</h1></body></html><p>"
        aws.wire.inject("error", when=lambda request: request.service == "ec2", count=math.inf, status=200, body=page)
        with pytest.raises(TransientError, match="ec2"):
            driver.machines({})


def test_every_documented_code_has_a_reason() -> None:
    """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_StateReason.html"""
    client = {"InstanceInitiatedShutdown", "InstanceTerminated", "InternalError", "InvalidSnapshot.NotFound"}
    client |= {"UserInitiatedHibernate", "UserInitiatedShutdown", "VolumeLimitExceeded"}
    server = {"InsufficientInstanceCapacity", "InternalError", "ScheduledStop", "SpotInstanceShutdown"}
    server |= {"SpotInstanceTermination"}
    assert {f"Client.{name}" for name in client} | {f"Server.{name}" for name in server} <= set(REASONS)


def test_the_end_s_time_is_ec2_s_own_where_it_tells_it() -> None:
    told = machine_of(instance("", "User initiated (2026-11-24 21:00:00 GMT)"), "us-east-1")
    assert told.terminated_at == datetime(2026, 11, 24, 21, tzinfo=UTC)
    assert machine_of(instance("Server.SpotInstanceTermination"), "us-east-1").terminated_at is None
    living = machine_of(instance("", "", "running", InstanceLifecycle="spot"), "us-east-1")
    assert (living.state, living.reason, living.detail, living.pool.provisioning_model) == ("running", "", "", "spot")
    stopped = machine_of(instance("Client.UserInitiatedShutdown", "", "stopped"), "us-east-1")
    assert (stopped.state, stopped.reason) == ("stopping", "")


# -- the account's settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"regions": ["Virginia"]}, "regions 'Virginia'.*us-east-1"),
        ({"zones": ["us-east-1"]}, "zones 'us-east-1'"),
        ({"zones": ["eu-west-1a"]}, "zones 'eu-west-1a'.*add its region"),
        ({"subnets": {"us-east-1a": "vpc-1"}}, "subnets 'vpc-1'"),
        ({"subnets": {"eu-west-1a": "subnet-01234567"}}, "subnets 'eu-west-1a'"),
        ({"security_group_ids": ["default"]}, "security_group_ids 'default'.*not names"),
        ({"image": "ami-xyz"}, "image 'ami-xyz'"),
        ({"image": "ami-01234567", "regions": ["us-east-1", "us-west-2"]}, "an AMI of one region"),
        ({"image": "no spaces"}, "image 'no spaces'"),
        ({"instance_types": ["large"]}, "instance_types 'large'"),
        ({"instance_profile": "arn:aws:iam::1:instance-profile/x"}, "instance_profile .*not its ARN"),
        ({"launch_template": "x"}, "launch_template 'x'"),
        ({"client_parameters": {"aws_secret_access_key": "planted"}}, "client_parameters aws_secret_access_key"),
    ],
)
def test_what_can_t_be_right_is_named_with_its_remedy(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        AwsConfig(**{"regions": ["us-east-1"], **changes})
    assert "planted" not in str(raised.value)


def test_an_account_needs_a_region_and_no_more() -> None:
    config = AwsConfig(regions=["us-east-1", "us-west-2", "us-east-1"])
    assert config.regions == ["us-east-1", "us-west-2"] and config.image == DEEP_LEARNING_IMAGE
    assert config.region_of("us-west-2b") == "us-west-2"
    assert config.region_of("us-east-1-bos-1a") == "us-east-1"
    assert config.region_of("us-east-12a") == ""
