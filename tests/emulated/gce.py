"""Compute Engine on loopback: the API that google-cloud-compute speaks, in front of machines that really run.

    with GceEmulator(folder, spot_fates=[Fate(after_seconds=5)]) as gce:
        driver = gce.driver()
        ...
        assert gce.calls["instances.insert"] == 1

Requests are parsed with the client library's own messages, unknown fields refused. What a project sees of Cloud
Billing, Cloud Logging and Resource Manager is here too. While it is open no connection may leave this computer.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

from google.cloud import compute_v1
from google.oauth2.credentials import Credentials
from google.protobuf import json_format

from holdfast.drivers.gcp import GcpConfig, GcpDriver
from holdfast.drivers.local import machine_files as files
from holdfast.drivers.local.config import Fate
from tests.emulated.machine_host import MachineHost
from tests.emulated.wire import compute_action

PROJECT = "test-project"
TOKEN = "ya29.emulated-access-token"
IMAGE = "projects/deeplearning-platform-release/global/images/family/pytorch-test"
ZONES = {
    "us-central1": ("us-central1-a", "us-central1-b", "us-central1-c"),
    "europe-west4": ("europe-west4-a", "europe-west4-b"),
}
# name: vCPUs, MiB, accelerator, count
MACHINE_TYPES: dict[str, tuple[int, int, str, int]] = {
    "n2-standard-2": (2, 8192, "", 0),
    "n2-standard-8": (8, 32768, "", 0),
    "g2-standard-4": (4, 16384, "nvidia-l4", 1),
    "a2-highgpu-1g": (12, 87040, "nvidia-tesla-a100", 1),
    "n1-standard-4": (4, 15360, "", 0),
}
ACCELERATORS = ("nvidia-tesla-t4", "nvidia-tesla-v100")
# description, group, on-demand dollars, spot dollars
SKUS = (
    ("N2 Instance Core", "CPU", 0.031611, 0.009483),
    ("N2 Instance Ram", "RAM", 0.004237, 0.001271),
    ("N1 Predefined Instance Core", "CPU", 0.031611, 0.00698),
    ("N1 Predefined Instance Ram", "RAM", 0.004237, 0.000938),
    ("G2 Instance Core", "CPU", 0.024988, 0.009995),
    ("G2 Instance Ram", "RAM", 0.002927, 0.001171),
    ("A2 Instance Core", "CPU", 0.031611, 0.012644),
    ("A2 Instance Ram", "RAM", 0.004237, 0.001695),
    ("Nvidia L4 GPU", "GPU", 0.560040, 0.224016),
    ("Nvidia Tesla A100 GPU", "GPU", 2.933908, 1.173563),
    ("Nvidia Tesla T4 GPU", "GPU", 0.35, 0.14),
    ("N2 Custom Instance Core", "CPU", 0.033174, 0.009952),
    ("N2 Sole Tenancy Instance Core", "CPU", 9.9, 9.9),
)
PERMISSIONS: dict[str, tuple[str, ...]] = {
    "advice.capacity": ("compute.advice.capacity",),
    "cloudbilling.skus.list": (),
    "globalOperations.get": ("compute.globalOperations.get",),
    "images.get": ("compute.images.get",),
    "images.getFromFamily": ("compute.images.getFromFamily",),
    "instanceGroupManagers.aggregatedList": ("compute.instanceGroupManagers.list",),
    "instanceGroupManagers.delete": ("compute.instanceGroupManagers.delete",),
    "instanceGroupManagers.insert": ("compute.instanceGroupManagers.create", "compute.instanceTemplates.useReadOnly"),
    "instanceGroupManagers.listManagedInstances": ("compute.instanceGroupManagers.get",),
    "instanceTemplates.delete": ("compute.instanceTemplates.delete",),
    "instanceTemplates.insert": ("compute.instanceTemplates.create",),
    "instanceTemplates.list": ("compute.instanceTemplates.list",),
    "instances.aggregatedList": ("compute.instances.list",),
    "instances.delete": ("compute.instances.delete",),
    "instances.get": ("compute.instances.get",),
    "instances.getSerialPortOutput": ("compute.instances.getSerialPortOutput",),
    "instances.setDeletionProtection": ("compute.instances.setDeletionProtection",),
    "logging.entries.list": ("logging.logEntries.list",),
    "machineTypes.aggregatedList": ("compute.machineTypes.list",),
    "networkEndpointGroups.aggregatedList": ("compute.networkEndpointGroups.list",),
    "networkEndpointGroups.attachNetworkEndpoints": (
        "compute.networkEndpointGroups.attachNetworkEndpoints",
        "compute.instances.use",
    ),
    "networkEndpointGroups.detachNetworkEndpoints": (
        "compute.networkEndpointGroups.detachNetworkEndpoints",
        "compute.instances.use",
    ),
    "networkEndpointGroups.listNetworkEndpoints": ("compute.networkEndpointGroups.get",),
    "networks.get": ("compute.networks.get",),
    "operations.aggregatedList": ("compute.globalOperations.list",),
    "projects.testIamPermissions": (),
    "regionOperations.get": ("compute.regionOperations.get",),
    "regions.get": ("compute.regions.get",),
    "zoneOperations.get": ("compute.zoneOperations.get",),
}
"""What each method takes, by https://docs.cloud.google.com/compute/docs/reference/rest/v1; a method that is not here is
not served."""
MAKING_AN_INSTANCE = (
    "compute.disks.create",
    "compute.images.useReadOnly",
    "compute.instances.create",
    "compute.instances.setLabels",
    "compute.instances.setMetadata",
    "compute.instances.setServiceAccount",
    "compute.subnetworks.use",
    "compute.subnetworks.useExternalIp",
    "iam.serviceAccounts.actAs",
)
PERMISSIONS |= {"instances.insert": MAKING_AN_INSTANCE, "instances.bulkInsert": MAKING_AN_INSTANCE}
PERMISSIONS["instanceTemplates.insert"] += MAKING_AN_INSTANCE
VANISH_SECONDS = 0.25
"""Between power off and the end of an instance's resource."""


class Refused(Exception):
    """An HTTP error as Google words it."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


@dataclass
class Instance:
    message: compute_v1.Instance
    zone: str
    host_id: str
    vcpus: int
    made_at: float
    """`time.monotonic()`."""
    group: str = ""
    ended: bool = False
    deletion: compute_v1.Operation | None = None
    vanishes_at: float | None = None
    timed_out: bool = False

    @property
    def spot(self) -> bool:
        return self.message.scheduling.provisioning_model == "SPOT"


@dataclass
class Group:
    message: compute_v1.InstanceGroupManager
    region: str
    zones: list[str]
    members: dict[str, str] = field(default_factory=dict)
    """Zone by instance name; a name is used again for the instance that replaces another."""
    errors: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Code and message, by the name of a member that could not be made."""
    try_again_at: float = 0.0
    deletion: compute_v1.Operation | None = None


class GceEmulator:
    def __init__(
        self,
        folder: Path,
        *,
        spot_fates: Sequence[Fate] = (),
        on_demand_fates: Sequence[Fate] = (),
        machine_environment: Mapping[str, str] | None = None,
        wrap_url: Callable[[str], str] = lambda url: url,
    ) -> None:
        """`wrap_url`: of the emulator's URL, the one that drivers are given, such as a proxy's in front of it."""
        self.host = MachineHost(
            folder, "gcp", dict(machine_environment or {}), spot_fates=spot_fates, on_demand_fates=on_demand_fates
        )
        self.project = PROJECT
        self.calls: Counter[str] = Counter()
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        """Every request that changes something: its method, and what it sent."""
        self.tokens_seen: set[str] = set()
        self.leaks: list[str] = []
        """Hosts that somebody tried to reach outside."""
        self.faults: list[str] = []
        """What the emulator could not answer: its own shortcomings."""
        # What tests may change at any time:
        self.refusal_form: Literal["operation", "http"] = "operation"
        self.stockout_code = "ZONE_RESOURCE_POOL_EXHAUSTED"
        self.failing_operations: list[str] = []
        """Codes by which the next inserts' operations fail."""
        self.operation_seconds = 0.02
        self.invisible_seconds = 0.0
        """So long after its making, neither list nor get shows an instance."""
        self.page_size = 500
        self.denied: set[str] = set()
        """Permissions that the account lacks."""
        self.expired = False
        """Credentials are refused."""
        self.unreachable: set[str] = set()
        """Zones that an aggregated list can't look into."""
        self.billing_answers = True
        self.advice: dict[tuple[str, str], tuple[float, str]] = {}
        """Obtainability and estimated uptime by machine type and zone; empty: refused, as where it is not for a project."""
        self.limits: dict[tuple[str, str], float] = {}
        """Quotas by region and metric; 1000 where none is set."""

        self.operations: dict[str, compute_v1.Operation] = {}
        self._due: dict[str, float] = {}
        self._answers: dict[str, compute_v1.Operation | Refused] = {}
        self._instances: dict[tuple[str, str], Instance] = {}
        self._logged: dict[str, str] = {}
        self._templates: dict[str, compute_v1.InstanceTemplate] = {}
        self._groups: dict[str, Group] = {}
        self._endpoints: dict[tuple[str, str], dict[str, compute_v1.NetworkEndpoint]] = {}
        """By zone and name of a network endpoint group: its endpoints, by instance."""
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = self.endpoint
        self._wrap_url = wrap_url

    def __enter__(self) -> Self:
        self._getaddrinfo = socket.getaddrinfo
        socket.getaddrinfo = self._only_loopback  # type: ignore[assignment]
        self.url = self._wrap_url(self.endpoint)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="gce").start()
        self._follower = threading.Thread(target=self._follow, daemon=True, name="gce-follow")
        self._follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._follower.join()
        self._server.shutdown()
        self._server.server_close()
        for host_id in self.host.ids():
            self.host.terminate(host_id)  # one that is still booting hears it when it is up
        self.host.stop_all()
        socket.getaddrinfo = self._getaddrinfo
        assert not self.leaks, f"requests left for {', '.join(self.leaks)}"
        assert not self.faults, f"the emulator could not answer: {'; '.join(self.faults)}"

    def _only_loopback(self, host: Any, *arguments: Any, **named: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", "::1", None, b"127.0.0.1"):
            self.leaks.append(str(host))
            raise OSError(f"{host} is outside")
        return self._getaddrinfo(host, *arguments, **named)

    # -- what tests ask for -------------------------------------------------------------------------------------------

    def credentials(self) -> Credentials:
        return Credentials(token=TOKEN)

    def config(self, **overrides: Any) -> GcpConfig:
        given: dict[str, Any] = {
            "project": PROJECT,
            "regions": list(ZONES),
            "machine_types": ["n2-standard-2", "n2-standard-8", "g2-standard-4", "a2-highgpu-1g"],
            "image": IMAGE,
            "service_account": f"holdfast-machine@{PROJECT}.iam.gserviceaccount.com",
            "api_endpoint": self.url,
            "poll_seconds": 0.1,
            "describe_seconds": 0.2,
        }
        return GcpConfig(**{**given, **overrides})

    def driver(self, **overrides: Any) -> GcpDriver:
        """A new one, as another process would make it."""
        return GcpDriver(self.config(**overrides), self.credentials())

    def instance(self, name: str) -> compute_v1.Instance:
        """As it was asked for and is now."""
        with self._lock:
            return next(one.message for one in self._instances.values() if one.message.name == name)

    def host_id(self, name: str) -> str:
        """What the machine host calls the instance."""
        with self._lock:
            return next(one.host_id for one in self._instances.values() if one.message.name == name)

    @property
    def names(self) -> list[str]:
        """Instances that exist, stopped ones too."""
        with self._lock:
            return sorted(name for _, name in self._instances)

    @property
    def templates(self) -> list[str]:
        return sorted(self._templates)

    @property
    def groups(self) -> list[str]:
        return sorted(self._groups)

    def make_endpoint_groups(self, name: str, *zones: str) -> None:
        """Behind a backend service whose health checks all succeed while the instance runs."""
        self._endpoints |= {(zone, name): {} for zone in zones}

    def endpoints(self, name: str) -> list[str]:
        """Instances in the network endpoint groups of this name."""
        with self._lock:
            return sorted(one for (_, group), found in self._endpoints.items() if group == name for one in found)

    def fail_host(self, name: str) -> None:
        """The machine below the instance dies at once, with everything on it."""
        host = files.read_json(self.host.folder / self.host_id(name) / files.RUNNING)
        assert host
        os.kill(host["pid"], signal.SIGKILL)

    def age(self, name: str, seconds: float) -> None:
        """As if the instance had been made so much earlier."""
        with self._lock:
            next(one for one in self._instances.values() if one.message.name == name).made_at -= seconds

    def forget_requests(self) -> None:
        """Repeated request ids are new ones from now on, as after some time with the real one."""
        with self._lock:
            self._answers.clear()

    # -- time passes --------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._closed.wait(0.02 + 0.002 * len(self._instances)):
            with self._lock:
                for key, instance in list(self._instances.items()):
                    self._follow_instance(key, instance)
                for group in list(self._groups.values()):
                    self._follow_group(group)

    def _follow_instance(self, key: tuple[str, str], instance: Instance) -> None:
        message, now = instance.message, time.monotonic()
        if instance.vanishes_at is not None:
            if now >= instance.vanishes_at:
                del self._instances[key]
                if instance.deletion:
                    self._finish(instance.deletion)
            return
        if instance.ended:
            if instance.deletion:
                instance.vanishes_at = now + VANISH_SECONDS
            return
        life = self.host.life(instance.host_id)
        limit = message.scheduling.max_run_duration.seconds
        if limit and now - instance.made_at > limit and not instance.deletion and not instance.timed_out:
            instance.timed_out = True
            self.host.terminate(instance.host_id)
        if life.state != "terminated":
            asked = instance.deletion is not None or life.state == "stopping"
            message.status = "STOPPING" if asked else {"pending": "STAGING", "running": "RUNNING"}[life.state]
            return
        assert life.ended_at
        instance.ended = True
        message.last_stop_timestamp = _rfc3339(life.ended_at)
        message.status = "STOPPING"
        events = {
            "preempted": ("compute.instances.preempted", "Instance was preempted."),
            "ended-itself": ("compute.instances.guestTerminate", "Instance terminated by guest OS shutdown."),
            "host-failed": ("compute.instances.hostError", "Instance terminated due to a host error."),
        }
        if instance.timed_out:
            events["terminated-by-user"] = ("compute.instances.terminateOnSchedule", "Instance reached its run limit.")
        if life.reason in events and not (instance.deletion and life.reason != "preempted"):
            kind, words = events[life.reason]
            self._event(kind, words, instance, life.ended_at)
        if instance.deletion:
            instance.deletion.end_time = _rfc3339(life.ended_at)
        takes = life.reason == "preempted" or instance.timed_out
        if instance.deletion or (takes and message.scheduling.instance_termination_action == "DELETE"):
            instance.vanishes_at = now + VANISH_SECONDS
        else:
            message.status = "TERMINATED"

    def _follow_group(self, group: Group) -> None:
        if group.deletion:
            if not any((zone, name) in self._instances for name, zone in group.members.items()):
                del self._groups[group.message.name]
                self._finish(group.deletion)
            return
        if time.monotonic() < group.try_again_at:
            return
        while len(group.members) < group.message.target_size:
            name = f"{group.message.base_instance_name}-{secrets.token_hex(2)}"
            group.members[name] = group.zones[len(group.members) % len(group.zones)]
        template = self._templates[group.message.instance_template.rpartition("/")[2]]
        for name, zone in group.members.items():
            present = self._instances.get((zone, name))
            if present:
                if present.message.status == "TERMINATED" and not present.deletion:  # it is made anew, under its name
                    self._begin_deletion(present, user="system")
                continue
            model = "spot" if template.properties.scheduling.provisioning_model == "SPOT" else "on-demand"
            fate = self.host.next_fate(model)
            if fate.refuse:
                group.errors[name] = (self.stockout_code, _stockout(zone))
                group.try_again_at = time.monotonic() + 1.0
                return
            group.errors.pop(name, None)
            self._make(_from_properties(template.properties, name, zone), zone, fate, group=group.message.name)

    # -- operations ---------------------------------------------------------------------------------------------------

    def _operation(
        self,
        kind: str,
        scope: str,
        target: str,
        target_id: int = 0,
        user: str = "tester@example.com",
        done: bool | None = None,
    ) -> compute_v1.Operation:
        """`done`: None: after a moment; False: when `_finish` is told."""
        now = _rfc3339(datetime.now(UTC))
        base = f"{self.endpoint}/compute/v1/projects/{PROJECT}"
        operation = compute_v1.Operation(
            name=f"operation-{secrets.token_hex(8)}",
            id=_number(),
            kind="compute#operation",
            operation_type=kind,
            target_link=f"{base}/{target}",
            target_id=target_id or _number(),
            user=user,
            insert_time=now,
            start_time=now,
            status="DONE" if done else "RUNNING",
        )
        if done:
            operation.end_time = now
        place, _, _ = scope.partition("/")
        if place == "zones":
            operation.zone = f"{base}/{scope}"
        elif place == "regions":
            operation.region = f"{base}/{scope}"
        operation.self_link = f"{base}/{scope}/operations/{operation.name}"
        self.operations[operation.name] = operation
        if done is None:
            self._due[operation.name] = time.monotonic() + self.operation_seconds
        return operation

    def _finish(self, operation: compute_v1.Operation) -> None:
        operation.status, operation.progress = "DONE", 100
        operation.end_time = operation.end_time or _rfc3339(datetime.now(UTC))

    def _fail(self, operation: compute_v1.Operation, status: int, code: str, message: str) -> None:
        error = compute_v1.Errors(code=code, message=message)
        if code == "QUOTA_EXCEEDED" and (
            found := re.search(r"Quota '(\w+)' exceeded\.  Limit: ([\d.]+) in region (\S+)\.", message)
        ):
            metric, limit, region = found.groups()
            error.error_details = [
                compute_v1.ErrorDetails(
                    quota_info=compute_v1.QuotaExceededInfo(
                        metric_name=f"compute.googleapis.com/{metric.lower()}",
                        limit_name=metric,
                        limit=float(limit),
                        dimensions={"region": region},
                    )
                )
            ]
        operation.error = compute_v1.Error(errors=[error])
        operation.http_error_status_code, operation.http_error_message = status, message

    def _event(self, kind: str, words: str, instance: Instance, at: datetime) -> None:
        link = f"zones/{instance.zone}/instances/{instance.message.name}"
        event = self._operation(kind, f"zones/{instance.zone}", link, instance.message.id, user="system", done=True)
        del self.operations[event.name]
        event.name = f"systemevent-{secrets.token_hex(8)}"
        event.insert_time = event.start_time = event.end_time = _rfc3339(at)
        event.status_message = words
        self.operations[event.name] = event

    def _settle(self) -> None:
        """Operations whose time has come."""
        for name, due in list(self._due.items()):
            if time.monotonic() >= due:
                del self._due[name]
                self._finish(self.operations[name])

    # -- the API ------------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, token: str, body: bytes) -> dict[str, Any]:
        url = urlsplit(path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        where = unquote(url.path)
        action, segments, project = _action(method, where)
        with self._lock:
            self.calls[action] += 1
            self.tokens_seen.add(token)
            if self.expired or token != TOKEN:
                raise Refused(401, "authError", "Request had invalid authentication credentials.")
            for needed in self.denied & set(PERMISSIONS.get(action, ())):
                raise Refused(
                    403, "forbidden", f"Required '{needed}' permission for 'projects/{PROJECT}/{'/'.join(segments)}'"
                )
            if method == "POST" and body:
                self.bodies.append((action, json.loads(body)))
            self._settle()
            if project not in (PROJECT, "") and not action.startswith("images."):
                raise Refused(404, "notFound", f"The resource 'projects/{project}' was not found")
            repeated = query.get("requestId", "")
            key = f"{method} {where} {repeated}"
            if repeated and key in self._answers:
                found = self._answers[key]
                if isinstance(found, Refused):
                    raise found
                return _json(found)
            handle = getattr(self, "_do_" + action.replace(".", "_"), None)
            if handle is None or action not in PERMISSIONS:
                self.faults.append(f"{action} is not served ({method} {where})")
                raise Refused(501, "notImplemented", self.faults[-1])
            try:
                answered = handle(segments, query, body)
            except Refused as refused:
                # Remembered where the market refused: an unanswered caller asks again and must not draw a new fate.
                if repeated and refused.status == 503:
                    self._answers[key] = refused
                raise
            if repeated and isinstance(answered, compute_v1.Operation):
                self._answers[key] = answered
            return _json(answered) if isinstance(answered, compute_v1.Operation) else answered

    # Instances

    def _do_instances_insert(self, segments: list[str], query: Mapping[str, str], body: bytes) -> compute_v1.Operation:
        zone = self._zone(segments[1])
        asked = _parse(compute_v1.Instance, body)
        self._check(asked, zone)
        if (zone, asked.name) in self._instances:
            raise Refused(
                409,
                "alreadyExists",
                f"The resource 'projects/{PROJECT}/zones/{zone}/instances/{asked.name}' already exists",
            )
        link = f"zones/{zone}/instances/{asked.name}"
        operation = self._operation("insert", f"zones/{zone}", link)
        if self.failing_operations:
            self._fail(
                operation,
                500,
                self.failing_operations.pop(0),
                "Internal error. Please try again or contact Google Support.",
            )
            return operation
        try:
            self._check_quota(asked, zone)
            fate = self.host.next_fate("spot" if asked.scheduling.provisioning_model == "SPOT" else "on-demand")
            if fate.refuse:
                raise Refused(503, self.stockout_code, _stockout(zone))
        except Refused as refused:
            if self.refusal_form == "http":
                del self.operations[operation.name], self._due[operation.name]
                raise
            code = "QUOTA_EXCEEDED" if refused.reason == "quotaExceeded" else refused.reason
            self._fail(operation, refused.status, code, refused.message)
            return operation
        made = self._make(asked, zone, fate)
        operation.target_id = made.message.id
        return operation

    def _make(self, asked: compute_v1.Instance, zone: str, fate: Fate, group: str = "") -> Instance:
        kind = asked.machine_type.rpartition("/")[2]
        asked.id, asked.status = _number(), "PROVISIONING"
        asked.creation_timestamp = _rfc3339(datetime.now(UTC))
        asked.zone = f"{self.endpoint}/compute/v1/projects/{PROJECT}/zones/{zone}"
        asked.machine_type = f"{asked.zone}/machineTypes/{kind}"
        asked.self_link = f"{asked.zone}/instances/{asked.name}"
        items = {item.key: item.value for item in asked.metadata.items}
        if group:
            manager = f"projects/1/regions/{zone.rpartition('-')[0]}/instanceGroupManagers/{group}"
            asked.metadata.items.append(compute_v1.Items(key="created-by", value=manager))
        instance = Instance(asked, zone, f"gce-{secrets.token_hex(8)}", MACHINE_TYPES[kind][0], time.monotonic(), group)
        self._instances[zone, asked.name] = instance
        self._logged[str(asked.id)] = instance.host_id if items.get("serial-port-logging-enable") == "TRUE" else ""
        self.host.start(
            instance.host_id,
            region=zone.rpartition("-")[0],
            zone=zone,
            instance_type=kind,
            provisioning_model="spot" if instance.spot else "on-demand",
            startup_script=items.get("startup-script", ""),
            shutdown_script=items.get("shutdown-script", ""),
            fate=fate,
            name=asked.name,
            number=str(asked.id),
            attributes={item.key: item.value for item in asked.metadata.items if item.key == "created-by"},
        )
        return instance

    def _check(self, asked: compute_v1.Instance, zone: str) -> None:
        """What the real API refuses at once."""
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", asked.name):
            raise _invalid(
                "resource.name", asked.name, "Must be a match of regex '(?:[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?)'"
            )
        match = re.fullmatch(rf"zones/{zone}/machineTypes/(\S+)", asked.machine_type)
        if not match or match[1] not in MACHINE_TYPES:
            raise _invalid("resource.machineType", asked.machine_type, "The referenced resource does not exist.")
        for name, value in asked.labels.items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", name) or not re.fullmatch(r"[a-z0-9_-]{0,63}", value):
                raise _invalid("resource.labels", f"{name}={value}", "Label keys and values must match their patterns.")
        for item in asked.metadata.items:
            if len(item.value.encode()) > 256 * 1024:
                raise _invalid("resource.metadata.items", item.key, "Metadata value must not exceed 262144 bytes.")
        (disk,) = asked.disks
        image = disk.initialize_params.source_image
        if image not in (IMAGE, "projects/own/global/images/mine"):
            raise _invalid(
                "resource.disks[0].initializeParams.sourceImage",
                image,
                "The referenced image resource cannot be found.",
            )
        if disk.initialize_params.disk_type and not disk.initialize_params.disk_type.startswith(
            f"zones/{zone}/diskTypes/"
        ):
            raise _invalid(
                "resource.disks[0].initializeParams.diskType", disk.initialize_params.disk_type, "Malformed URL."
            )
        if disk.initialize_params.disk_size_gb < 50:
            raise _invalid(
                "resource.disks[0].diskSizeGb",
                str(disk.initialize_params.disk_size_gb),
                "Requested disk size cannot be smaller than the image size (50 GB)",
            )
        for interface in asked.network_interfaces:
            if interface.network not in ("global/networks/default", "projects/shared/global/networks/wide"):
                raise _invalid(
                    "resource.networkInterfaces[0].network",
                    interface.network,
                    "The referenced network resource cannot be found.",
                )
        for accelerator in asked.guest_accelerators:
            if accelerator.accelerator_type.rpartition("/")[2] not in ACCELERATORS:
                raise _invalid(
                    "resource.guestAccelerators[0].acceleratorType",
                    accelerator.accelerator_type,
                    "The referenced resource does not exist.",
                )
        scheduling = asked.scheduling
        gpus = bool(asked.guest_accelerators) or bool(MACHINE_TYPES[match[1]][2])
        if scheduling.provisioning_model == "SPOT" and scheduling.automatic_restart:
            raise Refused(
                400, "invalid", "Scheduling must have automaticRestart = false when provisioningModel is SPOT."
            )
        if (scheduling.provisioning_model == "SPOT" or gpus) and scheduling.on_host_maintenance != "TERMINATE":
            raise Refused(
                400, "invalid", "Instances with guest accelerators or of model SPOT do not support live migration."
            )
        if "max_run_duration" in scheduling:
            if not 30 <= scheduling.max_run_duration.seconds <= 10_368_000:
                raise _invalid(
                    "resource.scheduling.maxRunDuration",
                    str(scheduling.max_run_duration.seconds),
                    "Must be between 30 seconds and 120 days.",
                )
            if not scheduling.instance_termination_action:
                raise Refused(400, "invalid", "instanceTerminationAction must be set with maxRunDuration.")

    def _check_quota(self, asked: compute_v1.Instance, zone: str) -> None:
        region = zone.rpartition("-")[0]
        spot = asked.scheduling.provisioning_model == "SPOT"
        metric = "PREEMPTIBLE_CPUS" if spot else "CPUS"
        limit = self.limits.get((region, metric), 1000.0)
        if self._used(region, spot) + MACHINE_TYPES[asked.machine_type.rpartition("/")[2]][0] > limit:
            raise Refused(403, "quotaExceeded", f"Quota '{metric}' exceeded.  Limit: {limit} in region {region}.")

    def _used(self, region: str, spot: bool) -> float:
        return sum(
            one.vcpus
            for one in self._instances.values()
            if one.zone.startswith(f"{region}-") and one.spot == spot and not one.ended
        )

    def _do_instances_get(self, segments: list[str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        return _json(self._instance(segments).message)

    def _do_instances_delete(self, segments: list[str], query: Mapping[str, str], body: bytes) -> compute_v1.Operation:
        instance = self._instance(segments, hidden=True)
        if instance.message.deletion_protection:
            raise Refused(
                400,
                "invalidResourceUsage",
                "Invalid resource usage: 'Resource cannot be deleted if it's protected against deletion.'.",
            )
        return instance.deletion or self._begin_deletion(instance)

    def _begin_deletion(self, instance: Instance, user: str = "tester@example.com") -> compute_v1.Operation:
        link = f"zones/{instance.zone}/instances/{instance.message.name}"
        operation = self._operation("delete", f"zones/{instance.zone}", link, instance.message.id, user, done=False)
        instance.deletion, instance.message.status = operation, "STOPPING"
        self.host.terminate(instance.host_id)
        return operation

    def _do_instances_setDeletionProtection(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> compute_v1.Operation:
        instance = self._instance(segments)
        instance.message.deletion_protection = query["deletionProtection"] == "true"
        return self._operation("setDeletionProtection", f"zones/{instance.zone}", "/".join(segments[:4]))

    def _do_instances_getSerialPortOutput(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        instance = self._instance(segments)
        if instance.message.status == "TERMINATED":
            raise Refused(400, "resourceNotReady", f"The resource '{'/'.join(segments[:4])}' is not ready")
        output = _as_serial_port(self.host.console(instance.host_id), instance.message.name)
        start = int(query.get("start", 0))
        contents = output.encode()[start:].decode(errors="replace")
        return {
            "kind": "compute#serialPortOutput",
            "contents": contents,
            "start": str(max(start, 0)),
            "next": str(len(output)),
        }

    def _do_instances_aggregatedList(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        shown = [
            (f"zones/{one.zone}", one.message)
            for one in self._instances.values()
            if self._is_visible(one) and one.zone not in self.unreachable
        ]
        answer = self._aggregated("instances", shown, query)
        for zone in self.unreachable:
            warning = {"code": "UNREACHABLE", "message": f"{zone} is not reachable"}
            answer["items"][f"zones/{zone}"] = {"warning": warning}
        return answer

    def _do_instances_bulkInsert(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> compute_v1.Operation:
        region = segments[1]
        asked = _parse(compute_v1.BulkInsertInstanceResource, body)
        zones = [
            zone for zone in ZONES[region] if asked.location_policy.locations[f"zones/{zone}"].preference != "DENY"
        ]
        members = list(asked.per_instance_properties)
        assert len(members) == asked.count, "one name for each"
        operation = self._operation("bulkInsert", f"regions/{region}", f"regions/{region}/instances", done=None)
        made: list[Instance] = []
        refusals = []
        for number, name in enumerate(members):
            zone = zones[number % len(zones)]
            one = _from_properties(asked.instance_properties, name, zone)
            self._check(one, zone)
            try:
                self._check_quota(one, zone)
            except Refused as refused:
                for instance in made:
                    self._begin_deletion(instance)
                self._fail(operation, 403, "QUOTA_EXCEEDED", refused.message)
                return operation
            fate = self.host.next_fate("spot" if one.scheduling.provisioning_model == "SPOT" else "on-demand")
            if fate.refuse:
                refusals.append(zone)
                continue
            made.append(self._make(one, zone, fate))
            self._operation(
                "insert", f"zones/{zone}", f"zones/{zone}/instances/{name}", made[-1].message.id
            ).operation_group_id = operation.name
        if len(made) < (asked.min_count or asked.count):
            for instance in made:
                self._begin_deletion(instance)
            self._fail(
                operation,
                503,
                "VM_MIN_COUNT_NOT_REACHED",
                f"Requested minimum count of {asked.min_count or asked.count} VMs could not be created: {_stockout(refusals[0])}",
            )
        for zone in zones:
            count = sum(instance.zone == zone for instance in made)
            operation.instances_bulk_insert_operation_metadata.per_location_status[f"zones/{zone}"] = (
                compute_v1.BulkInsertOperationStatus(status="DONE", created_vm_count=count, target_vm_count=count)
            )
        return operation

    # Network endpoint groups

    def _do_networkEndpointGroups_aggregatedList(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        found = []
        for zone, name in self._endpoints:
            group = compute_v1.NetworkEndpointGroup(name=name, network_endpoint_type="GCE_VM_IP_PORT")
            found.append((f"zones/{zone}", group))
        return self._aggregated("networkEndpointGroups", found, query)

    def _do_networkEndpointGroups_attachNetworkEndpoints(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> compute_v1.Operation:
        asked = _parse(compute_v1.NetworkEndpointGroupsAttachEndpointsRequest, body)
        group = self._endpoint_group(segments)
        for one in asked.network_endpoints:
            self._instance(["zones", segments[1], "instances", one.instance])
            if one.instance in group:
                raise Refused(409, "alreadyExists", f"The endpoint of {one.instance} already exists")
            group[one.instance] = one
        return self._operation("attachNetworkEndpoints", f"zones/{segments[1]}", "/".join(segments[:4]))

    def _do_networkEndpointGroups_detachNetworkEndpoints(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> compute_v1.Operation:
        asked = _parse(compute_v1.NetworkEndpointGroupsDetachEndpointsRequest, body)
        group = self._endpoint_group(segments)
        for one in asked.network_endpoints:
            if group.pop(one.instance, None) is None:
                raise Refused(404, "notFound", f"The endpoint of {one.instance} was not found")
        return self._operation("detachNetworkEndpoints", f"zones/{segments[1]}", "/".join(segments[:4]))

    def _do_networkEndpointGroups_listNetworkEndpoints(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        asked = _parse(compute_v1.NetworkEndpointGroupsListEndpointsRequest, body)
        shown = []
        for name, endpoint in self._endpoint_group(segments).items():
            one = compute_v1.NetworkEndpointWithHealthStatus(network_endpoint=endpoint)
            if asked.health_status == "SHOW":
                runs = self._instances[segments[1], name].message.status == "RUNNING"
                state = "HEALTHY" if runs else "UNHEALTHY"
                one.healths = [compute_v1.HealthStatusForNetworkEndpoint(health_state=state)]
            shown.append(one)
        return self._listed("items", shown, query)

    def _endpoint_group(self, segments: list[str]) -> dict[str, compute_v1.NetworkEndpoint]:
        zone, name = self._zone(segments[1]), segments[3]
        if (zone, name) not in self._endpoints:
            raise Refused(404, "notFound", f"The resource '{'/'.join(segments[:4])}' was not found")
        group = self._endpoints[zone, name]
        for instance in [one for one in group if (zone, one) not in self._instances]:  # deleted with their endpoints
            del group[instance]
        return group

    def _instance(self, segments: list[str], hidden: bool = False) -> Instance:
        zone, name = self._zone(segments[1]), segments[3]
        instance = self._instances.get((zone, name))
        if instance is None or not (hidden or self._is_visible(instance)):
            raise Refused(
                404, "notFound", f"The resource 'projects/{PROJECT}/zones/{zone}/instances/{name}' was not found"
            )
        return instance

    def _is_visible(self, instance: Instance) -> bool:
        return time.monotonic() >= instance.made_at + self.invisible_seconds

    def _zone(self, zone: str) -> str:
        if not any(zone in zones for zones in ZONES.values()):
            raise _invalid("zone", zone, "Unknown zone.")
        return zone

    # Operations

    def _operation_of(self, segments: list[str], query: Mapping[str, str], body: bytes) -> compute_v1.Operation:
        operation = self.operations.get(segments[-1])
        if operation is None:
            raise Refused(404, "notFound", f"The resource '{'/'.join(segments)}' was not found")
        return operation

    _do_zoneOperations_get = _do_regionOperations_get = _do_globalOperations_get = _operation_of

    def _do_operations_aggregatedList(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        found = []
        for operation in self.operations.values():
            scope = re.sub(r"^.*/projects/[^/]+/", "", operation.zone or operation.region) or "global"
            found.append((scope, operation))
        return self._aggregated("operations", found, query)

    # Templates and groups

    def _do_instanceTemplates_insert(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> compute_v1.Operation:
        template = _parse(compute_v1.InstanceTemplate, body)
        if template.name in self._templates:
            raise Refused(409, "alreadyExists", f"The resource 'instanceTemplates/{template.name}' already exists")
        if "/" in template.properties.machine_type:
            raise _invalid("resource.properties.machineType", template.properties.machine_type, "Must be a bare name.")
        zone = "us-central1-a"
        self._check(_from_properties(template.properties, "probe", zone), zone)
        self._templates[template.name] = template
        return self._operation("insert", "global", f"global/instanceTemplates/{template.name}")

    def _do_instanceTemplates_list(self, segments: list[str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        return self._listed("items", self._templates.values(), query)

    def _do_instanceTemplates_delete(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> compute_v1.Operation:
        name = segments[-1]
        if name not in self._templates:
            raise Refused(404, "notFound", f"The resource 'instanceTemplates/{name}' was not found")
        if any(group.message.instance_template.endswith(f"/{name}") for group in self._groups.values()):
            raise Refused(
                400, "resourceInUseByAnotherResource", f"The instance_template resource '{name}' is already being used"
            )
        del self._templates[name]
        return self._operation("delete", "global", f"global/instanceTemplates/{name}")

    def _do_instanceGroupManagers_insert(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> compute_v1.Operation:
        region = segments[1]
        asked = _parse(compute_v1.InstanceGroupManager, body)
        if asked.name in self._groups:
            raise Refused(409, "alreadyExists", f"The resource 'instanceGroupManagers/{asked.name}' already exists")
        if asked.instance_template.rpartition("/")[2] not in self._templates:
            raise Refused(404, "notFound", f"The resource '{asked.instance_template}' was not found")
        if not re.fullmatch(r"[a-z][-a-z0-9]{0,57}", asked.base_instance_name):
            raise _invalid("resource.baseInstanceName", asked.base_instance_name, "Must be at most 58 characters.")
        zones = [one.zone.rpartition("/")[2] for one in asked.distribution_policy.zones] or list(ZONES[region])
        self._groups[asked.name] = Group(asked, region, zones)
        return self._operation("insert", f"regions/{region}", f"regions/{region}/instanceGroupManagers/{asked.name}")

    def _do_instanceGroupManagers_aggregatedList(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        found = [(f"regions/{group.region}", group.message) for group in self._groups.values()]
        return self._aggregated("instanceGroupManagers", found, query)

    def _do_instanceGroupManagers_listManagedInstances(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        group = self._group(segments)
        members = []
        for name, zone in group.members.items():
            member: dict[str, Any] = {"name": name, "instance": f"{self.endpoint}/zones/{zone}/instances/{name}"}
            if name in group.errors:
                code, message = group.errors[name]
                member["lastAttempt"] = {"errors": {"errors": [{"code": code, "message": message}]}}
            member["currentAction"] = "NONE" if (zone, name) in self._instances else "CREATING"
            members.append(member)
        return {"managedInstances": members}

    def _do_instanceGroupManagers_delete(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> compute_v1.Operation:
        group = self._group(segments)
        if group.deletion is None:
            link = f"regions/{group.region}/instanceGroupManagers/{group.message.name}"
            group.deletion = self._operation("delete", f"regions/{group.region}", link, done=False)
            for name, zone in group.members.items():
                if (instance := self._instances.get((zone, name))) and not instance.deletion:
                    self._begin_deletion(instance)
        return group.deletion

    def _group(self, segments: list[str]) -> Group:
        group = self._groups.get(segments[3])
        if group is None or group.region != segments[1]:
            raise Refused(404, "notFound", f"The resource '{'/'.join(segments)}' was not found")
        return group

    # What there is

    def _do_regions_get(self, segments: list[str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        region = segments[1]
        if region not in ZONES:
            raise Refused(404, "notFound", f"The resource 'projects/{PROJECT}/regions/{region}' was not found")
        base = f"{self.endpoint}/compute/v1/projects/{PROJECT}/zones"
        quotas = [
            {"metric": metric, "limit": self.limits.get((region, metric), 1000.0), "usage": self._used(region, spot)}
            for metric, spot in (("CPUS", False), ("PREEMPTIBLE_CPUS", True))
        ]
        quotas.append({"metric": "PREEMPTIBLE_NVIDIA_L4_GPUS", "limit": 4.0, "usage": 0.0})
        return {"name": region, "zones": [f"{base}/{zone}" for zone in ZONES[region]], "quotas": quotas, "status": "UP"}

    def _do_advice_capacity(self, segments: list[str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        asked = _parse(compute_v1.CapacityAdviceRequest, body)
        assert asked.instance_properties.scheduling.provisioning_model == "SPOT"
        (one,) = asked.distribution_policy.zones
        zone = one.zone.rpartition("/")[2]
        (selection,) = asked.instance_flexibility_policy.instance_selections.values()
        (machine_type,) = selection.machine_types
        if not self.advice:
            raise Refused(403, "forbidden", "Capacity advice is not available for this project.")
        if zone not in ZONES[segments[1]] or (machine_type, zone) not in self.advice:
            return {"recommendations": []}
        obtainability, uptime = self.advice[machine_type, zone]
        scores = {"obtainability": obtainability, "estimatedUptime": uptime}
        shard = {"zone": one.zone, "machineType": machine_type, "instanceCount": 1, "provisioningModel": "SPOT"}
        return {"recommendations": [{"scores": scores, "shards": [shard]}]}

    def _do_machineTypes_aggregatedList(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        found = []
        for zones in ZONES.values():
            for zone in zones:
                for name, (cpus, mib, accelerator, count) in MACHINE_TYPES.items():
                    kind = compute_v1.MachineType(name=name, guest_cpus=cpus, memory_mb=mib, zone=zone)
                    if accelerator:
                        kind.accelerators = [
                            compute_v1.Accelerators(guest_accelerator_type=accelerator, guest_accelerator_count=count)
                        ]
                    found.append((f"zones/{zone}", kind))
        return self._aggregated("machineTypes", found, query)

    def _do_images_getFromFamily(self, segments: list[str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        if segments[-1] != IMAGE.rpartition("/")[2]:
            raise Refused(404, "notFound", f"The resource 'images/family/{segments[-1]}' was not found")
        return {"name": f"{segments[-1]}-v20261101", "diskSizeGb": "50", "status": "READY"}

    def _do_images_get(self, segments: list[str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        if segments[-1] != "mine":
            raise Refused(404, "notFound", f"The resource 'images/{segments[-1]}' was not found")
        return {"name": "mine", "diskSizeGb": "50", "status": "READY"}

    def _do_networks_get(self, segments: list[str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        if segments[-1] != "default":
            raise Refused(404, "notFound", f"The resource 'networks/{segments[-1]}' was not found")
        return {"name": "default"}

    # Neighbours of Compute Engine

    def _do_cloudbilling_skus_list(self, segments: list[str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        if not self.billing_answers:
            raise Refused(
                403, "accessNotConfigured", "Cloud Billing API has not been used in project 0 before or it is disabled."
            )
        start = int(query.get("pageToken", 0))
        skus = list(_skus())
        page = skus[start : start + 20]
        return {"skus": page, "nextPageToken": str(start + 20) if start + 20 < len(skus) else ""}

    def _do_logging_entries_list(self, segments: list[str], query: Mapping[str, str], body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        found = re.search(r'resource\.labels\.instance_id="(\d+)"', asked["filter"])
        assert found and asked["orderBy"] == "timestamp desc" and "serial_port_1_output" in asked["filter"], asked
        host_id = self._logged.get(found[1])
        console = _as_serial_port(self.host.console(host_id), "logged") if host_id else ""
        lines = list(reversed(console.splitlines()))
        start, size = int(asked.get("pageToken", 0)), min(asked["pageSize"], self.page_size)
        answer: dict[str, Any] = {"entries": [{"textPayload": line} for line in lines[start : start + size]]}
        if start + size < len(lines):
            answer["nextPageToken"] = str(start + size)
        return answer

    def _do_projects_testIamPermissions(
        self, segments: list[str], query: Mapping[str, str], body: bytes
    ) -> dict[str, Any]:
        return {"permissions": [name for name in json.loads(body)["permissions"] if name not in self.denied]}

    # -- lists --------------------------------------------------------------------------------------------------------

    def _page(self, items: Sequence[Any], query: Mapping[str, str]) -> tuple[Sequence[Any], str]:
        start, size = int(query.get("pageToken", 0)), min(int(query.get("maxResults", 500)), self.page_size)
        return items[start : start + size], str(start + size) if start + size < len(items) else ""

    def _listed(self, name: str, messages: Any, query: Mapping[str, str]) -> dict[str, Any]:
        wanted = _filter(query.get("filter", ""))
        page, token = self._page([one for one in map(_json, messages) if wanted(one)], query)
        return {name: list(page), **({"nextPageToken": token} if token else {})}

    def _aggregated(self, name: str, scoped: Sequence[tuple[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
        wanted = _filter(query.get("filter", ""))
        found = [(scope, one) for scope, one in ((scope, _json(message)) for scope, message in scoped) if wanted(one)]
        page, token = self._page(found, query)
        empty = {"warning": {"code": "NO_RESULTS_ON_PAGE", "message": "There are no results for scope on this page."}}
        items: dict[str, Any] = {f"zones/{zone}": empty for zones in ZONES.values() for zone in zones}
        for scope, one in page:
            items.setdefault(scope, empty)
            if "warning" in items[scope]:
                items[scope] = {name: []}
            items[scope][name].append(one)
        return {"items": items, **({"nextPageToken": token} if token else {})}


# -- the wire ---------------------------------------------------------------------------------------------------------


def _action(method: str, path: str) -> tuple[str, list[str], str]:
    """The method's name as Google gives it, the path's parts after the project, the project."""
    if compute := re.match(r"/compute/v1/projects/([^/]+)/(.+)", path):
        segments = compute[2].split("/")
        action = compute_action(method, segments)
        # The one method whose path does not say its name.
        return action.replace(".serialPort", ".getSerialPortOutput"), segments, compute[1]
    if re.fullmatch(r"/v1/services/[\w-]+/skus", path):
        return "cloudbilling.skus.list", [], ""
    if path == "/v2/entries:list":
        return "logging.entries.list", [], ""
    if found := re.fullmatch(r"/v1/projects/([^/:]+):testIamPermissions", path):
        return "projects.testIamPermissions", [], found[1]
    return f"{method} {path}", [], ""


def _filter(text: str) -> Callable[[dict[str, Any]], bool]:
    """`field OP value`, alone or in parentheses joined by OR; OP is =, != or eq (a regular expression)."""
    if not text:
        return lambda _: True
    terms = []
    for term in re.split(r"\s+OR\s+", text):
        found = re.fullmatch(r'\(?\s*([\w.-]+)\s*(=|!=|\beq\b|\bne\b)\s*"?([^"]*?)"?\s*\)?', term)
        if not found:
            raise _invalid("filter", text, "Invalid list filter expression.")
        terms.append(found.groups())

    def passes(one: dict[str, Any]) -> bool:
        for name, operator, value in terms:
            at: Any = one
            for part in name.split(".", 1):
                at = at.get(part, "") if isinstance(at, dict) else ""
            same = bool(re.fullmatch(value, str(at))) if operator in ("eq", "ne") else str(at) == value
            if same == (operator in ("=", "eq")):
                return True
        return False

    return passes


def _parse(kind: type[Any], body: bytes) -> Any:
    try:
        return kind.from_json(body, ignore_unknown_fields=False)
    except json_format.ParseError as error:
        raise Refused(400, "parseError", f"Invalid JSON payload received. {error}") from error


def _json(message: Any) -> dict[str, Any]:
    return json_format.MessageToDict(type(message).pb(message))


def _invalid(name: str, value: str, why: str) -> Refused:
    return Refused(400, "invalid", f"Invalid value for field '{name}': '{value}'. {why}")


def _stockout(zone: str) -> str:
    return (
        f"The zone 'projects/{PROJECT}/zones/{zone}' does not have enough resources available to fulfill the request.  "
        "Try a different zone, or try again later."
    )


def _from_properties(properties: compute_v1.InstanceProperties, name: str, zone: str) -> compute_v1.Instance:
    properties = compute_v1.InstanceProperties(properties)
    one = compute_v1.Instance(
        name=name,
        machine_type=f"zones/{zone}/machineTypes/{properties.machine_type}",
        labels=dict(properties.labels),
        metadata=properties.metadata,
        scheduling=properties.scheduling,
        disks=properties.disks,
        network_interfaces=properties.network_interfaces,
        guest_accelerators=properties.guest_accelerators,
        service_accounts=properties.service_accounts,
    )
    copied = compute_v1.Instance.from_json(compute_v1.Instance.to_json(one))
    for disk in copied.disks:
        if "/" in disk.initialize_params.disk_type:
            raise _invalid(
                "disks[0].initializeParams.diskType", disk.initialize_params.disk_type, "Must be a bare name."
            )
        disk.initialize_params.disk_type = f"zones/{zone}/diskTypes/{disk.initialize_params.disk_type}"
    return copied


def _as_serial_port(console: str, name: str) -> str:
    """As the image's agent prints what a start-up script says."""
    if not console:
        return ""
    kernel = "[    0.000000] Linux version 6.8.0-gcp\r\n"
    before = f"Nov 24 21:49:30 {name[:20]} google_metadata_script_runner[512]: startup-script: "
    return kernel + "".join(
        f"{before}{line.rstrip(chr(10))}\r\n" if line.endswith("\n") else before + line
        for line in console.splitlines(keepends=True)
    )


def _skus() -> Iterator[dict[str, Any]]:
    def sku(description: str, group: str, usage: str, region: str, usd: float) -> dict[str, Any]:
        rate = {"units": str(int(usd)), "nanos": round((usd - int(usd)) * 1e9), "currencyCode": "USD"}
        return {
            "skuId": secrets.token_hex(6).upper(),
            "description": description,
            "category": {"resourceFamily": "Compute", "resourceGroup": group, "usageType": usage},
            "serviceRegions": [region],
            "pricingInfo": [{"pricingExpression": {"usageUnit": "h", "tieredRates": [{"unitPrice": rate}]}}],
        }

    for place, region, factor in (("Iowa", "us-central1", 1.0), ("Netherlands", "europe-west4", 1.1)):
        for what, group, on_demand, spot in SKUS:
            yield sku(f"{what} running in {place}", group, "OnDemand", region, on_demand * factor)
            if group == "GPU":
                words = f"{what} attached to Spot Preemptible VMs running in {place}"
            else:
                words = f"Spot Preemptible {what} running in {place}"
            yield sku(words, group, "Preemptible", region, spot * factor)
            yield sku(f"Commitment v1: {what} in {place} for 1 Year", group, "Commit1Yr", region, on_demand * 0.63)


def _number() -> int:
    return secrets.randbelow(8 * 10**18) + 10**18


def _rfc3339(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away."""


def _handler_of(emulator: GceEmulator) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            try:
                status, answer = 200, emulator.answer(self.command, self.path, token, body)
            except Refused as refused:
                status = refused.status
                said = {"message": refused.message, "domain": "global", "reason": refused.reason}
                answer = {"error": {"code": status, "message": refused.message, "errors": [said]}}
            except Exception as error:  # the emulator's own fault: no test may take it for the cloud's
                emulator.faults.append(f"{self.command} {self.path}: {error!r}")
                status, answer = 400, {"error": {"code": 400, "message": emulator.faults[-1], "errors": []}}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json; charset=UTF-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = handle_any

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
