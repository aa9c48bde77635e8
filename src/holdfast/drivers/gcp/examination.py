"""What the account needs, line by line, and why it may not work."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from holdfast.drivers.gcp.api import ComputeApi
from holdfast.drivers.gcp.errors import ROLE_FILE
from holdfast.drivers.protocol import Finding
from holdfast.errors import ConfigError, HoldfastError

if TYPE_CHECKING:
    from google.cloud import compute_v1

    from holdfast.drivers.gcp.driver import GcpDriver

PERMISSIONS = (
    "compute.disks.create",
    "compute.globalOperations.get",
    "compute.globalOperations.list",
    "compute.images.getFromFamily",
    "compute.images.get",
    "compute.images.useReadOnly",
    "compute.instanceGroupManagers.create",
    "compute.instanceGroupManagers.delete",
    "compute.instanceGroupManagers.get",
    "compute.instanceGroupManagers.list",
    "compute.instanceGroupManagers.update",
    "compute.instanceTemplates.create",
    "compute.instanceTemplates.delete",
    "compute.instanceTemplates.get",
    "compute.instanceTemplates.list",
    "compute.instanceTemplates.useReadOnly",
    "compute.instances.create",
    "compute.instances.delete",
    "compute.instances.get",
    "compute.instances.getSerialPortOutput",
    "compute.instances.list",
    "compute.instances.setDeletionProtection",
    "compute.instances.setLabels",
    "compute.instances.setMetadata",
    "compute.instances.setServiceAccount",
    "compute.machineTypes.list",
    "compute.networks.get",
    "compute.regionOperations.get",
    "compute.regions.get",
    "compute.subnetworks.use",
    "compute.subnetworks.useExternalIp",
    "compute.zoneOperations.get",
    "iam.serviceAccounts.actAs",
    "logging.logEntries.list",
)
"""What the driver's calls take. `logging.logEntries.list`: only for consoles of machines that are gone."""
QUOTAS = (
    "CPUS",
    "N2_CPUS",
    "C3_CPUS",
    "PREEMPTIBLE_CPUS",
    "PREEMPTIBLE_NVIDIA_L4_GPUS",
    "PREEMPTIBLE_NVIDIA_A100_GPUS",
    "PREEMPTIBLE_NVIDIA_A100_80GB_GPUS",
    "PREEMPTIBLE_NVIDIA_H100_GPUS",
    "NVIDIA_L4_GPUS",
    "NVIDIA_A100_GPUS",
    "NVIDIA_H100_GPUS",
    "IN_USE_ADDRESSES",
    "SSD_TOTAL_GB",
)


def check_region(api: ComputeApi, region: str) -> compute_v1.Region:
    """Raises ConfigError for a region or a project that is not there."""
    return api.call(
        api.regions.get,
        f"looking up region {region} of project {api.project}",
        "compute.regions.get",
        project=api.project,
        region=region,
    )


def find_image(api: ComputeApi) -> compute_v1.Image:
    """Raises ConfigError for an image that is not there or not to be used."""
    path = re.sub(r"^https?://[^/]+/compute/v1/", "", api.config.image)
    family = re.fullmatch(r"projects/([^/]+)/global/images/family/([^/]+)", path)
    named = re.fullmatch(r"projects/([^/]+)/global/images/([^/]+)", path)
    doing = f"looking up the image {api.config.image}"
    if family:
        return api.call(
            api.images.get_from_family, doing, "compute.images.getFromFamily", project=family[1], family=family[2]
        )
    if named:
        return api.call(api.images.get, doing, "compute.images.get", project=named[1], image=named[2])
    raise ConfigError(
        f"image: {api.config.image!r} is no image's path; write projects/PROJECT/global/images/NAME, or "
        "projects/PROJECT/global/images/family/FAMILY"
    )


def examine(driver: GcpDriver) -> Iterator[Finding]:
    api = driver.api
    yield from _guarded("credentials", lambda: _credentials(api))
    yield from _guarded("permissions", lambda: _permissions(api))
    yield from _guarded("image", lambda: _image(api))
    yield from _guarded("network", lambda: _network(api))
    for region in driver.config.regions:
        yield from _guarded(f"quota {region}", lambda region=region: _quotas(api, region))  # type: ignore[misc]
    yield from _guarded("prices", lambda: _prices(driver))
    yield from _guarded("capacity advice", lambda: _advice(driver))


def _guarded(subject: str, look: Callable[[], Finding]) -> Iterator[Finding]:
    try:
        yield look()
    except HoldfastError as error:
        yield Finding(subject=subject, ok=False, detail=str(error))
    except Exception as error:  # an examination reports, whatever happens
        yield Finding(subject=subject, ok=False, detail=f"could not be examined: {error!r}")


def _credentials(api: ComputeApi) -> Finding:
    check_region(api, api.config.regions[0])
    return Finding(subject="credentials", ok=True, detail=f"accepted for project {api.project}")


def _permissions(api: ComputeApi) -> Finding:
    answer = api.json(
        "POST",
        "cloudresourcemanager",
        f"v1/projects/{api.project}:testIamPermissions",
        "asking for this account's permissions",
        json={"permissions": list(PERMISSIONS)},
    )
    missing = [name for name in PERMISSIONS if name not in answer.get("permissions", [])]
    if missing:
        return Finding(
            subject="permissions",
            ok=False,
            detail=f"missing: {', '.join(missing)}; grant this account the role in {ROLE_FILE}",
        )
    return Finding(subject="permissions", ok=True, detail=f"all {len(PERMISSIONS)} that the driver needs")


def _image(api: ComputeApi) -> Finding:
    image = find_image(api)
    if image.disk_size_gb > api.config.disk_gib:
        return Finding(
            subject="image",
            ok=False,
            detail=f"{image.name} needs a disk of {image.disk_size_gb} GiB, disk_gib is {api.config.disk_gib}; raise it",
        )
    return Finding(subject="image", ok=True, detail=f"{image.name} ({image.disk_size_gb} GiB)")


def _network(api: ComputeApi) -> Finding:
    network = api.config.network
    if "/" in network:
        return Finding(subject="network", ok=True, detail=f"{network} (shared; not looked up)")
    api.call(
        api.networks.get, f"looking up network {network}", "compute.networks.get", project=api.project, network=network
    )
    how = "external addresses, no open port of ours" if api.config.external_address else "no external addresses"
    return Finding(subject="network", ok=True, detail=f"{network}: {how}")


def _quotas(api: ComputeApi, region: str) -> Finding:
    quotas = {quota.metric: quota for quota in check_region(api, region).quotas}
    shown = [
        f"{metric} {quotas[metric].usage:g} of {quotas[metric].limit:g}"
        for metric in QUOTAS
        if metric in quotas and (quotas[metric].limit or metric in ("CPUS", "PREEMPTIBLE_CPUS"))
    ]
    # Where PREEMPTIBLE_CPUS is 0, Spot VMs count against CPUS: https://cloud.google.com/compute/resource-usage#preemptible-quotas
    left = max(
        (quotas[name].limit - quotas[name].usage for name in ("CPUS", "PREEMPTIBLE_CPUS") if name in quotas), default=1
    )
    if left <= 0:
        return Finding(
            subject=f"quota {region}",
            ok=False,
            detail=f"no CPUs are left ({'; '.join(shown)}); ask for more in the console's quota page",
        )
    return Finding(subject=f"quota {region}", ok=True, detail="; ".join(shown) or "none is told")


def _prices(driver: GcpDriver) -> Finding:
    offers = driver.offers()
    if not offers:
        return Finding(
            subject="prices",
            ok=False,
            detail="none of machine_types is offered in the account's zones; correct machine_types, regions or zones",
        )
    cheapest = min(offers, key=lambda offer: offer.usd_per_hour)
    return Finding(
        subject="prices",
        ok=True,
        detail=f"from {driver.market.source}; cheapest: {cheapest.pool} at ${cheapest.usd_per_hour:.4f} per hour",
    )


def _advice(driver: GcpDriver) -> Finding:
    driver.offers()
    advice = driver.market.advice
    used = f"used to judge how soon spot machines are taken, on {len(advice.of)} pools"
    return Finding(subject="capacity advice", ok=True, detail=f"not used: {advice.refusal}" if advice.refusal else used)
