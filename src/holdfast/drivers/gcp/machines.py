"""All machines of the project in one description that every caller shares.

Compute Engine lists what exists. What was preempted or deleted is gone from the list at once, so its end comes from the
operations log; what powered itself off is stopped and stays, with a disk that costs money, until somebody deletes it:
whoever describes it does. An instance that was made a moment ago may be missing from the list; it is pending then.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from holdfast.clock import Clock
from holdfast.drivers.gcp import catalogue, names
from holdfast.drivers.gcp.api import PAGE, ComputeApi
from holdfast.drivers.gcp.config import region_of
from holdfast.drivers.gcp.console import read_serial_port
from holdfast.drivers.gcp.errors import is_gone, translated
from holdfast.drivers.gcp.operations_log import End, Life, latest, lives_of, parse_time, read_lives
from holdfast.drivers.protocol import CapacityPool, Machine, MachineState
from holdfast.errors import HoldfastError

if TYPE_CHECKING:
    from google.cloud import compute_v1

log = logging.getLogger(__name__)

CLOUD = "gcp"
UNSEEN_SECONDS = 120.0
"""How long an instance may be missing from the list before it is asked for by its name."""
UNEXPLAINED_SECONDS = 60.0
"""How long the operations log may take to say why an instance has stopped."""
HISTORY_SECONDS = 5.0
"""The log is not read again for a question it could not answer so recently."""
OTHERS_SECONDS = 300.0
"""How long a stopped machine is left to whoever launched it, who may still want its console."""
CLEAR_AGAIN_SECONDS = 60.0
TIDY_SECONDS = 5.0
"""What one description may spend on consoles, and on deletions: everybody waits for it. The next one goes on."""
KEPT_HOURS = 24.0

STATES: dict[str, MachineState] = {
    "PROVISIONING": "pending",
    "STAGING": "pending",
    "REPAIRING": "pending",
    "PENDING": "pending",
    "RUNNING": "running",
    "STOPPING": "stopping",
    "PENDING_STOP": "stopping",
    "SUSPENDING": "stopping",
    "DEPROVISIONING": "stopping",
}
"""https://cloud.google.com/compute/docs/instances/instance-lifecycle; what is not here is over."""


@dataclass(slots=True)
class Known:
    """A machine, and what this process remembers of it."""

    machine: Machine
    instance_id: str = ""
    seen_at: float = 0.0
    """`time.monotonic()` when the cloud last showed it, or when it was launched."""
    shown: bool = False
    """Did the newest list show it?"""
    status: str = ""
    stopped_at: datetime | None = None
    of_group: bool = False
    ours: bool = False
    """Launched or asked for by this process: its console matters here."""
    asked_to_end: bool = False
    deleted_at: float = -CLEAR_AGAIN_SECONDS
    """`time.monotonic()` of the last call that asked for its deletion."""
    console: str = ""
    from_log: bool = False
    """Known from the operations log alone: its tags are told by its name's digests."""

    @property
    def over(self) -> bool:
        return self.machine.state == "terminated"


class Machines:
    """Thread-safe. One thread asks the cloud, the others wait for what it brings."""

    def __init__(self, api: ComputeApi, clock: Clock) -> None:
        self._api = api
        self._clock = clock
        self._known: dict[str, Known] = {}
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._asked_at = -1.0
        self._log: dict[str, list[Life]] = {}
        self._log_read_at = -1.0
        self._runs_asked_for: set[str] = set()

    def with_tags(self, tags: Mapping[str, str], max_age_seconds: float) -> list[Machine]:
        oldest = time.monotonic() - max_age_seconds
        with self._lock:
            if run := tags.get("holdfast-run"):
                self._runs_asked_for.add(run)
        with self._asking:
            if self._asked_at < 0 or self._asked_at < oldest:
                self._ask()
            found = self._matching(tags)
            if not found and tags and time.monotonic() - self._log_read_at > max(HISTORY_SECONDS, max_age_seconds):
                # It may have lived and died between two looks, with another process that is gone.
                self._read_log()
                self._add_from_log()
                found = self._matching(tags)
        return found

    def _matching(self, tags: Mapping[str, str]) -> list[Machine]:
        found = []
        with self._lock:
            for known in self._known.values():
                machine = known.machine
                if known.from_log:
                    parsed = names.parse_name(name_of(machine.id))
                    if parsed and parsed.matches(tags):
                        found.append(dataclasses.replace(machine, tags=dict(tags)))
                elif all(machine.tags.get(name) == value for name, value in tags.items()):
                    found.append(machine)
        return sorted(found, key=lambda machine: (machine.launched_at, machine.id))

    def known(self, machine_id: str) -> Known | None:
        with self._lock:
            return self._known.get(machine_id)

    def over(self, name: str, pool: CapacityPool, tags: Mapping[str, str]) -> Machine | None:
        """The machine of this name if it is known to have ended: it is not launched a second time."""
        with self._lock:
            known = self._known.get(name)
            if known is None or not known.over:
                return None
            if known.from_log:
                known.machine = dataclasses.replace(known.machine, pool=pool, tags=dict(tags))
                known.from_log = False
            return known.machine

    def asked_to_end(self, machine_id: str) -> None:
        with self._lock:
            if (known := self._known.get(machine_id)) and not known.over:
                known.asked_to_end, known.deleted_at = True, time.monotonic()
                known.machine = dataclasses.replace(known.machine, state="stopping")

    def launched(
        self,
        instance: compute_v1.Instance | None,
        name: str,
        pool: CapacityPool,
        tags: Mapping[str, str],
        instance_id: str,
        asked_at: datetime,
    ) -> Machine:
        """Remember a launch, also one that the cloud does not show yet."""
        with self._lock:
            if instance:
                return self._note(instance, ours=True).machine
            known = self._known.get(name)
            if known is None or (known.from_log and not known.over):
                machine = Machine(id=name, pool=pool, state="pending", tags=dict(tags), launched_at=asked_at)
                known = Known(machine, instance_id, seen_at=time.monotonic(), ours=True)
                self._known[name] = known
            return known.machine

    # -- asking the cloud ---------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        asked_at = time.monotonic()
        shown, unreachable = self._list()
        with self._lock:
            now_shown = {self._note(instance).machine.id for instance in shown}
            for machine_id, known in self._known.items():
                # Of a zone that could not be asked, nothing is new.
                known.shown = machine_id in now_shown or (known.shown and known.machine.pool.zone in unreachable)
            doubtful = [known for known in self._known.values() if not known.over and self._is_doubtful(known)]
        if doubtful or self._log_read_at < 0:
            self._read_log()
            self._add_from_log()
            for known in doubtful:
                if known.machine.pool.zone not in unreachable:
                    self._conclude(known)
        self._keep_consoles()
        self._delete_stopped()
        self._drop_old()
        self._asked_at = asked_at

    def _list(self) -> tuple[list[compute_v1.Instance], set[str]]:
        doing, permission = "listing the project's instances", "compute.instances.list"
        pager = self._api.call(
            self._api.instances.aggregated_list,
            doing,
            permission,
            project=self._api.project,
            filter=f"labels.{names.MACHINE_LABEL}=1",
            max_results=PAGE,
        )
        found, unreachable = [], set()
        for scope, scoped in self._api.pages(pager, doing, permission):
            found += scoped.instances
            if scoped.warning.code == "UNREACHABLE":
                unreachable.add(scope.rpartition("/")[2])
        return found, unreachable

    def _note(self, instance: compute_v1.Instance, ours: bool = False) -> Known:
        """Under the lock: what the cloud shows of an instance."""
        described = described_instance(instance)
        known = self._known.get(described.id)
        if known is None or known.from_log:
            known = Known(dataclasses.replace(described, state="pending"), of_group="." in described.id)
            self._known[described.id] = known
        known.instance_id, known.status, known.shown = str(instance.id), instance.status, True
        known.ours = known.ours or ours or described.tags.get("holdfast-run") in self._runs_asked_for
        known.seen_at = time.monotonic()
        if instance.last_stop_timestamp:
            known.stopped_at = parse_time(instance.last_stop_timestamp)
        elif instance.status not in STATES:
            known.stopped_at = known.stopped_at or self._clock.now()
        if not known.over:  # an end is final: what the cloud shows of a dead machine's disk changes nothing
            state = described.state
            # A deletion may fail after all: one that runs on is to be deleted again.
            asked = known.asked_to_end and time.monotonic() - known.deleted_at < CLEAR_AGAIN_SECONDS
            if state == "terminated" or (state in ("pending", "running") and asked):
                state = "stopping"
            known.machine = dataclasses.replace(described, state=state)
        return known

    def _is_doubtful(self, known: Known) -> bool:
        return not known.shown or known.status not in STATES

    def _read_log(self) -> None:
        read_at = time.monotonic()
        self._log = read_lives(self._api)
        self._log_read_at = read_at

    def _conclude(self, known: Known) -> None:
        """Decide what a machine that is not shown, or that is shown as stopped, really is."""
        machine = known.machine
        life = latest(self._log.get(name_of(machine.id)), known.instance_id)
        end = life.end if life else None
        if end is None and known.shown and known.stopped_at:
            if self._clock.now() - known.stopped_at > timedelta(seconds=UNEXPLAINED_SECONDS):
                end = End("ended-itself", known.stopped_at, "stopped; the operations log does not say why")
        elif end is None and not known.shown and time.monotonic() - known.seen_at > UNSEEN_SECONDS:
            if self._is_there(machine):
                known.seen_at = time.monotonic()
                return
            end = End(
                "host-failed",
                self._clock.now(),
                "the cloud does not show the machine any more, and its operations log does not say why",
            )
        if end is None:
            return
        with self._lock:
            known.machine = dataclasses.replace(
                machine,
                state="terminated",
                reason=end.reason,
                terminated_at=max(end.at, machine.launched_at),
                detail=end.detail,
            )
        log.info("machine=%s reason=%s terminated_at=%s", machine.id, end.reason, end.at)

    def _is_there(self, machine: Machine) -> bool:
        try:
            self._api.ask(
                self._api.instances.get,
                project=self._api.project,
                zone=machine.pool.zone,
                instance=name_of(machine.id),
            )
            return True
        except Exception as error:
            if is_gone(error):
                return False
            with translated(f"looking for {machine.id}", "compute.instances.get"):
                raise

    def _add_from_log(self) -> None:
        machine_types = dict.fromkeys([*self._api.config.machine_types, *catalogue.CURATED])
        with self._lock:
            for life in lives_of(self._log):
                parsed, end = names.parse_name(life.name), life.end
                if parsed is None or end is None:
                    continue
                machine_id = f"{life.name}.{life.instance_id}" if parsed.of_group else life.name
                if machine_id in self._known:
                    continue
                machine_type, model = parsed.kind(machine_types)
                began_at = life.began_at or end.at
                machine = Machine(
                    id=machine_id,
                    pool=CapacityPool(CLOUD, region_of(life.zone), life.zone, machine_type, model),
                    state="terminated",
                    launched_at=began_at,
                    terminated_at=max(end.at, began_at),
                    reason=end.reason,
                    detail=end.detail,
                )
                self._known[machine_id] = Known(machine, life.instance_id, from_log=True)

    # -- what an end leaves behind ------------------------------------------------------------------------------------

    def _chosen(self, which: Callable[[Known], bool]) -> list[Known]:
        with self._lock:
            return [known for known in self._known.values() if known.shown and which(known)]

    def _keep_consoles(self) -> None:
        """The serial port is gone with the instance: what it said is read while it is going."""
        give_up_at = time.monotonic() + TIDY_SECONDS
        for known in self._chosen(lambda known: known.ours and known.machine.state == "stopping"):
            if time.monotonic() > give_up_at:
                break
            pool = known.machine.pool
            try:
                if said := read_serial_port(self._api, name_of(known.machine.id), pool.zone):
                    known.console = said
            except HoldfastError as error:
                log.debug("console machine=%s %s", known.machine.id, error)

    def _delete_stopped(self) -> None:
        """A machine that powered itself off is only stopped, and its disk is billed: it is deleted by who sees that.

        By its own process at once; by others after a while, in case its own is still reading its console. Members of
        a managed group are the group's to replace.
        """
        now = self._clock.now()

        def may_go(known: Known) -> bool:
            if not known.over or known.of_group or known.status in STATES:
                return False
            if time.monotonic() - known.deleted_at < CLEAR_AGAIN_SECONDS:
                return False
            stopped_at = known.stopped_at or known.machine.terminated_at or now
            return known.ours or now - stopped_at > timedelta(seconds=OTHERS_SECONDS)

        give_up_at = time.monotonic() + TIDY_SECONDS
        for known in self._chosen(may_go):
            if time.monotonic() > give_up_at:
                break
            machine = known.machine
            try:
                self._api.ask(
                    self._api.instances.delete_unary,
                    project=self._api.project,
                    zone=machine.pool.zone,
                    instance=name_of(machine.id),
                )
                known.deleted_at = time.monotonic()
            except Exception as error:
                if not is_gone(error):  # the next description tries again
                    log.warning("stopped instance is not deleted machine=%s %s", machine.id, error)

    def _drop_old(self) -> None:
        oldest = self._clock.now() - timedelta(hours=KEPT_HOURS)
        with self._lock:
            for machine_id, known in list(self._known.items()):
                ended_at = known.machine.terminated_at
                if known.over and not known.shown and not known.from_log and ended_at and ended_at < oldest:
                    del self._known[machine_id]


def described_instance(instance: compute_v1.Instance) -> Machine:
    """As the cloud shows it. A stopped one is `terminated` here, without a reason: that is in the operations log."""
    zone = instance.zone.rpartition("/")[2]
    metadata = {item.key: item.value for item in instance.metadata.items}
    model = "spot" if instance.scheduling.provisioning_model == "SPOT" else "on-demand"
    parsed = names.parse_name(instance.name)
    return Machine(
        id=f"{instance.name}.{instance.id}" if parsed and parsed.of_group else instance.name,
        pool=CapacityPool(CLOUD, region_of(zone), zone, instance.machine_type.rpartition("/")[2], model),  # type: ignore[arg-type]
        state=STATES.get(instance.status, "terminated"),
        tags=names.tags_of(metadata, instance.labels),
        launched_at=parse_time(instance.creation_timestamp),
    )


def name_of(machine_id: str) -> str:
    """A managed group uses a name again for another instance; such machines' ids end in the instance's number."""
    return machine_id.partition(".")[0]
