"""moto's instances, brought to life: each is started on the machine host and told the truth about its end.

moto's functions are wrapped in its own process, because only there can an instance's StateReason be set, and whatever
launches instances (RunInstances, CreateFleet, Auto Scaling) comes through them. Pinned: moto 5.2.5.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from moto import settings
from moto.autoscaling import models as groups
from moto.autoscaling import responses as group_responses
from moto.core.responses import ActionResult
from moto.core.utils import utcnow
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import instances
from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS
from moto.ec2.responses import fleets as fleet_responses

from holdfast.drivers.local.config import Fate
from tests.emulated.aws_market import on_demand_usd, spot_usd
from tests.emulated.machine_host import Life, MachineHost

ACCOUNT = "123456789012"
FLEET_ID_TAG = "aws:ec2:fleet-id"


class Refusal(EC2ClientError):
    """A pool is empty. The status, 500 as EC2's own, is set where the answer is sent."""

    def __init__(self, instance_type: str, zone: str) -> None:
        super().__init__(
            "InsufficientInstanceCapacity",
            f"We currently do not have sufficient {instance_type} capacity in the Availability Zone you requested ({zone}). "
            "Our system will be working on provisioning additional capacity.",
        )


@dataclass(slots=True)
class _Body:
    instance: Any
    shown_from: float
    """`time.monotonic()` from which the API knows it."""


class Machines:
    """The instances of the emulator that is in use; there is one at a time, as moto's state is one."""

    current: Machines | None = None

    def __init__(self, host: MachineHost) -> None:
        self.host = host
        self.hidden_seconds = 0.0
        self.asking = threading.local()
        """`form`, of the request under way; `hides` where it does not see what is too new."""
        self.lock = threading.RLock()
        self._bodies: dict[str, _Body] = {}
        self._fates: dict[str, Fate] = {}
        self._activities: dict[str, list[dict[str, Any]]] = {}

    def refresh(self) -> None:
        """Bring what moto says up to date with what the host knows, and let Auto Scaling groups replace what is gone."""
        with self.lock:
            for machine_id, body in self._bodies.items():
                if body.instance._state.name != "terminated":
                    _tell(body.instance, self.host.life(machine_id))
            for backend in list(groups.autoscaling_backends[ACCOUNT].values()):
                for group in list(backend.autoscaling_groups.values()):
                    group.instance_states = [
                        state for state in group.instance_states if state.instance._state.name in ("pending", "running")
                    ]
                    missing = (group.desired_capacity or 0) - len(group.instance_states)
                    if missing > 0:
                        group.replace_autoscaling_group_instances(missing, group.get_propagated_tags())

    def forget(self, machine_id: str) -> None:
        self._bodies[machine_id].shown_from = float("inf")

    def is_hidden(self, machine_id: str) -> bool:
        body = self._bodies.get(machine_id)
        return bool(body and getattr(self.asking, "hides", False) and time.monotonic() < body.shown_from)

    def state_of(self, machine_id: str) -> str:
        return self._bodies[machine_id].instance._state.name

    def known(self, machine_id: str) -> bool:
        return machine_id in self._bodies and not self.is_hidden(machine_id)

    # -- launching ----------------------------------------------------------------------------------------------------

    def launch(
        self, backend: Any, original: Any, image_id: str, count: int, user_data: Any, groups_: Any, **asked: Any
    ) -> Any:
        with self.lock:
            form = getattr(self.asking, "form", {})
            template = (
                backend._get_template_from_args(asked["launch_template"]).data if asked.get("launch_template") else {}
            )
            if not asked.get("instance_market_options"):
                asked["instance_market_options"] = template.get("InstanceMarketOptions", {}).get("MarketType", {})
            model = "spot" if asked["instance_market_options"] == "spot" else "on-demand"
            if asked.get("is_instance_type_default") and template.get("InstanceType"):
                asked["instance_type"], asked["is_instance_type_default"] = template["InstanceType"], False
            kind = asked["instance_type"]
            zone = self._zone_of(backend, asked)
            self._insist_on_offer(kind, zone, backend.region_name)
            fate = self._fate(model, form.get("ClientToken", "") if form.get("Action") == "RunInstances" else "")
            if fate.refuse:
                raise Refusal(kind, zone)
            # What moto makes of "by default stop" and of protection, it takes from nowhere.
            asked["instance_initiated_shutdown_behavior"] = asked.get(
                "instance_initiated_shutdown_behavior"
            ) or template.get("InstanceInitiatedShutdownBehavior")
            reservation = original(backend, image_id, count, user_data, groups_, **asked)
            for instance in reservation.instances:
                protected = form.get("DisableApiTermination", template.get("DisableApiTermination", False))
                instance.disable_api_termination = str(protected).lower() == "true"
                instance.launch_time = utcnow().replace(microsecond=0)
                instance._state.name, instance._state.code = "pending", 0
                script = instance.user_data or template.get("UserData")
                self._bodies[instance.id] = _Body(instance, time.monotonic() + self.hidden_seconds)
                self.host.start(
                    instance.id,
                    region=backend.region_name,
                    zone=instance._placement.zone,
                    instance_type=kind,
                    provisioning_model=model,
                    startup_script=script.decode() if script else "#!/bin/bash\nexec sleep 86400\n",
                    fate=fate,
                )
            return reservation

    def end(self, instance: Any) -> Any:
        """As TerminateInstances: an orderly shutdown begins."""
        with self.lock:
            _tell(instance, self.host.life(instance.id))
            before = instances.InstanceState(instance._state.name, instance._state.code)
            if instance._state.name != "terminated":
                self.host.terminate(instance.id)
                instance._state.name, instance._state.code = "shutting-down", 32
                instance._told_at = datetime.now(UTC)
            return before

    def _zone_of(self, backend: Any, asked: dict[str, Any]) -> str:
        subnet = asked.get("subnet_id") or next(
            (nic["SubnetId"] for nic in asked.get("nics", []) if "SubnetId" in nic), ""
        )
        if subnet:
            return backend.get_subnet(subnet).availability_zone
        return asked.get("placement") or f"{backend.region_name}a"

    def _insist_on_offer(self, kind: str, zone: str, region: str) -> None:
        if kind not in {one["InstanceType"] for one in INSTANCE_TYPE_OFFERINGS["region"].get(region, [])}:
            raise EC2ClientError("InvalidParameterValue", f"Invalid value '{kind}' for InstanceType.")
        offered = INSTANCE_TYPE_OFFERINGS["availability-zone"].get(region, [])
        if kind not in {one["InstanceType"] for one in offered if one["Location"] == zone}:
            raise EC2ClientError(
                "Unsupported",
                f"Your requested instance type ({kind}) is not supported in your requested Availability Zone ({zone}).",
            )

    def _fate(self, model: str, token: str) -> Fate:
        if not token:
            return self.host.next_fate(model)
        if token not in self._fates:
            self._fates[token] = self.host.next_fate(model)
        return self._fates[token]

    # -- fleets -------------------------------------------------------------------------------------------------------

    def create_fleet(self, response: Any) -> ActionResult:
        """EC2 Fleet of type instant: the cheapest pools first, what can be had, and why there is no more."""
        capacity = response._get_param("TargetCapacitySpecification", {})
        (config,) = response._get_param("LaunchTemplateConfigs", [])
        tags = {
            specification["ResourceType"]: {tag["Key"]: tag["Value"] for tag in specification["Tags"]}
            for specification in response._get_param("TagSpecifications", [])
        }
        launched, errors = [], []
        fleet_id = f"fleet-{int(time.time() * 1e6):x}"
        for model in ("spot", "on-demand"):
            key = "SpotTargetCapacity" if model == "spot" else "OnDemandTargetCapacity"
            pools = sorted(config["Overrides"], key=lambda override: self._usd(response.ec2_backend, override, model))
            for _ in range(int(capacity.get(key, 0))):
                for override in pools:
                    try:
                        (machine_id,) = self._launch_one(response.ec2_backend, config, override, model, tags, fleet_id)
                    except EC2ClientError as error:
                        errors.append(
                            {
                                "LaunchTemplateAndOverrides": {"Overrides": override},
                                "Lifecycle": model,
                                "ErrorCode": error.code,
                                "ErrorMessage": error.message,
                            }
                        )
                        continue
                    launched.append(
                        {
                            "LaunchTemplateAndOverrides": {"Overrides": override},
                            "Lifecycle": model,
                            "InstanceIds": [machine_id],
                            "InstanceType": override["InstanceType"],
                        }
                    )
                    break
        return ActionResult({"FleetId": fleet_id, "Instances": launched, "Errors": errors})

    def _launch_one(
        self,
        backend: Any,
        config: dict[str, Any],
        override: dict[str, Any],
        model: str,
        tags: dict[str, Any],
        fleet: str,
    ) -> list[str]:
        reservation = backend.run_instances(
            None,
            1,
            None,
            [],
            instance_type=override["InstanceType"],
            is_instance_type_default=False,
            subnet_id=override["SubnetId"],
            region_name=backend.region_name,
            launch_template=config["LaunchTemplateSpecification"],
            instance_market_options="spot" if model == "spot" else {},
            tags={"instance": {**tags.get("instance", {}), FLEET_ID_TAG: fleet}},
        )
        return [instance.id for instance in reservation.instances]

    def _usd(self, backend: Any, override: dict[str, Any], model: str) -> float:
        zone = backend.get_subnet(override["SubnetId"]).availability_zone
        if model == "spot":
            return spot_usd(override["InstanceType"], zone, datetime.now(UTC))
        return on_demand_usd(override["InstanceType"], backend.region_name)

    # -- Auto Scaling groups ------------------------------------------------------------------------------------------

    def fill_group(self, group: Any, count: int, tags: dict[str, str]) -> None:
        """One machine after the other: on-demand up to the base and its share above, else spot."""
        policy = group.mixed_instances_policy or {}
        distribution = policy.get("InstancesDistribution", {})
        backend = group.autoscaling_backend.ec2_backend
        subnets = group.vpc_zone_identifier.split(",")
        overrides = policy.get("LaunchTemplate", {}).get("Overrides") or [{"InstanceType": group.instance_type}]
        template = {"LaunchTemplateName": group.ec2_launch_template.name, "Version": group.launch_template_version}
        for _ in range(count):
            lives = [state.instance.lifecycle for state in group.instance_states]
            on_demand = sum(life != "spot" for life in lives)
            base = int(distribution.get("OnDemandBaseCapacity", 0))
            share = int(distribution.get("OnDemandPercentageAboveBaseCapacity", 100))
            above = max(0, len(lives) + 1 - base)
            model = "on-demand" if on_demand < base + above * share // 100 else "spot"
            pools = [
                {"InstanceType": one["InstanceType"], "SubnetId": subnet} for subnet in subnets for one in overrides
            ]
            for override in sorted(pools, key=lambda override: self._usd(backend, override, model)):
                try:
                    reservation = backend.run_instances(
                        None,
                        1,
                        None,
                        [],
                        instance_type=override["InstanceType"],
                        is_instance_type_default=False,
                        subnet_id=override["SubnetId"],
                        region_name=backend.region_name,
                        launch_template=template,
                        instance_market_options="spot" if model == "spot" else {},
                        tags={"instance": {**tags, groups.ASG_NAME_TAG: group.name}},
                    )
                except EC2ClientError as error:
                    self._activities.setdefault(group.name, []).insert(0, _failed(group.name, error))
                    continue
                for instance in reservation.instances:
                    instance.autoscaling_group = group
                    group.instance_states.append(groups.InstanceState(instance, protected_from_scale_in=False))
                break

    def activities(self, name: str) -> list[dict[str, Any]]:
        return self._activities.get(name, [])


def _failed(name: str, error: EC2ClientError) -> dict[str, Any]:
    return {
        "ActivityId": f"{time.time_ns()}",
        "AutoScalingGroupName": name,
        "Cause": "a difference between desired and actual capacity",
        "Description": "Launching a new EC2 instance",
        "StartTime": datetime.now(UTC),
        "StatusCode": "Failed",
        "StatusMessage": f"{error.message} Launching EC2 instance failed.",
    }


def _tell(instance: Any, life: Life) -> None:
    """As EC2 words it; only what its API ended carries the time of its end."""
    if life.state != "terminated":
        names = {"pending": ("pending", 0), "running": ("running", 16), "stopping": ("shutting-down", 32)}
        instance._state.name, instance._state.code = names[life.state]
        return
    ORIGINAL["terminate"](instance)
    ended_at = life.ended_at or datetime.now(UTC)
    code, words, transition = {
        "preempted": ("Server.SpotInstanceTermination", "Spot instance termination", "Server.SpotInstanceTermination"),
        "ended-itself": ("Client.InstanceInitiatedShutdown", "Instance initiated shutdown", ""),
        "host-failed": ("Server.InternalError", "Internal error on launch", "Server.InternalError"),
        "terminated-by-user": (
            "Client.UserInitiatedShutdown",
            "User initiated shutdown",
            f"User initiated ({ended_at:%Y-%m-%d %H:%M:%S} GMT)",
        ),
    }[life.reason]
    instance.state_reason = instances.StateReason(f"{code}: {words}", code)
    instance._reason = transition


# -- what is wrapped, once for the process; without a current emulator moto is as it was --------------------------------

ORIGINAL: dict[str, Any] = {}


def wrap_moto() -> None:
    if ORIGINAL:
        return
    ORIGINAL["terminate"] = instances.Instance.terminate
    ORIGINAL["run"] = instances.InstanceBackend.run_instances
    ORIGINAL["reservations"] = instances.InstanceBackend.all_reservations
    ORIGINAL["fleet"] = fleet_responses.Fleets.create_fleet
    ORIGINAL["fill"] = groups.FakeAutoScalingGroup.replace_autoscaling_group_instances
    ORIGINAL["activities"] = group_responses.AutoScalingResponse.describe_scaling_activities
    settings.ENABLE_AMI_VALIDATION = True

    def run_instances(
        self: Any, image_id: str, count: int, user_data: Any, security_group_names: list[str], **kwargs: Any
    ) -> Any:
        here = Machines.current
        if here is None:
            return ORIGINAL["run"](self, image_id, count, user_data, security_group_names, **kwargs)
        return here.launch(self, ORIGINAL["run"], image_id, count, user_data, security_group_names, **kwargs)

    def terminate(self: Any) -> Any:
        here = Machines.current
        return here.end(self) if here and self.id in here._bodies else ORIGINAL["terminate"](self)

    def all_reservations(self: Any, filters: Any = None) -> Any:
        here = Machines.current
        found = ORIGINAL["reservations"](self, filters)
        if here is None or not getattr(here.asking, "hides", False):
            return found
        for reservation in found:  # copies, made for this answer
            reservation.instances = [one for one in reservation.instances if not here.is_hidden(one.id)]
        return [reservation for reservation in found if reservation.instances]

    def create_fleet(self: Any) -> Any:
        return Machines.current.create_fleet(self) if Machines.current else ORIGINAL["fleet"](self)

    def replace(self: Any, count_needed: int, propagated_tags: dict[str, str]) -> None:
        here = Machines.current
        (here.fill_group if here else ORIGINAL["fill"])(self, count_needed, propagated_tags)

    def describe_scaling_activities(self: Any) -> Any:
        if Machines.current is None:
            return ORIGINAL["activities"](self)
        return ActionResult({"Activities": Machines.current.activities(self._get_param("AutoScalingGroupName"))})

    instances.InstanceBackend.run_instances = run_instances
    instances.Instance.terminate = terminate
    instances.InstanceBackend.all_reservations = all_reservations
    fleet_responses.Fleets.create_fleet = create_fleet
    groups.FakeAutoScalingGroup.replace_autoscaling_group_instances = replace
    group_responses.AutoScalingResponse.describe_scaling_activities = describe_scaling_activities
