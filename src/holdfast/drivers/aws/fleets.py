"""Machines that are all alike: an EC2 Fleet that is asked for once, or an Auto Scaling group that AWS keeps whole."""

from __future__ import annotations

import base64
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from holdfast.drivers.aws.account import Account
from holdfast.drivers.aws.describe import machine_of
from holdfast.drivers.aws.errors import REPEATED, code_of, translate
from holdfast.drivers.aws.inventory import Inventory
from holdfast.drivers.aws.launching import (
    RESOURCE_TYPES,
    TAG_VALUE_CHARACTERS,
    TOKEN_TAG,
    client_token,
    common_parameters,
    tag_list,
    user_data,
)
from holdfast.drivers.aws.places import Places
from holdfast.drivers.protocol import CapacityPool, Fleet, FleetRequest, Machine, ProvisioningModel
from holdfast.errors import CapacityError, ConfigError, HoldfastError, QuotaError

log = logging.getLogger(__name__)

FLEET_TAG = "holdfast-fleet"
SHOWN_SECONDS = 10.0
"""How long new members are waited for in EC2's description."""
FIRST_MEMBER_SECONDS = 120.0
"""How long an Auto Scaling group may take for its first machine."""
CHOSEN_BY_THE_FLEET = {"InstanceMarketOptions", "InstanceType", "InstanceRequirements", "Placement"}
"""A launch template that says these can't be used by a fleet that does."""
MODELS: tuple[ProvisioningModel, ProvisioningModel] = ("spot", "on-demand")


def fleet_name(token: str) -> str:
    """The same for every process: of the group and of its launch templates."""
    return f"holdfast-{hashlib.sha256(token.encode()).hexdigest()[:32]}"


class Fleets:
    def __init__(self, account: Account, places: Places, inventories: Mapping[str, Inventory]) -> None:
        self._account = account
        self._config = account.config
        self._places = places
        self._inventories = inventories

    def launch(self, request: FleetRequest) -> list[Machine]:
        region = _region_of(request)
        machines = self._maintain(request, region) if request.kind == "maintained" else self._instant(request, region)
        for machine in machines:
            self._inventories[region].launched(machine)
        return machines

    def described(self, tags: Mapping[str, str]) -> list[Fleet]:
        found = []
        for region in self._config.regions:
            for group in self._groups(region):
                theirs = {tag["Key"]: tag["Value"] for tag in group["Tags"]}
                # A group that is being deleted replaces nothing any more.
                if not group.get("Status") and all(theirs.get(name) == value for name, value in tags.items()):
                    found.append(
                        Fleet(
                            token=theirs[FLEET_TAG],
                            cloud="aws",
                            region=region,
                            machines=group["DesiredCapacity"],
                            tags=theirs,
                        )
                    )
        return found

    def end(self, token: str, region: str) -> list[Machine]:
        """Delete whatever there is of the fleet, in the order in which nothing is replaced; the machines that are left."""
        from botocore.exceptions import ClientError

        name = fleet_name(token)
        with self._account.calling("autoscaling"):
            try:
                self._account.client("autoscaling", region).delete_auto_scaling_group(
                    AutoScalingGroupName=name, ForceDelete=True
                )
            except ClientError as error:
                if not (code_of(error) == "ValidationError" and "not found" in str(error)):
                    raise
        for model in ("", *MODELS):
            self._delete_template(region, _template_name(name, model))
        self._inventories[region].changed()
        return [machine for machine in self._members(token, region) if machine.state != "terminated"]

    # -- asked for once -----------------------------------------------------------------------------------------------

    def _instant(self, request: FleetRequest, region: str) -> list[Machine]:
        """One fleet for each provisioning model: so each has its own pools, tags and protection from the start."""
        there = self._members(request.token, region)
        spot = round(request.machines * request.spot_share)
        found: list[Machine] = []
        refusal: HoldfastError | None = None
        for model, count in zip(MODELS, (spot, request.machines - spot), strict=True):
            if of_model := [machine for machine in there if machine.pool.provisioning_model == model]:
                found += of_model
            elif count:
                try:
                    found += self._create_fleet(request, region, model, count)
                except (CapacityError, QuotaError) as error:
                    log.warning("fleet=%s gets no %s machines: %s", request.token, model, error)
                    refusal = refusal or error
        if not found and refusal:
            raise refusal
        return found

    def _create_fleet(self, request: FleetRequest, region: str, model: ProvisioningModel, count: int) -> list[Machine]:
        from botocore.exceptions import ClientError

        pools = [pool for pool in request.pools if pool.provisioning_model == model]
        if not pools:
            raise ConfigError(f"fleet {request.token!r}: {count} machines are to be {model}, and no pool is; add one")
        name = _template_name(fleet_name(request.token), model)
        tags = {**_tags(request), "ResourceType": RESOURCE_TYPES[model], TOKEN_TAG: f"{request.token}-{model}"[:256]}
        parameters: dict[str, Any] = {
            "Type": "instant",
            "ClientToken": client_token(f"{request.token}-{model}"),
            "LaunchTemplateConfigs": [
                {
                    "LaunchTemplateSpecification": {"LaunchTemplateName": name, "Version": "$Latest"},
                    "Overrides": [
                        {"InstanceType": pool.instance_type, "SubnetId": self._places.subnet(region, pool.zone)}
                        for pool in pools
                    ],
                }
            ],
            "TargetCapacitySpecification": {
                "TotalTargetCapacity": count,
                "SpotTargetCapacity": count if model == "spot" else 0,
                "OnDemandTargetCapacity": count if model == "on-demand" else 0,
                "DefaultTargetCapacityType": model,
            },
            # Machines and volumes have their tags from the launch template.
            "TagSpecifications": [{"ResourceType": "fleet", "Tags": tag_list(tags)}],
        }
        if model == "spot":
            parameters["SpotOptions"] = {
                "AllocationStrategy": "price-capacity-optimized",
                "InstanceInterruptionBehavior": "terminate",
            }
        else:
            parameters["OnDemandOptions"] = {"AllocationStrategy": "lowest-price"}
        self._create_template(request, region, name, tags, protected=model == "on-demand")
        answer: Mapping[str, Any] = {}
        with self._account.calling("ec2", pools[0]):
            try:
                answer = self._account.client("ec2", region).create_fleet(**parameters)
            except ClientError as error:
                if code_of(error) not in REPEATED:
                    raise
        self._delete_template(region, name)
        launched = [
            (machine_id, one, by)
            for by in answer.get("Instances", [])
            for one in [by.get("LaunchTemplateAndOverrides", {}).get("Overrides", {})]
            for machine_id in by["InstanceIds"]
        ]
        if answer and not launched:
            raise self._refusal(answer, pools)
        wanted = {machine_id for machine_id, _, _ in launched}
        shown = {machine.id: machine for machine in self._await_members(request.token, region, model, wanted)}
        for machine_id, override, by in launched:
            if machine_id not in shown:
                shown[machine_id] = self._unshown(machine_id, override, by, pools, tags)
        return list(shown.values())

    def _refusal(self, answer: Mapping[str, Any], pools: Sequence[CapacityPool]) -> HoldfastError:
        from botocore.exceptions import ClientError

        errors = answer.get("Errors") or [
            {"ErrorCode": "UnfulfillableCapacity", "ErrorMessage": "no machine, no reason"}
        ]
        raised = [
            translate(
                ClientError(
                    {"Error": {"Code": one["ErrorCode"], "Message": one.get("ErrorMessage", "")}}, "CreateFleet"
                ),
                "ec2",
                self._config,
                pools[0],
            )
            for one in errors
        ]
        # Where one pool is empty and another is forbidden, the empty one may fill again.
        return next((error for error in raised if isinstance(error, CapacityError)), raised[0])

    def _await_members(self, token: str, region: str, model: ProvisioningModel, wanted: set[str]) -> list[Machine]:
        give_up_at = time.monotonic() + SHOWN_SECONDS
        while True:
            found = [one for one in self._members(token, region) if one.pool.provisioning_model == model]
            if found and wanted <= {machine.id for machine in found}:
                return found
            if time.monotonic() > give_up_at:
                if not wanted:
                    raise CapacityError(f"fleet {token!r} was asked for before, and EC2 shows no {model} machine of it")
                return found
            time.sleep(1.0)

    def _unshown(
        self,
        machine_id: str,
        override: Mapping[str, Any],
        by: Mapping[str, Any],
        pools: Sequence[CapacityPool],
        tags: Mapping[str, str],
    ) -> Machine:
        kind = by.get("InstanceType") or override.get("InstanceType")
        zones = {subnet: zone for zone, subnet in self._places.subnets(pools[0].region).items()}
        zone = zones.get(override.get("SubnetId", ""), pools[0].zone)
        pool = next((one for one in pools if (one.zone, one.instance_type) == (zone, kind)), pools[0])
        return Machine(id=machine_id, pool=pool, state="pending", tags=tags, launched_at=datetime.now(UTC))

    # -- kept whole ---------------------------------------------------------------------------------------------------

    def _maintain(self, request: FleetRequest, region: str) -> list[Machine]:
        from botocore.exceptions import ClientError

        name = fleet_name(request.token)
        spot = round(request.machines * request.spot_share)
        kind = "Spot" if spot == request.machines else "OnDemand" if not spot else "Mixed"
        tags = {**_tags(request), "ResourceType": kind}
        subnets = [self._places.subnet(region, zone) for zone in dict.fromkeys(pool.zone for pool in request.pools)]
        types = dict.fromkeys(pool.instance_type for pool in request.pools)
        self._create_template(request, region, name, tags, protected=False)
        with self._account.calling("autoscaling", request.pools[0]):
            try:
                self._account.client("autoscaling", region).create_auto_scaling_group(
                    AutoScalingGroupName=name,
                    MixedInstancesPolicy={
                        "LaunchTemplate": {
                            "LaunchTemplateSpecification": {"LaunchTemplateName": name, "Version": "$Latest"},
                            "Overrides": [{"InstanceType": one} for one in types],
                        },
                        "InstancesDistribution": {
                            # A base is an exact number; a percentage of few machines would be rounded by AWS.
                            "OnDemandBaseCapacity": request.machines - spot,
                            "OnDemandPercentageAboveBaseCapacity": 0 if spot else 100,
                            "SpotAllocationStrategy": "price-capacity-optimized",
                        },
                    },
                    MinSize=request.machines,
                    MaxSize=request.machines,
                    DesiredCapacity=request.machines,
                    VPCZoneIdentifier=",".join(subnets),
                    CapacityRebalance=True,
                    HealthCheckType="EC2",
                    Tags=[{**tag, "PropagateAtLaunch": True} for tag in tag_list(tags)],
                )
            except ClientError as error:
                if code_of(error) not in ("AlreadyExists", "AlreadyExistsFault"):
                    raise
        return self._first_members(request, region, name)

    def _first_members(self, request: FleetRequest, region: str, name: str) -> list[Machine]:
        give_up_at = time.monotonic() + FIRST_MEMBER_SECONDS
        while True:
            living = [one for one in self._members(request.token, region) if one.state != "terminated"]
            if living:
                return living
            refusal = self._failed_activity(region, name, request.pools[0])
            if refusal or time.monotonic() > give_up_at:
                self.end(request.token, region)
                raise refusal or CapacityError(
                    f"fleet {request.token!r} had no machine within {FIRST_MEMBER_SECONDS:.0f} s; it is ended"
                )
            time.sleep(1.0)

    def _failed_activity(self, region: str, name: str, pool: CapacityPool) -> HoldfastError | None:
        with self._account.calling("autoscaling", pool):
            answer = self._account.client("autoscaling", region).describe_scaling_activities(AutoScalingGroupName=name)
        failed = [one for one in answer["Activities"] if one["StatusCode"] == "Failed"]
        if not failed:
            return None
        said = failed[0].get("StatusMessage", "")
        words = f"fleet {name}: {said}"
        if "quota" in said or "LimitExceeded" in said or "limit" in said:
            return QuotaError(words)
        if "capacity" in said.lower() or "Spot" in said:
            return CapacityError(words)
        return ConfigError(words)

    def _groups(self, region: str) -> Iterator[dict[str, Any]]:
        filters = [{"Name": "tag-key", "Values": [FLEET_TAG]}]
        with self._account.calling("autoscaling"):
            client = self._account.client("autoscaling", region)
            for page in client.get_paginator("describe_auto_scaling_groups").paginate(Filters=filters):
                yield from page["AutoScalingGroups"]

    # -- both ---------------------------------------------------------------------------------------------------------

    def _members(self, token: str, region: str) -> list[Machine]:
        filters = [{"Name": f"tag:{FLEET_TAG}", "Values": [token]}]
        with self._account.calling("ec2"):
            pages = self._account.client("ec2", region).get_paginator("describe_instances").paginate(Filters=filters)
            return [
                machine_of(instance, region)
                for page in pages
                for reservation in page["Reservations"]
                for instance in reservation["Instances"]
            ]

    def _create_template(
        self, request: FleetRequest, region: str, name: str, tags: Mapping[str, str], protected: bool
    ) -> None:
        """Of the same name for the same fleet: one that a crash left is used, not copied."""
        from botocore.exceptions import ClientError

        data = {
            **{key: value for key, value in self._places.template(region).items() if key not in CHOSEN_BY_THE_FLEET},
            **common_parameters(self._config, self._places, region, request.disk_gib),
            "UserData": base64.b64encode(user_data(request.startup_script).encode()).decode(),
            "TagSpecifications": [{"ResourceType": kind, "Tags": tag_list(tags)} for kind in ("instance", "volume")],
        }
        if protected:
            data["DisableApiTermination"] = True
        groups = self._config.security_group_ids
        if groups and data.get("NetworkInterfaces"):  # EC2 takes groups in one place only
            data["NetworkInterfaces"] = [{**one, "Groups": groups} for one in data["NetworkInterfaces"]]
        elif groups:
            data["SecurityGroupIds"] = groups
        with self._account.calling("ec2"):
            try:
                self._account.client("ec2", region).create_launch_template(
                    LaunchTemplateName=name,
                    LaunchTemplateData=data,
                    TagSpecifications=[{"ResourceType": "launch-template", "Tags": tag_list(tags)}],
                )
            except ClientError as error:
                if code_of(error) != "InvalidLaunchTemplateName.AlreadyExistsException":
                    raise

    def _delete_template(self, region: str, name: str) -> None:
        from botocore.exceptions import ClientError

        with self._account.calling("ec2"):
            try:
                self._account.client("ec2", region).delete_launch_template(LaunchTemplateName=name)
            except ClientError as error:
                if not code_of(error).startswith("InvalidLaunchTemplate"):
                    raise


def _template_name(name: str, model: str) -> str:
    return f"{name}-{model}" if model else name


def _tags(request: FleetRequest) -> dict[str, str]:
    if len(request.token) > TAG_VALUE_CHARACTERS:
        raise ConfigError(
            f"fleet token {request.token[:40]!r}... has {len(request.token)} characters; EC2 takes 256 in a tag"
        )
    return {"Name": f"holdfast {request.token}"[:TAG_VALUE_CHARACTERS], **request.tags, FLEET_TAG: request.token}


def _region_of(request: FleetRequest) -> str:
    regions = {pool.region for pool in request.pools}
    if len(regions) != 1:
        raise ConfigError(
            f"fleet {request.token!r} is of regions {', '.join(sorted(regions)) or 'none'}; name pools of one"
        )
    return regions.pop()
