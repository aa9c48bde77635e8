"""What a machine is asked for with: every parameter of RunInstances, and the same for a fleet's launch template."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from holdfast.drivers.aws.config import AwsConfig
from holdfast.drivers.aws.places import Places
from holdfast.drivers.protocol import CapacityPool, LaunchRequest
from holdfast.errors import ConfigError

TOKEN_TAG = "holdfast-token"
RUN_TAG = "holdfast-run"
USER_DATA_BYTES = 16 * 1024
TOKEN_CHARACTERS = 64
TAG_VALUE_CHARACTERS = 256
RESOURCE_TYPES = {"spot": "Spot", "on-demand": "OnDemand"}


def client_token(token: str) -> str:
    """EC2 takes 64 ASCII characters: a longer token becomes its hash."""
    if len(token) <= TOKEN_CHARACTERS and token.isascii():
        return token
    return hashlib.sha256(token.encode()).hexdigest()


def user_data(script: str) -> str:
    size = len(script.encode())
    if size > USER_DATA_BYTES:
        raise ConfigError(
            f"the start-up script is {size} bytes, and EC2 takes {USER_DATA_BYTES} of user data; pass fewer or shorter "
            "environment variables, or keep them in the bundle"
        )
    return script


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    for key, value in tags.items():
        if len(key) > 128 or len(value) > TAG_VALUE_CHARACTERS or key.lower().startswith("aws:"):
            raise ConfigError(
                f"tag {key!r} has {len(value)} characters; EC2 takes keys of 128 that don't begin with aws:, and values of "
                f"{TAG_VALUE_CHARACTERS}"
            )
    return [{"Key": key, "Value": value} for key, value in sorted(tags.items())]


def tag_specifications(tags: Mapping[str, str]) -> list[dict[str, Any]]:
    listed = tag_list(tags)
    return [{"ResourceType": kind, "Tags": listed} for kind in ("instance", "volume")]


def common_parameters(config: AwsConfig, places: Places, region: str, disk_gib: float) -> dict[str, Any]:
    """What every machine has, whatever its pool: RunInstances and launch templates spell it alike."""
    image = places.image(region)
    volume: dict[str, Any] = {
        "VolumeType": "gp3",
        "Encrypted": True,
        "DeleteOnTermination": True,
        "VolumeSize": math.ceil(max(disk_gib, config.volume_gib, image.root_gib, 8)),
    }
    if config.kms_key_id:
        volume["KmsKeyId"] = config.kms_key_id
    parameters: dict[str, Any] = {
        "ImageId": image.id,
        "InstanceInitiatedShutdownBehavior": "terminate",
        # No hop beyond the machine itself: a container that is not on the host's network gets no credentials.
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "BlockDeviceMappings": [{"DeviceName": image.root_device, "Ebs": volume}],
    }
    if config.instance_profile:
        parameters["IamInstanceProfile"] = {"Name": config.instance_profile}
    return parameters


def run_parameters(
    config: AwsConfig, places: Places, request: LaunchRequest, max_usd_per_hour: float | None
) -> dict[str, Any]:
    """For RunInstances. `max_usd_per_hour`: of a spot machine; None leaves it at the on-demand price, AWS's default."""
    pool = request.pool
    tags = {
        "Name": f"holdfast {request.token}"[:TAG_VALUE_CHARACTERS],
        "ResourceType": RESOURCE_TYPES[pool.provisioning_model],
        **request.tags,
        TOKEN_TAG: request.token[:TAG_VALUE_CHARACTERS],
    }
    parameters = {
        **common_parameters(config, places, pool.region, request.disk_gib),
        **network_parameters(config, places, pool),
        "MinCount": 1,
        "MaxCount": 1,
        "InstanceType": pool.instance_type,
        "ClientToken": client_token(request.token),
        "UserData": user_data(request.startup_script),
        "TagSpecifications": tag_specifications(tags),
    }
    if config.launch_template:
        parameters["LaunchTemplate"] = places.template_reference()
    if pool.provisioning_model == "spot":
        parameters["InstanceMarketOptions"] = market_options(max_usd_per_hour)
    return parameters


def market_options(max_usd_per_hour: float | None) -> dict[str, Any]:
    options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
    if max_usd_per_hour is not None:
        options["MaxPrice"] = f"{max_usd_per_hour:.6f}"
    return {"MarketType": "spot", "SpotOptions": options}


def network_parameters(config: AwsConfig, places: Places, pool: CapacityPool) -> dict[str, Any]:
    """The subnet of the zone; within the template's network interface where it defines one, as EC2 demands."""
    subnet = places.subnet(pool.region, pool.zone)
    interfaces = places.template(pool.region).get("NetworkInterfaces") or []
    if interfaces:
        first = {**interfaces[0], "DeviceIndex": interfaces[0].get("DeviceIndex", 0), "SubnetId": subnet}
        if config.security_group_ids:
            first["Groups"] = config.security_group_ids
        return {"NetworkInterfaces": [first, *interfaces[1:]]}
    return {
        "SubnetId": subnet,
        **({"SecurityGroupIds": config.security_group_ids} if config.security_group_ids else {}),
    }
