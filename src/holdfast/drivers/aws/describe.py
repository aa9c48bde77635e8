"""What EC2 says of an instance, as a Machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from holdfast.drivers.protocol import CapacityPool, Machine, MachineState, TerminationReason

STATES: dict[str, MachineState] = {
    "pending": "pending",
    "running": "running",
    "shutting-down": "stopping",
    "stopping": "stopping",
    # Not over: its disk is paid for, and it may be started again. Terminating it ends it.
    "stopped": "stopping",
    "terminated": "terminated",
}
REASONS: dict[str, TerminationReason] = {
    "Server.SpotInstanceTermination": "preempted",
    "Server.SpotInstanceShutdown": "preempted",
    "Server.SpotInstanceHibernation": "preempted",
    "Client.InstanceInitiatedShutdown": "ended-itself",
    "Client.UserInitiatedShutdown": "terminated-by-user",
    "Client.UserInitiatedHibernate": "terminated-by-user",
    "Client.InstanceTerminated": "terminated-by-user",
    "Server.InternalError": "host-failed",
    "Server.ScheduledStop": "host-failed",
    # It was taken before it ran: the pool was empty after all, and another may not be.
    "Server.InsufficientInstanceCapacity": "preempted",
    # An account's own fault, such as a key that may not be used: told in `detail`, and no machine will fare better.
    "Client.InternalError": "host-failed",
    "Client.InvalidSnapshot.NotFound": "host-failed",
    "Client.VolumeLimitExceeded": "host-failed",
}
"""Every documented code: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_StateReason.html"""
WHEN = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")


def machine_of(instance: Mapping[str, Any], region: str) -> Machine:
    """`terminated_at` is None where EC2 does not tell it: it does for what the API ended."""
    state = STATES.get(instance["State"]["Name"], "running")
    reason = instance.get("StateReason") or {}
    transition = instance.get("StateTransitionReason") or ""
    over = state in ("stopping", "terminated")
    launched_at = instance["LaunchTime"].astimezone(UTC)
    said_at = WHEN.search(transition)
    ended_at = datetime.strptime(said_at[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC) if said_at else None
    return Machine(
        id=instance["InstanceId"],
        pool=CapacityPool(
            "aws",
            region,
            instance["Placement"]["AvailabilityZone"],
            instance["InstanceType"],
            "spot" if instance.get("InstanceLifecycle") == "spot" else "on-demand",
        ),
        state=state,
        tags={tag["Key"]: tag["Value"] for tag in instance.get("Tags", [])},
        launched_at=launched_at,
        terminated_at=max(ended_at, launched_at) if ended_at and state == "terminated" else None,
        reason=_reason(reason.get("Code", ""), transition) if state == "terminated" else "",
        detail=(reason.get("Message") or reason.get("Code") or transition) if over else "",
    )


def _reason(code: str, transition: str) -> TerminationReason:
    if code in REASONS:
        return REASONS[code]
    if transition.startswith("User initiated"):
        return "terminated-by-user"
    if "Spot" in code or "Spot" in transition:
        return "preempted"
    return "host-failed" if code.startswith("Server.") else ""
