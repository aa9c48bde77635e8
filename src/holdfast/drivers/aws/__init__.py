"""Amazon EC2: spot and on-demand machines, fleets, prices. Needs boto3 (`pip install 'holdfast[aws]'`) when it is used."""

from __future__ import annotations

from holdfast.drivers.aws.config import AwsConfig
from holdfast.drivers.aws.driver import AwsDriver

__all__ = ["AwsConfig", "AwsDriver"]
