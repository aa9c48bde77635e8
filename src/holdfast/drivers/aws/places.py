"""Where machines of an account may stand and from which image they boot, looked up once an hour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.drivers.aws.account import Account
from holdfast.drivers.aws.cached import Cached
from holdfast.errors import ConfigError

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Image:
    id: str
    root_device: str
    root_gib: float
    """A root volume may not be smaller than this."""


class Places:
    def __init__(self, account: Account) -> None:
        self._account = account
        self._config = account.config
        self._subnets: Cached[str, dict[str, str]] = Cached(self._ask_subnets, HOUR)
        self._images: Cached[str, Image] = Cached(self._ask_image, HOUR)
        self._templates: Cached[str, Mapping[str, Any]] = Cached(self._ask_template, HOUR)

    def subnets(self, region: str) -> dict[str, str]:
        """The subnet to use in each zone of `region`; the account's own choice, else the default VPC's."""
        return self._subnets.get(region)

    def subnet(self, region: str, zone: str) -> str:
        subnets = self.subnets(region)
        if zone not in subnets:
            have = ", ".join(sorted(subnets)) or "none"
            raise ConfigError(
                f"aws account: there is no subnet in zone {zone!r} (zones with one: {have}); name one in subnets, or "
                "create the default VPC's again"
            )
        return subnets[zone]

    def image(self, region: str) -> Image:
        return self._images.get(region)

    def template(self, region: str) -> Mapping[str, Any]:
        """What the account's launch template says; nothing where there is none."""
        return self._templates.get(region) if self._config.launch_template else {}

    def template_reference(self) -> dict[str, str]:
        name, _, version = self._config.launch_template.partition(":")
        key = "LaunchTemplateId" if name.startswith("lt-") else "LaunchTemplateName"
        return {key: name, "Version": version or "$Default"}

    # -----------------------------------------------------------------------------------------------------------------

    def _ask_subnets(self, region: str) -> dict[str, str]:
        config = self._config
        chosen = {zone: subnet for zone, subnet in config.subnets.items() if config.region_of(zone) == region}
        wanted = [zone for zone in config.zones if config.region_of(zone) == region]
        if config.zones and not wanted:
            return {}
        missing = [zone for zone in wanted if zone not in chosen]
        if missing or not (chosen or wanted):
            filters = [{"Name": "default-for-az", "Values": ["true"]}]
            with self._account.calling("ec2"):
                pages = self._account.client("ec2", region).get_paginator("describe_subnets").paginate(Filters=filters)
                found = [subnet for page in pages for subnet in page["Subnets"]]
            default = {subnet["AvailabilityZone"]: subnet["SubnetId"] for subnet in found}
            chosen |= {zone: subnet for zone, subnet in default.items() if zone in missing or not wanted}
        if not chosen and not config.zones:
            raise ConfigError(
                f"aws account: region {region!r} has no default VPC and no subnets are named; name one subnet for each zone"
            )
        return {zone: subnet for zone, subnet in sorted(chosen.items()) if not wanted or zone in wanted}

    def _ask_image(self, region: str) -> Image:
        config = self._config
        name = config.image
        if config.launch_template and "image" not in config.model_fields_set:
            name = self.template(region).get("ImageId", "") or name
        name = name.removeprefix("resolve:ssm:")
        image_id = name if name.startswith("ami-") else self._ask_parameter(region, name)
        with self._account.calling("ec2"):
            images = self._account.client("ec2", region).describe_images(ImageIds=[image_id])["Images"]
        if not images:
            raise ConfigError(
                f"aws account: image {name!r} is {image_id}, which is not in {region} or not shared with this account; use "
                "another"
            )
        root = images[0].get("RootDeviceName") or "/dev/xvda"
        volumes = {one.get("DeviceName"): one.get("Ebs", {}) for one in images[0].get("BlockDeviceMappings", [])}
        return Image(image_id, root, float(volumes.get(root, {}).get("VolumeSize") or 0))

    def _ask_parameter(self, region: str, name: str) -> str:
        with self._account.calling("ssm"):
            value = self._account.client("ssm", region).get_parameter(Name=name)["Parameter"]["Value"]
        if not value.startswith("ami-"):
            raise ConfigError(
                f"aws account: image {name!r} is a parameter that holds {value[:40]!r}, which is no AMI id"
            )
        return value

    def _ask_template(self, region: str) -> Mapping[str, Any]:
        reference = self.template_reference()
        version = reference.pop("Version")
        with self._account.calling("ec2"):
            answer = self._account.client("ec2", region).describe_launch_template_versions(
                **reference, Versions=[version]
            )
        versions = answer["LaunchTemplateVersions"]
        if not versions:
            raise ConfigError(
                f"aws account: launch_template {self._config.launch_template!r} has no such version in {region}"
            )
        return versions[0]["LaunchTemplateData"]
