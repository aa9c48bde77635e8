"""Machines by the dozen: a bulk insert for fleets that are asked for once, managed instance groups for kept ones.

Both have a part that is spot and a part that is on demand. Names follow from the token, so that whoever repeats a call
finds what the one before left, half of a fleet too. A kept fleet's tags are in its instance templates.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from holdfast.drivers.gcp import names, specification
from holdfast.drivers.gcp.api import PAGE, ComputeApi, metadata_of
from holdfast.drivers.gcp.errors import is_gone, translated
from holdfast.drivers.gcp.machines import CLOUD, Machines
from holdfast.drivers.protocol import CapacityPool, Fleet, FleetRequest, Machine, ProvisioningModel
from holdfast.errors import CapacityError, ConfigError, HoldfastError

if TYPE_CHECKING:
    from google.cloud import compute_v1

log = logging.getLogger(__name__)

APPEAR_SECONDS = 60.0
"""How long a fleet's machines are waited for. Those of a managed group that come later come by themselves."""
LOOK_SECONDS = 0.5
REGION_ITEM = "holdfast-region"
MODELS: tuple[ProvisioningModel, ...] = ("spot", "on-demand")


def launch(api: ComputeApi, machines: Machines, request: FleetRequest) -> Sequence[Machine]:
    regions = {pool.region for pool in request.pools}
    if len(regions) != 1:
        raise ConfigError(
            f"fleet {request.token}: its pools lie in {', '.join(sorted(regions)) or 'no region'}; name one"
        )
    parts = [_Part(api, request, model) for model in MODELS]
    parts = [part for part in parts if part.size]
    refusal: HoldfastError | None = None
    expected = 0
    for part in parts:
        try:
            expected += part.maintain() if request.kind == "maintained" else part.insert_once(machines)
        except CapacityError as error:
            refusal = error
    found = _await_machines(api, machines, request, expected, [part for part in parts if request.kind == "maintained"])
    if found:
        return found
    if request.kind == "maintained":
        refusal = refusal or CapacityError(_why_none(parts, request))
        end(api, machines, request.token, regions.pop())
    raise refusal or CapacityError(
        f"fleet {request.token}: none of its machines appeared within {APPEAR_SECONDS:.0f} s"
    )


def find(api: ComputeApi, tags: Mapping[str, str]) -> list[Fleet]:
    """From templates and groups: a fleet that lacks one of them is one too, until it is ended."""
    doing = "listing fleets"
    found: dict[str, dict[str, str]] = {}
    regions: dict[str, str] = {}
    pager = api.call(
        api.templates.list,
        doing,
        "compute.instanceTemplates.list",
        project=api.project,
        filter=f'name eq "{_TEMPLATE}.*"',
    )
    for template in api.pages(pager, doing, "compute.instanceTemplates.list"):
        items = {item.key: item.value for item in template.properties.metadata.items}
        digest = template.name.removeprefix(_TEMPLATE)[:16]
        found[digest] = names.tags_of(items, template.properties.labels)
        regions[digest] = items.get(REGION_ITEM, "")
    sizes: dict[str, int] = defaultdict(int)
    pager = api.call(
        api.all_groups.aggregated_list,
        doing,
        "compute.instanceGroupManagers.list",
        project=api.project,
        filter=f'name eq "{_GROUP}.*"',
        max_results=PAGE,
    )
    for _, scoped in api.pages(pager, doing, "compute.instanceGroupManagers.list"):
        for group in scoped.instance_group_managers:
            sizes[group.name.removeprefix(_GROUP)[:16]] += group.target_size
    fleets = []
    for digest, all_tags in sorted(found.items()):
        kept = {name: value for name, value in all_tags.items() if name != names.FLEET_TAG}
        if all(kept.get(name) == value for name, value in tags.items()):
            fleets.append(
                Fleet(
                    token=all_tags.get(names.FLEET_TAG, ""),
                    cloud=CLOUD,
                    region=regions[digest],
                    machines=sizes[digest],
                    tags=kept,
                )
            )
    return fleets


def end(api: ComputeApi, machines: Machines, token: str, region: str) -> None:
    """Groups first, with their machines; templates when nothing uses them any more; then what a bulk insert made."""
    groups = [
        _begin(
            api,
            f"ending fleet {token}",
            "compute.instanceGroupManagers.delete",
            api.groups.delete_unary,
            region=region,
            instance_group_manager=group_name(token, model),
        )
        for model in MODELS
    ]
    for operation in groups:
        _await(api, operation, f"ending fleet {token}")
    for model in MODELS:
        operation = _begin(
            api,
            f"ending fleet {token}",
            "compute.instanceTemplates.delete",
            api.templates.delete_unary,
            instance_template=template_name(token, model),
        )
        _await(api, operation, f"ending fleet {token}")
    for machine in machines.with_tags({names.FLEET_TAG: token}, 0.0):
        known = machines.known(machine.id)
        if machine.state == "terminated" or machine.state == "stopping" or (known and known.of_group):
            continue
        _begin(
            api,
            f"terminating {machine.id}",
            "compute.instances.delete",
            api.instances.delete_unary,
            zone=machine.pool.zone,
            instance=machine.id,
        )
        machines.asked_to_end(machine.id)


_GROUP, _TEMPLATE = f"{names.PREFIX}g-", f"{names.PREFIX}t-"


def group_name(token: str, model: str) -> str:
    return f"{_GROUP}{names.digest(token, 16)}-{model}"


def template_name(token: str, model: str) -> str:
    return f"{_TEMPLATE}{names.digest(token, 16)}-{model}"


class _Part:
    """A fleet's machines of one provisioning model."""

    def __init__(self, api: ComputeApi, request: FleetRequest, model: ProvisioningModel) -> None:
        self.api, self.request, self.model = api, request, model
        self.pools = [pool for pool in request.pools if pool.provisioning_model == model]
        spot = round(request.machines * request.spot_share)
        self.size = spot if model == "spot" else request.machines - spot
        if self.size and not self.pools:
            raise ConfigError(
                f"fleet {request.token}: {self.size} of {request.machines} machines are {model}, and none of its pools is; "
                "add one, or change spot_share"
            )
        self.tags = {**request.tags, names.FLEET_TAG: request.token}
        self.doing = f"launching {self.size} {model} machines of fleet {request.token}"

    @property
    def region(self) -> str:
        return self.pools[0].region

    @property
    def zones(self) -> list[str]:
        return list(dict.fromkeys(pool.zone for pool in self.pools))

    @property
    def machine_types(self) -> list[str]:
        return list(dict.fromkeys(pool.instance_type for pool in self.pools))

    def _properties(self, **metadata: str) -> compute_v1.InstanceProperties:
        request = self.request
        found = specification.properties(
            self.api.config,
            token=request.token,
            pool=self.pools[0],
            tags=self.tags,
            startup_script=request.startup_script,
            shutdown_script=request.shutdown_script,
            max_run_seconds=request.max_run_seconds,
            disk_gib=request.disk_gib,
        )
        found.metadata.items.extend(metadata_of(metadata).items)
        return found

    def _base_name(self, member: str) -> str:
        pool = self.pools[0]
        of_region = CapacityPool(pool.cloud, pool.region, "", pool.instance_type, pool.provisioning_model)
        return names.instance_name(f"{self.request.token}/{self.model}/{member}", self.tags, of_region)

    # -- asked for once -----------------------------------------------------------------------------------------------

    def insert_once(self, machines: Machines) -> int:
        """How many machines there should be. What an earlier call made is what there is; nothing is added to it."""
        from google.cloud import compute_v1

        before = [
            machine
            for machine in machines.with_tags({names.FLEET_TAG: self.request.token}, 0.0)
            if machine.pool.provisioning_model == self.model
        ]
        if before:
            return len(before)
        members = [self._base_name(f"{number:04d}") for number in range(self.size)]
        resource = compute_v1.BulkInsertInstanceResource(
            count=self.size,
            min_count=1,
            instance_properties=self._properties(),
            per_instance_properties={
                name: compute_v1.BulkInsertInstanceResourcePerInstanceProperties(name=name) for name in members
            },
            location_policy=compute_v1.LocationPolicy(locations=self._locations(), target_shape="ANY"),
        )
        if len(self.machine_types) > 1:
            resource.instance_flexibility_policy = compute_v1.InstanceFlexibilityPolicy(
                instance_selections={
                    f"choice-{rank}": compute_v1.InstanceFlexibilityPolicyInstanceSelection(
                        machine_types=[name], rank=rank
                    )
                    for rank, name in enumerate(self.machine_types)
                }
            )
        done = self.api.create(
            self.api.region_instances.bulk_insert_unary,
            self.doing,
            "compute.instances.create",
            once=(self.region, *members),
            region=self.region,
            bulk_insert_instance_resource_resource=resource,
        )
        if done is None:
            return self.size
        status = done.instances_bulk_insert_operation_metadata.per_location_status
        return sum(one.created_vm_count for one in status.values()) or 1

    def _locations(self) -> dict[str, compute_v1.LocationPolicyLocation]:
        """Zones that are not named are allowed, so all others are named too."""
        from google.cloud import compute_v1

        region = self.api.call(
            self.api.regions.get, self.doing, "compute.regions.get", project=self.api.project, region=self.region
        )
        every = {zone.rpartition("/")[2] for zone in region.zones} | set(self.zones)
        return {
            f"zones/{zone}": compute_v1.LocationPolicyLocation(preference="ALLOW" if zone in self.zones else "DENY")
            for zone in sorted(every)
        }

    # -- kept by the cloud --------------------------------------------------------------------------------------------

    def maintain(self) -> int:
        """Template and group, made unless they are there; how many machines it keeps."""
        from google.cloud import compute_v1

        template = compute_v1.InstanceTemplate(
            name=template_name(self.request.token, self.model),
            properties=self._properties(**{REGION_ITEM: self.region}),
        )
        self.api.create(
            self.api.templates.insert_unary,
            self.doing,
            "compute.instanceTemplates.create",
            instance_template_resource=template,
        )
        group = compute_v1.InstanceGroupManager(
            name=group_name(self.request.token, self.model),
            base_instance_name=self._base_name(""),
            instance_template=f"global/instanceTemplates/{template.name}",
            target_size=self.size,
            # A member that is not running is made anew. Whether it works is the supervision's to judge, which needs no
            # port open; a health check may be named in the account.
            instance_lifecycle_policy=compute_v1.InstanceGroupManagerInstanceLifecyclePolicy(
                default_action_on_failure="REPAIR", force_update_on_repair="NO"
            ),
            distribution_policy=compute_v1.DistributionPolicy(
                target_shape="ANY",
                zones=[
                    compute_v1.DistributionPolicyZoneConfiguration(zone=f"projects/{self.api.project}/zones/{zone}")
                    for zone in self.zones
                ],
            ),
            update_policy=compute_v1.InstanceGroupManagerUpdatePolicy(
                type_="OPPORTUNISTIC", instance_redistribution_type="NONE"
            ),
        )
        if self.api.config.health_check:
            group.auto_healing_policies = [
                compute_v1.InstanceGroupManagerAutoHealingPolicy(
                    health_check=self.api.config.health_check,
                    initial_delay_sec=self.api.config.health_check_delay_seconds,
                )
            ]
        if len(self.machine_types) > 1:
            group.instance_flexibility_policy = compute_v1.InstanceGroupManagerInstanceFlexibilityPolicy(
                instance_selections={
                    f"choice-{rank}": compute_v1.InstanceGroupManagerInstanceFlexibilityPolicyInstanceSelection(
                        machine_types=[name], rank=rank
                    )
                    for rank, name in enumerate(self.machine_types)
                }
            )
        self.api.create(
            self.api.groups.insert_unary,
            self.doing,
            "compute.instanceGroupManagers.create",
            region=self.region,
            instance_group_manager_resource=group,
        )
        return self.size

    def failures(self) -> list[str]:
        """What the group says of members that it could not make."""
        pager = self.api.call(
            self.api.groups.list_managed_instances,
            self.doing,
            "compute.instanceGroupManagers.get",
            project=self.api.project,
            region=self.region,
            instance_group_manager=group_name(self.request.token, self.model),
        )
        return [
            f"{error.code}: {error.message}"
            for member in self.api.pages(pager, self.doing, "compute.instanceGroupManagers.get")
            for error in member.last_attempt.errors.errors
        ]


def _await_machines(
    api: ComputeApi, machines: Machines, request: FleetRequest, expected: int, groups: Sequence[_Part]
) -> list[Machine]:
    """The fleet's machines, once there are as many as expected, or all others are known to have failed."""
    give_up_at = time.monotonic() + APPEAR_SECONDS
    while True:
        found = machines.with_tags({names.FLEET_TAG: request.token}, 0.0)
        living = [machine for machine in found if machine.state != "terminated"]
        enough = found if request.kind == "instant" else living
        if not expected or len(enough) >= expected or time.monotonic() > give_up_at:
            return enough
        if groups and len(living) + sum(len(part.failures()) for part in groups) >= expected:
            return living
        time.sleep(LOOK_SECONDS)


def _why_none(parts: Sequence[_Part], request: FleetRequest) -> str:
    said = [words for part in parts for words in part.failures()]
    return f"fleet {request.token}: no capacity for any of its machines: {'; '.join(dict.fromkeys(said)) or 'no reason given'}"


def _begin(
    api: ComputeApi,
    doing: str,
    permission: str,
    method: Callable[..., compute_v1.Operation],
    **request: object,
) -> compute_v1.Operation | None:
    """None where there is nothing to be deleted."""
    try:
        return api.ask(method, project=api.project, **request)
    except Exception as error:
        if is_gone(error):
            return None
        with translated(doing, permission):
            raise


def _await(api: ComputeApi, operation: compute_v1.Operation | None, doing: str) -> None:
    if operation is None:
        return
    with translated(doing):
        try:
            api.wait(operation, doing)
        except Exception as error:
            if not is_gone(error):
                raise
