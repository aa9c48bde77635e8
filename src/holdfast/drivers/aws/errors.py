"""What AWS says when it refuses, in our own errors: translated here, once, for every call of the driver.

Source of the codes: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from holdfast.drivers.aws.config import AwsConfig
from holdfast.drivers.protocol import CapacityPool, ProvisioningModel
from holdfast.errors import CapacityError, ConfigError, CredentialsError, HoldfastError, QuotaError, TransientError

CAPACITY = {
    *("InsufficientInstanceCapacity", "InsufficientHostCapacity", "InsufficientReservedInstanceCapacity"),
    *("InsufficientCapacity", "InsufficientCapacityOnHost", "InsufficientAddressCapacity", "UnfulfillableCapacity"),
    *("InsufficientFreeAddressesInSubnet", "ReservationCapacityExceeded", "SpotMaxPriceTooLow"),
    "Unsupported",  # the type in this zone, or this configuration of it now: another pool may have it
}
QUOTA = {
    *("MaxSpotInstanceCountExceeded", "MaxSpotFleetRequestCountExceeded", "VcpuLimitExceeded", "InstanceLimitExceeded"),
    *("VolumeLimitExceeded", "MaxIOPSLimitExceeded", "SnapshotLimitExceeded", "PendingSnapshotLimitExceeded"),
    *("NetworkInterfaceLimitExceeded", "AddressLimitExceeded", "LimitExceeded", "ResourceLimitExceeded"),
}
CREDENTIALS = {
    *("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidClientTokenId"),
    *("UnrecognizedClientException", "AuthFailure", "SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken"),
    *("IncompleteSignature", "InvalidSignatureException", "MissingAuthenticationToken"),
    "MissingAuthenticationTokenException",
}
TRANSIENT = {
    *("RequestLimitExceeded", "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequestsException"),
    *("RequestThrottled", "RequestThrottledException", "BandwidthLimitExceeded", "SlowDown", "PriorRequestNotComplete"),
    *("InternalError", "InternalFailure", "InternalServerError", "ServiceUnavailable", "Unavailable"),
    *("ServiceUnavailableException", "RequestTimeout", "RequestTimeoutException", "ResourceContention"),
    *("ScalingActivityInProgress", "ResourceInUse", "EC2ThrottledException", "IncorrectInstanceState"),
    *("ServerInternal", "InvalidInstanceID.NotFound"),
    "PendingVerification",  # a region's first use: minutes, as AWS says
}
DENIED = {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "NotAuthorized", "UnauthorizedAccess"}
REPEATED = {"IdempotentParameterMismatch", "IdempotentInstanceTerminated"}
UNKNOWN_MACHINE = {"InvalidInstanceID.NotFound", "InvalidInstanceID.Malformed", "InvalidInstanceID"}

FIELDS = (
    ("AuthFailure", r"images", "image", "use an AMI that is shared with this account"),
    ("InvalidAMIID", "", "image", "use an AMI of this region that the account may launch"),
    ("ParameterNotFound", "", "image", "use an SSM parameter that exists in this region, or an AMI id"),
    ("InvalidSubnet", "", "subnets", "use a subnet of the zone, in this account"),
    ("InvalidGroup", "", "security_group_ids", "use security groups of the subnet's VPC"),
    ("InvalidSecurityGroup", "", "security_group_ids", "use security groups of the subnet's VPC"),
    ("InvalidLaunchTemplate", "", "launch_template", "use a launch template of this region and account"),
    ("InvalidKMSKey", "", "kms_key_id", "use an enabled key of this region that the account may use"),
    ("Invalid", r"(?i)iamInstanceProfile|instance profile", "instance_profile", "create it, or name another"),
    ("NoSuchEntity", r"(?i)instance profile", "instance_profile", "create it, or name another"),
    ("Invalid", r"(KMS|kms)", "kms_key_id", "use an enabled key of this region that the account may use"),
    ("InvalidBlockDeviceMapping", "", "volume_gib", "make the root volume at least as large as the image's"),
    ("VPCIdNotSpecified", "", "subnets", "there is no default VPC: name a subnet for each zone"),
    ("MissingInput", "", "subnets", "there is no default subnet: name a subnet for each zone"),
)
"""Beginning of the code, pattern in the message: the field of the account that is at fault, and what to do."""

QUOTAS: dict[tuple[str, ProvisioningModel], tuple[str, str]] = {
    ("standard", "spot"): ("L-34B43A08", "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests"),
    ("standard", "on-demand"): ("L-1216C47A", "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
    ("g", "spot"): ("L-3819A6DF", "All G and VT Spot Instance Requests"),
    ("g", "on-demand"): ("L-DB2E81BA", "Running On-Demand G and VT instances"),
    ("p", "spot"): ("L-7212CCBC", "All P4, P3 and P2 Spot Instance Requests"),
    ("p", "on-demand"): ("L-417A185B", "Running On-Demand P instances"),
    ("p5", "spot"): ("L-C4BD4855", "All P5 Spot Instance Requests"),
    ("p5", "on-demand"): ("L-417A185B", "Running On-Demand P instances"),
}
"""Of EC2's quotas on vCPUs, those that the families of machine types count against; code and name.
Source: https://docs.aws.amazon.com/ec2/latest/instancetypes/ec2-instance-quotas.html"""

SECRETS = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{12,}|Encoded authorization failure message:.*|(?i:x-amz-security-token)\S*\s*\S*", re.DOTALL
)


def quota_of(pool: CapacityPool) -> tuple[str, str]:
    """Code and name of the vCPU quota that a machine of this pool counts against."""
    family = pool.instance_type.partition(".")[0]
    kind = "standard"
    if family.startswith(("p5", "p6")):
        kind = "p5"
    elif re.match(r"p\d", family):
        kind = "p"
    elif family.startswith(("g", "vt")):
        kind = "g"
    return QUOTAS[kind, pool.provisioning_model]


def code_of(error: Exception) -> str:
    """AWS's own code of an error, without the `Client.` or the namespace that some services put before it."""
    code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
    return code.rpartition("#")[2].removeprefix("Client.").removeprefix("Server.")


def message_of(error: Exception) -> str:
    """AWS's own words, without anything that could be a key or a token."""
    said = getattr(error, "response", {}).get("Error", {}).get("Message") or str(error)
    return SECRETS.sub("(...)", str(said)).strip().rstrip(".")


def policy_line(action: str) -> str:
    return f'{{"Effect": "Allow", "Action": "{action}", "Resource": "*"}}'


@contextmanager
def translated(service: str, config: AwsConfig, pool: CapacityPool | None = None) -> Iterator[None]:
    """Everything that boto3 raises inside comes out as one of our own errors."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except (ClientError, BotoCoreError, ResponseParserError) as error:  # the last: no AWS answer, a proxy's for one
        raised = translate(error, service, config, pool)
        if isinstance(raised, CredentialsError):
            # The words of SignatureDoesNotMatch hold the request's own session token: nothing may print them.
            raise raised from None
        raise raised from error


def translate(error: Exception, service: str, config: AwsConfig, pool: CapacityPool | None = None) -> HoldfastError:
    """The error of ours that says what to do about `error`, which a call of `service` ended with."""
    from botocore.exceptions import ClientError

    if isinstance(error, ClientError):
        return _of_answer(error, service, config, pool)
    return _of_no_answer(error, service)


def _of_answer(error: Any, service: str, config: AwsConfig, pool: CapacityPool | None) -> HoldfastError:
    code, said = code_of(error), message_of(error)
    where = f" for {pool}" if pool else ""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    action = f"{service}:{error.operation_name}"
    if code in CAPACITY or (pool and code == "InvalidParameterCombination" and "Availability Zone" in said):
        return CapacityError(f"no capacity{where} ({code}: {said})")
    if code in QUOTA:
        return QuotaError(_quota_words(code, said, pool))
    if code in CREDENTIALS and not (code == "AuthFailure" and "images" in said):
        return CredentialsError(
            f"AWS does not accept the account's credentials at {action} ({code}); renew them: what waits goes on by itself"
            + (
                "; or the region is not enabled for the account"
                if code in ("AuthFailure", "InvalidClientTokenId")
                else ""
            )
        )
    if code in DENIED:
        return ConfigError(_denied_words(error, action, said))
    if code in TRANSIENT or status >= 500 or status == 429:
        return TransientError(f"{action}{where} failed and may work shortly ({code or status}: {said})")
    if code == "OperationNotPermitted":
        return ConfigError(f"{action}{where}: {said}")
    for beginning, pattern, field, remedy in FIELDS:
        if code.startswith(beginning) and re.search(pattern, said):
            value = getattr(config, field) or "(not set)"
            return ConfigError(f"aws account: {field} {value!r} is refused{where} ({code}: {said}); {remedy}")
    return ConfigError(f"{action}{where} is refused ({code}: {said})")


def _quota_words(code: str, said: str, pool: CapacityPool | None) -> str:
    if pool is None or "Volume" in code or "Snapshot" in code or "IOPS" in code:
        return f"a quota of the account is reached ({code}: {said}); raise it in the Service Quotas console"
    quota, name = quota_of(pool)
    return (
        f"the account may have no more machines of {pool} ({code}: {said}); ask for more of quota {quota} ({name}, in "
        f"vCPUs) at https://{pool.region}.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/{quota}"
    )


def _denied_words(error: Any, action: str, said: str) -> str:
    named = re.search(r"not authorized to perform:? ([\w-]+:\w+)", said)
    who = re.search(r"User: (arn:\S+)", said)
    action = named[1] if named else action
    barred = " (a service control policy or a permissions boundary bars it)" if "explicit deny" in said else ""
    return (
        f"{who[1] if who else 'the account'} may not {action}{barred}; grant it with {policy_line(action)}: "
        "deployments/aws-orchestrator-policy.json holds every permission that Holdfast needs"
    )


def _of_no_answer(error: Exception, service: str) -> HoldfastError:
    from botocore import exceptions as boto

    without_credentials = (
        *(
            boto.NoCredentialsError,
            boto.PartialCredentialsError,
            boto.CredentialRetrievalError,
            boto.MetadataRetrievalError,
        ),
        *(boto.UnauthorizedSSOTokenError, boto.SSOTokenLoadError, boto.TokenRetrievalError, boto.NoAuthTokenError),
        boto.RefreshWithMFAUnsupportedError,
    )
    misconfigured = (
        *(boto.ProfileNotFound, boto.NoRegionError, boto.ParamValidationError, boto.InvalidRegionError),
        *(boto.UnknownServiceError, boto.ConfigParseError, boto.ConfigNotFound, boto.InvalidEndpointConfigurationError),
        boto.SSLError,
    )
    kind = type(error).__name__
    if isinstance(error, without_credentials):
        return CredentialsError(f"there are no usable AWS credentials ({kind}); renew them or log in again")
    said = SECRETS.sub("(...)", str(error))
    if isinstance(error, misconfigured):
        return ConfigError(f"aws account: {service} can't be asked ({kind}: {said})")
    return TransientError(f"AWS {service} can't be reached ({kind}: {said})")
