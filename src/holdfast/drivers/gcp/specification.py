"""What an instance is asked to be, for one machine and for the templates of fleets alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from holdfast.drivers.gcp import names
from holdfast.drivers.gcp.api import metadata_of
from holdfast.drivers.gcp.config import GcpConfig
from holdfast.drivers.protocol import CapacityPool

if TYPE_CHECKING:
    from google.cloud import compute_v1

MIN_RUN_SECONDS, MAX_RUN_SECONDS = 30, 120 * 24 * 3600
"""https://cloud.google.com/compute/docs/instances/limit-vm-runtime"""
GPU_FAMILIES = ("a2-", "a3-", "a4-", "a4x-", "g2-", "g4-")


def properties(
    config: GcpConfig,
    *,
    token: str,
    pool: CapacityPool,
    tags: Mapping[str, str],
    startup_script: str,
    shutdown_script: str,
    max_run_seconds: float | None,
    disk_gib: float,
) -> compute_v1.InstanceProperties:
    """Machine and disk types by their bare names, as templates want them."""
    from google.cloud import compute_v1

    gpus = config.gpus.get(pool.instance_type)
    has_gpus = bool(gpus) or pool.instance_type.startswith(GPU_FAMILIES)
    items = {
        "startup-script": startup_script,
        names.TAGS_ITEM: names.tags_item(tags),
        "block-project-ssh-keys": "TRUE",
        "serial-port-logging-enable": "TRUE" if config.console_logging else "FALSE",
    }
    if shutdown_script:
        items["shutdown-script"] = shutdown_script
    if has_gpus:
        items["install-nvidia-driver"] = "True"  # the Deep Learning images ask on a terminal otherwise
    return compute_v1.InstanceProperties(
        machine_type=pool.instance_type,
        labels=names.labels_of(token, tags),
        metadata=metadata_of(items),
        scheduling=scheduling(config, pool, has_gpus, max_run_seconds),
        disks=[
            compute_v1.AttachedDisk(
                boot=True,
                auto_delete=True,
                initialize_params=compute_v1.AttachedDiskInitializeParams(
                    source_image=config.image,
                    disk_size_gb=max(math.ceil(disk_gib), config.disk_gib),
                    disk_type=config.disk_type,
                ),
            )
        ],
        network_interfaces=[_interface(config, pool.region)],
        guest_accelerators=[compute_v1.AcceleratorConfig(accelerator_type=gpus.type, accelerator_count=gpus.count)]
        if gpus
        else [],
        service_accounts=[compute_v1.ServiceAccount(email=config.service_account, scopes=config.scopes)],
        # No secure boot: the GPU driver that the image installs is not signed.
        shielded_instance_config=compute_v1.ShieldedInstanceConfig(enable_vtpm=True, enable_integrity_monitoring=True),
    )


def scheduling(
    config: GcpConfig, pool: CapacityPool, has_gpus: bool, max_run_seconds: float | None
) -> compute_v1.Scheduling:
    from google.cloud import compute_v1

    spot = pool.provisioning_model == "spot"
    found = compute_v1.Scheduling(
        provisioning_model="SPOT" if spot else "STANDARD",
        # An attempt is one life of one machine: one that came back would go on under a fence that has passed on.
        automatic_restart=False,
        on_host_maintenance="TERMINATE" if spot or has_gpus else "MIGRATE",
    )
    if spot or max_run_seconds:
        found.instance_termination_action = "DELETE"
    if max_run_seconds:
        seconds = min(max(math.ceil(max_run_seconds), MIN_RUN_SECONDS), MAX_RUN_SECONDS)
        found.max_run_duration = compute_v1.Duration(seconds=seconds)
    if spot and config.preemption_notice_seconds:
        found.preemption_notice_duration = compute_v1.Duration(seconds=config.preemption_notice_seconds)
    return found


def instance(properties: compute_v1.InstanceProperties, name: str, zone: str) -> compute_v1.Instance:
    """Of one zone: there, machine, disk and accelerator types are named by their paths."""
    from google.cloud import compute_v1

    asked = compute_v1.Instance(
        name=name,
        machine_type=f"zones/{zone}/machineTypes/{properties.machine_type}",
        labels=dict(properties.labels),
        metadata=properties.metadata,
        scheduling=properties.scheduling,
        disks=properties.disks,
        network_interfaces=properties.network_interfaces,
        guest_accelerators=properties.guest_accelerators,
        service_accounts=properties.service_accounts,
        shielded_instance_config=properties.shielded_instance_config,
    )
    for disk in asked.disks:
        disk.initialize_params.disk_type = f"zones/{zone}/diskTypes/{disk.initialize_params.disk_type}"
    for accelerator in asked.guest_accelerators:
        accelerator.accelerator_type = f"zones/{zone}/acceleratorTypes/{accelerator.accelerator_type}"
    return asked


def _interface(config: GcpConfig, region: str) -> compute_v1.NetworkInterface:
    from google.cloud import compute_v1

    network = config.network if "/" in config.network else f"global/networks/{config.network}"
    subnetwork = config.subnetwork
    if subnetwork and "/" not in subnetwork:
        subnetwork = f"regions/{region}/subnetworks/{subnetwork}"
    found = compute_v1.NetworkInterface(network=network)
    if subnetwork:
        found.subnetwork = subnetwork
    if config.external_address:
        found.access_configs = [compute_v1.AccessConfig(name="External NAT", type_="ONE_TO_ONE_NAT")]
    return found
