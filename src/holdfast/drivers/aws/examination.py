"""What the account lacks, before anything is spent: each permission asked for with DryRun, which does nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from holdfast.drivers.aws.account import Account
from holdfast.drivers.aws.errors import code_of, policy_line, quota_of
from holdfast.drivers.aws.launching import (
    RUN_TAG,
    common_parameters,
    market_options,
    network_parameters,
    tag_specifications,
)
from holdfast.drivers.aws.offers import Market
from holdfast.drivers.aws.places import Places
from holdfast.drivers.aws.prices import TABLE_OF
from holdfast.drivers.protocol import CapacityPool, Finding
from holdfast.errors import ConfigError, HoldfastError, TransientError

NOBODY = "i-00000000000000000"


def prove(account: Account, places: Places) -> None:
    """Who we are, and whether we may launch. Raises ConfigError naming what is missing."""
    region = account.config.regions[0]
    with account.calling("sts"):
        account.client("sts", region).get_caller_identity()
    _launch_nothing(account, places, region)


def examine(account: Account, places: Places, market: Market) -> Iterator[Finding]:
    """Never raises: what can't be asked is a finding too."""
    config = account.config
    who = _found("credentials", lambda: _who(account))
    yield who
    if not who.ok:
        return
    for region in config.regions:
        if config.zones and not any(config.region_of(zone) == region for zone in config.zones):
            continue  # nothing is launched there
        yield _found(f"image {region}", lambda region=region: _image(places, region))  # type: ignore[misc]
        yield _found(f"subnets {region}", lambda region=region: _subnets(account, places, region))  # type: ignore[misc]
        yield from _permissions(account, places, region)
    if config.instance_profile:
        yield _found("instance profile", lambda: _profile(account))
    else:
        yield Finding(
            subject="instance profile",
            ok=True,
            detail="none is named: machines reach the store only if it needs no credentials, or the image has its own",
        )
    for region in config.regions:
        yield from _quotas(account, region)
        yield _found(f"prices {region}", lambda region=region: _prices(market, region))  # type: ignore[misc]
    yield _found("placement scores", lambda: _scores(market))
    yield _found("cheapest pool", lambda: _cheapest(market))


def _found(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject=subject, ok=True, detail=look())
    except HoldfastError as error:
        return Finding(subject=subject, ok=False, detail=str(error))
    except Exception as error:
        # An answer in a shape that nobody foresaw is told like every other trouble: the examination goes on.
        return Finding(subject=subject, ok=False, detail=f"can't be examined: {type(error).__name__}: {error}")


def _who(account: Account) -> str:
    with account.calling("sts"):
        said = account.client("sts", account.config.regions[0]).get_caller_identity()
    return f"account {said['Account']}, as {said['Arn']}"


def _image(places: Places, region: str) -> str:
    image = places.image(region)
    return f"{image.id} (root volume of {image.root_gib:.0f} GiB at least on {image.root_device})"


def _subnets(account: Account, places: Places, region: str) -> str:
    subnets = places.subnets(region)
    wanted = [zone for zone in account.config.zones if account.config.region_of(zone) == region]
    if lacking := [zone for zone in wanted if zone not in subnets]:
        raise ConfigError(f"aws account: zones {', '.join(lacking)} have no subnet; name one for each in subnets")
    if not subnets:
        return "none of the account's zones is here, so nothing is launched in this region"
    with account.calling("ec2"):
        found = account.client("ec2", region).describe_subnets(SubnetIds=sorted(subnets.values()))["Subnets"]
    zones = {subnet["SubnetId"]: subnet["AvailabilityZone"] for subnet in found}
    wrong = [
        f"{subnet} is in {zones.get(subnet)}, not in {zone}"
        for zone, subnet in subnets.items()
        if zones.get(subnet) != zone
    ]
    if wrong:
        raise ConfigError(f"aws account: subnets: {'; '.join(wrong)}; name each under its own zone")
    return ", ".join(f"{zone} {subnet}" for zone, subnet in subnets.items())


def _profile(account: Account) -> str:
    name = account.config.instance_profile
    with account.calling("iam"):
        found = account.client("iam", account.config.regions[0]).get_instance_profile(InstanceProfileName=name)
    roles = [role["RoleName"] for role in found["InstanceProfile"]["Roles"]]
    if not roles:
        raise ConfigError(f"aws account: instance_profile {name!r} has no role; add one that may use the store")
    return f"{name}, role {roles[0]}"


def _launch_nothing(account: Account, places: Places, region: str) -> None:
    config = account.config
    zone = next(iter(places.subnets(region)), "")
    pool = CapacityPool("aws", region, zone, config.instance_types[0], "spot")
    parameters = {
        **common_parameters(config, places, region, 0),
        **network_parameters(config, places, pool),
        "InstanceType": pool.instance_type,
        "MinCount": 1,
        "MaxCount": 1,
        "InstanceMarketOptions": market_options(None),
        "TagSpecifications": tag_specifications({RUN_TAG: "examination"}),
    }
    if config.launch_template:
        parameters["LaunchTemplate"] = places.template_reference()
    _may(account, region, "run_instances", parameters)


def _may(account: Account, region: str, operation: str, parameters: dict[str, Any]) -> None:
    """Raises ConfigError where the account may not. What is asked about need not exist."""
    from botocore.exceptions import ClientError

    with account.calling("ec2"):
        try:
            getattr(account.client("ec2", region), operation)(**parameters, DryRun=True)
        except ClientError as error:
            if code_of(error) == "DryRunOperation" or code_of(error).startswith("InvalidInstanceID"):
                return
            raise
    raise TransientError(f"EC2 did not answer the dry run of {operation}")


OF_OUR_MACHINES = {"TerminateInstances", "ModifyInstanceAttribute", "GetConsoleOutput"}
DRY_RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("DescribeInstances", "describe_instances", {}),
    ("TerminateInstances", "terminate_instances", {"InstanceIds": [NOBODY]}),
    (
        "ModifyInstanceAttribute",
        "modify_instance_attribute",
        {"InstanceId": NOBODY, "DisableApiTermination": {"Value": False}},
    ),
    ("GetConsoleOutput", "get_console_output", {"InstanceId": NOBODY}),
    ("DescribeSpotPriceHistory", "describe_spot_price_history", {}),
    ("DescribeInstanceTypes", "describe_instance_types", {}),
    ("DescribeInstanceTypeOfferings", "describe_instance_type_offerings", {}),
)


def _permissions(account: Account, places: Places, region: str) -> Iterator[Finding]:
    def launching() -> str:
        _launch_nothing(account, places, region)
        return "granted, spot machines with tags, this image and this instance profile included"

    yield _found(f"ec2:RunInstances {region}", launching)
    for action, operation, parameters in DRY_RUNS:

        def asking(action: str = action, operation: str = operation, parameters: dict[str, Any] = parameters) -> str:
            try:
                _may(account, region, operation, parameters)
            except ConfigError:
                # A policy may grant it for machines that carry our tag, which the one that is asked about does not.
                if action not in OF_OUR_MACHINES or not _may_with_our_tag(account, region, action):
                    raise
                return "granted for machines of Holdfast"
            return "granted"

        yield _found(f"ec2:{action} {region}", asking)
    yield Finding(subject=f"fleets {region}", ok=True, detail=_fleets(account, region))


def _may_with_our_tag(account: Account, region: str, action: str) -> bool:
    """Source: https://docs.aws.amazon.com/IAM/latest/APIReference/API_SimulatePrincipalPolicy.html"""
    with account.calling("sts"):
        arn = account.client("sts", region).get_caller_identity()["Arn"]
    if session := re.fullmatch(r"(arn:[\w-]+):sts::(\d+):assumed-role/([^/]+)/.*", arn):
        arn = f"{session[1]}:iam::{session[2]}:role/{session[3]}"
    tag = {"ContextKeyName": f"aws:ResourceTag/{RUN_TAG}", "ContextKeyValues": ["any"], "ContextKeyType": "string"}
    try:
        with account.calling("iam"):
            answer = account.client("iam", region).simulate_principal_policy(
                PolicySourceArn=arn, ActionNames=[f"ec2:{action}"], ContextEntries=[tag]
            )
    except ConfigError as error:
        raise ConfigError(
            f"ec2:{action} is not granted for every machine, and whether it is for those with the tag {RUN_TAG} can't be "
            f"asked: {error}"
        ) from error
    return all(result["EvalDecision"] == "allowed" for result in answer["EvaluationResults"])


def _fleets(account: Account, region: str) -> str:
    """Only who asks for fleets needs these, so their lack is no fault."""
    try:
        template = {"LaunchTemplateName": "holdfast-examination", "LaunchTemplateData": {"EbsOptimized": True}}
        _may(account, region, "create_launch_template", template)
        with account.calling("autoscaling"):
            account.client("autoscaling", region).describe_auto_scaling_groups(MaxRecords=1)
    except HoldfastError as error:
        return f"can't be launched: {error}"
    return "launch templates and Auto Scaling groups may be used"


def _quotas(account: Account, region: str) -> Iterator[Finding]:
    """vCPUs that may run at once. A quota that can't be read is no fault: launching tells."""
    config = account.config
    wanted: dict[str, tuple[str, list[str]]] = {}
    for model in ("spot", "on-demand"):
        for kind in config.instance_types:
            code, name = quota_of(CapacityPool("aws", region, region, kind, model))  # type: ignore[arg-type]
            wanted.setdefault(code, (name, []))[1].append(kind)
    for code, (name, kinds) in wanted.items():
        subject = f"quota {region}"
        try:
            with account.calling("servicequotas"):
                client = account.client("service-quotas", region)
                value = client.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
        except HoldfastError as error:
            yield Finding(subject=subject, ok=True, detail=f"{name} ({code}) can't be read: {error}")
            continue
        detail = f"{name} ({code}): {value:.0f} vCPUs"
        if value < 1:
            where = f"https://{region}.console.aws.amazon.com/servicequotas/home/services/ec2/quotas/{code}"
            yield Finding(subject=subject, ok=False, detail=f"{detail}: no {', '.join(kinds)}; ask for more at {where}")
        else:
            yield Finding(subject=subject, ok=True, detail=detail)


def _prices(market: Market, region: str) -> str:
    prices, here = market.prices.on_demand(region), market.offered_types(region)
    if missing := [name for name in prices.missing if name in here]:
        raise ConfigError(
            f"aws account: no price is known in {region} for {', '.join(missing)}, so they are never chosen; add them to "
            "usd_per_hour, or take them out of instance_types"
        )
    said = "on-demand from the AWS Price List, spot from the spot price history"
    if from_table := [name for name in prices.from_table if name in here]:
        said = f"on-demand of {', '.join(from_table)} from a table of {TABLE_OF} for us-east-1"
        if prices.refusal:
            said += f", because {prices.refusal} (to read the Price List: {policy_line('pricing:GetProducts')})"
    return said + (f"; {', '.join(prices.own)} as the account says" if prices.own else "")


def _scores(market: Market) -> str:
    scores = market.scores()
    if scores.refusal:
        return f"not used: {scores.refusal}"
    return f"used to judge how soon spot machines are taken, {len(scores.by_zone)} of them"


def _cheapest(market: Market) -> str:
    offers = market.offers()
    if not offers:
        raise ConfigError("aws account: none of the instance_types is offered in any zone that has a subnet")
    best = min(offers, key=lambda offer: offer.usd_per_hour)
    return f"{best.pool} at ${best.usd_per_hour:.4f} an hour"
