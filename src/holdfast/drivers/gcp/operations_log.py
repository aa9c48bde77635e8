"""Why an instance is gone: Compute Engine's operations tell it for 14 days, whoever asks.

Source: https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption and
https://cloud.google.com/compute/docs/logging/audit-logging (system events).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from holdfast.drivers.gcp import names
from holdfast.drivers.gcp.api import PAGE, ComputeApi
from holdfast.drivers.protocol import TerminationReason

if TYPE_CHECKING:
    from google.cloud import compute_v1

# One field, so that a regular expression is allowed: https://cloud.google.com/compute/docs/reference/rest/v1/globalOperations/aggregatedList
OURS = f'targetLink eq ".*/instances/{names.PREFIX}-.*"'

REASONS: dict[str, TerminationReason] = {
    "compute.instances.preempted": "preempted",
    "compute.instances.hostError": "host-failed",
    "compute.instances.terminateOnHostMaintenance": "host-failed",
    "compute.instances.guestTerminate": "ended-itself",
    "delete": "terminated-by-user",
    "compute.instances.delete": "terminated-by-user",
    "stop": "terminated-by-user",
    "compute.instances.stop": "terminated-by-user",
    "suspend": "terminated-by-user",
}
WORDS: dict[TerminationReason, str] = {
    "preempted": "Instance was preempted.",
    "host-failed": "the machine's host failed or was taken down for maintenance",
    "ended-itself": "the machine powered itself off",
    "terminated-by-user": "deleted or stopped through the API",
}
INSERTS = ("insert", "compute.instances.insert", "bulkInsert", "compute.instances.bulkInsert")
SAME_END = timedelta(seconds=120)
"""A machine that hears its notice may power itself off before the preemption is logged."""


@dataclass(frozen=True, slots=True)
class Event:
    kind: str
    at: datetime
    """When it had happened."""
    asked_at: datetime
    user: str
    words: str


@dataclass(frozen=True, slots=True)
class End:
    reason: TerminationReason
    at: datetime
    detail: str


@dataclass(slots=True)
class Life:
    """One instance as the log knows it."""

    name: str
    zone: str
    instance_id: str
    events: list[Event] = field(default_factory=list)

    @property
    def began_at(self) -> datetime | None:
        return min((event.asked_at for event in self.events if event.kind in INSERTS), default=None)

    @property
    def end(self) -> End | None:
        """The first thing that ended it, and a preemption before its own reaction to the notice."""
        ends = sorted((event for event in self.events if _reason(event)), key=lambda event: event.asked_at)
        if not ends:
            return None
        cause = ends[0]
        if _reason(cause) == "ended-itself":
            taken = [one for one in ends if _reason(one) == "preempted" and one.asked_at - cause.asked_at <= SAME_END]
            cause = taken[0] if taken else cause
        reason = _reason(cause)
        assert reason
        return End(reason, cause.at, cause.words or WORDS[reason])


def read_lives(api: ComputeApi) -> dict[str, list[Life]]:
    """By instance name, the lives of every instance of ours that the log still tells of; one call per 500 operations."""
    from google.cloud import compute_v1

    doing, permission = "reading the operations log", "compute.globalOperations.list"
    pager = api.call(
        api.global_operations.aggregated_list,
        doing,
        permission,
        project=api.project,
        filter=OURS,
        max_results=PAGE,
    )
    lives: dict[str, dict[str, Life]] = defaultdict(dict)
    for _, scoped in api.pages(pager, doing, permission):
        for operation in scoped.operations:
            # An operation that failed changed nothing; one that is not done has not ended anything yet.
            if operation.status == compute_v1.Operation.Status.DONE and not operation.error.errors:
                _note(operation, lives)
    return {name: list(found.values()) for name, found in lives.items()}


def _note(operation: compute_v1.Operation, lives: dict[str, dict[str, Life]]) -> None:
    name = operation.target_link.rpartition("/instances/")[2]
    instance_id = str(operation.target_id)
    life = lives[name].setdefault(instance_id, Life(name, operation.zone.rpartition("/")[2], instance_id))
    asked_at = parse_time(operation.insert_time or operation.start_time)
    life.events.append(
        Event(
            kind=operation.operation_type,
            at=parse_time(operation.end_time) if operation.end_time else asked_at,
            asked_at=asked_at,
            user=operation.user,
            words=operation.status_message,
        )
    )


def _reason(event: Event) -> TerminationReason | None:
    if event.kind in REASONS:
        return REASONS[event.kind]
    # The end of max_run_duration is a system event too; its name is not documented.
    kind = event.kind.lower()
    return "terminated-by-user" if "terminat" in kind or kind.endswith(("delete", "stop")) else None


def parse_time(text: str) -> datetime:
    """RFC 3339 with an offset, as the API writes it."""
    return datetime.fromisoformat(text).astimezone(UTC)


def lives_of(found: dict[str, list[Life]]) -> Iterator[Life]:
    for lives in found.values():
        yield from lives


def latest(lives: list[Life] | None, instance_id: str = "") -> Life | None:
    """The life of this instance id, or of a name that was used only by it; of several the youngest."""
    if not lives:
        return None
    if instance_id:
        return next((life for life in lives if life.instance_id == instance_id), None)
    first: Any = datetime.min.replace(tzinfo=UTC)
    return max(lives, key=lambda life: life.began_at or first)
