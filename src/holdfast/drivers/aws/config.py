"""What can be said about an AWS account: where machines may run, from which image, in whose name."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from holdfast.errors import ConfigError

PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Dollars = Annotated[float, Field(gt=0, allow_inf_nan=False)]

INSTANCE_TYPES = [
    *("c7i.large", "c7i.xlarge", "c7i.2xlarge", "c7i.4xlarge", "m7i.xlarge", "m7i.2xlarge", "m7i.4xlarge"),
    *("g5.xlarge", "g5.2xlarge", "g5.12xlarge", "g6.xlarge", "g6.2xlarge", "g6.12xlarge", "g6e.xlarge"),
    *("p4d.24xlarge", "p5.48xlarge"),
]
DEEP_LEARNING_IMAGE = (
    "/aws/service/deeplearning/ami/x86_64/oss-nvidia-driver-gpu-pytorch-2.10-ubuntu-24.04/latest/ami-id"
)
"""Each name is one line of PyTorch and Ubuntu, whose images end when the line does: examine() says whether it is there.
Source: https://docs.aws.amazon.com/dlami/latest/devguide/find-dlami-id.html"""

CLIENT_PARAMETERS = {"api_version", "endpoint_url", "use_ssl", "verify", "config"}
REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-\d")
ZONE = re.compile(r"[a-z]{2}(-[a-z]+)+-\d[a-z]|[a-z]{2}(-[a-z]+)+-\d-[a-z]+-\d[a-z]")
INSTANCE_TYPE = re.compile(r"[a-z0-9-]+\.[a-z0-9-]+")
PROFILE_NAME = re.compile(r"[\w+=,.@-]{1,128}")
AMI_ID = re.compile(r"ami-([0-9a-f]{8}|[0-9a-f]{17})")
SSM_NAME = re.compile(r"/?[\w.-]+(/[\w.-]+)*(:\w+)?")
TEMPLATE = re.compile(r"(lt-[0-9a-f]{8,17}|[\w().\-/]{3,128})(:\d+|:\$Latest|:\$Default)?")


def _id_pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(rf"{prefix}-([0-9a-f]{{8}}|[0-9a-f]{{17}})")


def _insist(field: str, value: str, pattern: re.Pattern[str], remedy: str) -> None:
    # Not a ValueError, which pydantic would collect: a bad account is a ConfigError wherever it is met.
    if not pattern.fullmatch(value):
        raise ConfigError(f"aws account: {field} {value!r} can't be right; {remedy}")


class AwsConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    regions: list[str] = Field(min_length=1, title="Regions", description="Such as us-east-1; in order of preference.")
    instance_types: list[str] = Field(
        INSTANCE_TYPES, min_length=1, title="Instance types", description="That jobs may use."
    )
    zones: list[str] = Field(
        [], title="Zones", description="Such as us-east-1a. Empty: every zone that has a subnet to use."
    )
    subnets: dict[str, str] = Field(
        {},
        title="Subnets",
        description="Zone to subnet id. A region without any uses its default VPC; one with some, only those zones.",
    )
    security_group_ids: list[str] = Field(
        [], title="Security groups", description="Empty: the VPC's default group. Machines need no open port."
    )
    instance_profile: str = Field(
        "", title="Instance profile", description="Name of the profile whose role lets machines reach the store."
    )
    image: str = Field(
        DEEP_LEARNING_IMAGE, title="Image", description="An AMI id, or the name of an SSM parameter that holds one."
    )
    launch_template: str = Field(
        "", title="Launch template", description="Id or name, with :version where not the default. Empty: none."
    )
    volume_gib: float = Field(
        0.0, ge=0, le=65536, title="Root volume (GiB)", description="At least; 0: the image's size, or the job's."
    )
    kms_key_id: str = Field("", title="KMS key", description="For root volumes. Empty: the account's default key.")
    max_spot_price_share: float | None = Field(
        None,
        gt=0,
        le=1,
        title="Highest spot price",
        description="As a share of the on-demand price, which is what a run's worst case is reserved at. Empty: that price.",
    )
    client_parameters: dict[str, Any] = Field(
        {}, title="Client parameters", description="Such as endpoint_url or verify, for every boto3 client."
    )
    poll_seconds: PositiveSeconds = Field(5.0, title="Poll (seconds)", description="Between two looks into the store.")
    describe_seconds: PositiveSeconds = Field(
        30.0, title="Describe (seconds)", description="For which one description of all machines will do."
    )
    usd_per_hour: dict[str, Dollars] = Field(
        {}, title="On-demand prices", description="Instance type to USD per hour, where yours differ from the list."
    )

    @field_validator("regions")
    @classmethod
    def _are_regions(cls, regions: list[str]) -> list[str]:
        for region in regions:
            _insist("regions", region, REGION, "name regions such as us-east-1")
        return list(dict.fromkeys(regions))

    @field_validator("instance_types")
    @classmethod
    def _are_types(cls, names: list[str]) -> list[str]:
        for name in names:
            _insist("instance_types", name, INSTANCE_TYPE, "name types such as g5.xlarge")
        return list(dict.fromkeys(names))

    @field_validator("security_group_ids")
    @classmethod
    def _are_groups(cls, ids: list[str]) -> list[str]:
        for one in ids:
            _insist("security_group_ids", one, _id_pattern("sg"), "use ids such as sg-0123456789abcdef0, not names")
        return ids

    @field_validator("client_parameters")
    @classmethod
    def _are_client_parameters(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        # Names alone: a value here may be a secret that somebody put in the wrong place.
        if unknown := sorted(set(parameters) - CLIENT_PARAMETERS):
            raise ConfigError(
                f"aws account: client_parameters {', '.join(unknown)} are not accepted; use "
                f"{', '.join(sorted(CLIENT_PARAMETERS))}, and give credentials to the session"
            )
        return parameters

    @model_validator(mode="after")
    def _ids_are_ids(self) -> AwsConfig:
        for zone in [*self.zones, *self.subnets]:
            field = "zones" if zone in self.zones else "subnets"
            _insist(field, zone, ZONE, "name zones such as us-east-1a")
            if not self.region_of(zone):
                raise ConfigError(
                    f"aws account: {field} {zone!r} is in none of the regions {', '.join(self.regions)}; add its region"
                )
        for subnet in self.subnets.values():
            _insist("subnets", subnet, _id_pattern("subnet"), "use ids such as subnet-0123456789abcdef0")
        if self.image.startswith("ami-"):
            _insist("image", self.image, AMI_ID, "use an id such as ami-0123456789abcdef0, or an SSM parameter's name")
            if len(self.regions) > 1:
                raise ConfigError(
                    f"aws account: image {self.image!r} is an AMI of one region, and there are {len(self.regions)}; name "
                    "one region, or an SSM parameter that exists in each"
                )
        else:
            _insist("image", self.image, SSM_NAME, "use an AMI id, or the name of an SSM parameter that holds one")
        if self.instance_profile:
            remedy = "use the profile's name, not its ARN"
            _insist("instance_profile", self.instance_profile, PROFILE_NAME, remedy)
        if self.launch_template:
            _insist("launch_template", self.launch_template, TEMPLATE, "use its id or name, then :version if need be")
        return self

    def region_of(self, zone: str) -> str:
        """Of the regions of this account, the one that `zone` is in; empty if none."""
        # us-east-1a and the local zone us-east-1-bos-1a are both us-east-1's.
        return next((region for region in self.regions if re.match(rf"{region}([a-z]|-[a-z]+-\d[a-z])$", zone)), "")
