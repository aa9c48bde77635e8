"""Load balancers of the emulated clouds, as an account has them before anything is served."""

from __future__ import annotations

from typing import Any

from tests.emulated.aws import AwsEmulator


def make_target_group(aws: AwsEmulator, name: str = "served", **changes: Any) -> str:
    """Its ARN."""
    [network] = aws.client("ec2").describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    asked: dict[str, Any] = {
        "Name": name,
        "Protocol": "HTTP",
        "Port": 8000,
        "VpcId": network["VpcId"],
        "TargetType": "instance",
        "HealthCheckPath": "/healthz",
        "HealthCheckPort": "8001",
        "HealthCheckIntervalSeconds": 5,
        "UnhealthyThresholdCount": 2,
    }
    [made] = aws.client("elbv2").create_target_group(**{**asked, **changes})["TargetGroups"]
    return made["TargetGroupArn"]
