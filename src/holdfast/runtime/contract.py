"""What the orchestrator, the agent and the user's program have agreed on: names, files, exit statuses."""

from __future__ import annotations

import hashlib
from typing import Literal

# Environment of the machine, set at launch, inherited by the agent and the program.
STORE = "HOLDFAST_STORE"  # URL of the object store
RUN = "HOLDFAST_RUN"  # run id
CLOUD = "HOLDFAST_CLOUD"  # name of the cloud that the machine is of
ATTEMPT = "HOLDFAST_ATTEMPT"  # number of the attempt, the fencing token of its commits; 0: the machine is a fleet's or a gang's
BUNDLE = "HOLDFAST_BUNDLE"  # URL of the bundle
BUNDLE_SHA256 = "HOLDFAST_BUNDLE_SHA256"
NOTICE_SECONDS = "HOLDFAST_NOTICE_SECONDS"  # of a cloud whose notice does not say when the machine goes, if not 30
CONSOLE = "HOLDFAST_CONSOLE"  # file or device that outlives the machine; one line per trained step goes there

# Added by the agent for the program.
TELEMETRY = "HOLDFAST_TELEMETRY"  # JSON lines, written by the program, read by the agent
NOTICE = "HOLDFAST_NOTICE"  # JSON file that appears when the machine is to be taken away
MEMBER = "HOLDFAST_MEMBER"  # in a fleet: the machine's own id
CHECKPOINT_POLICY = "HOLDFAST_CHECKPOINT"  # JSON of `CheckpointPolicy`
CHECKPOINT_DIRECTORY = "HOLDFAST_CHECKPOINT_DIRECTORY"  # for programs that checkpoint by writing folders
RESUME_DIRECTORY = "HOLDFAST_RESUME_DIRECTORY"  # the restored folder, unset when there is none
RESUME_STEP = "HOLDFAST_RESUME_STEP"
PORT = "HOLDFAST_PORT"  # on which a model server is to listen

PERSISTING_LOCK = "persisting.lock"
"""Beside the telemetry file: locked by every process that is making a snapshot durable."""

FLEET_ATTEMPT = 0
"""All machines of a fleet are given the same words, so that no attempt's number tells them apart."""

EXIT_FINISHED = 0
EXIT_PREEMPTED_COMMITTED = 83
EXIT_PREEMPTED_UNCOMMITTED = 84

Outcome = Literal[
    "finished", "preempted", "no-capacity", "quota", "program-failed", "lost", "cancelled", "over-budget", "moved"
]
"""Why an attempt ended. `moved`: stopped by the orchestrator to go back to spot."""

NoticeKind = Literal["preemption", "rebalance", "shutdown", "lease"]


def store_tag(url: str) -> str:
    """A store's URL as a tag: clouds differ in what characters and lengths they take."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def attempt_prefix(run_id: str, attempt: int) -> str:
    return f"runs/{run_id}/attempts/{attempt:04d}/"


def member_run(run_id: str, member: str) -> str:
    """What takes the place of the run's id in the keys of one member of a fleet: its checkpoints are its own."""
    return f"{run_id}/members/{member}"


def member_prefix(run_id: str, member: str) -> str:
    return f"runs/{member_run(run_id, member)}/"


def member_ends_prefix(run_id: str) -> str:
    """Ends have a prefix of their own: one list tells who has ended, and no log is in the way."""
    return f"runs/{run_id}/member-ends/"


def member_end_key(run_id: str, member: str) -> str:
    return f"{member_ends_prefix(run_id)}{member}.json"


def gang_prefix(run_id: str) -> str:
    return f"runs/{run_id}/gang/"


def formation_key(run_id: str, number: int) -> str:
    """Which members form, and where they meet; written by the orchestrator. The number is the attempt of their commits."""
    return f"{gang_prefix(run_id)}{number:04d}/formation.json"


def over_key(run_id: str, number: int) -> str:
    """That a formation is over, and why; written by the orchestrator."""
    return f"{gang_prefix(run_id)}{number:04d}/over.json"


def ready_prefix(run_id: str, number: int) -> str:
    """Members that are not in formation `number`, or not any more, and wait for the next."""
    return f"{gang_prefix(run_id)}{number:04d}/ready/"


def ready_key(run_id: str, number: int, member: str) -> str:
    return f"{ready_prefix(run_id, number)}{member}.json"


def checkpoint_prefix(run_id: str) -> str:
    return f"runs/{run_id}/checkpoints/"


def metrics_prefix(run_id: str) -> str:
    return f"runs/{run_id}/metrics/"


def journal_prefix(run_id: str) -> str:
    return f"runs/{run_id}/journal/"


def lease_key(run_id: str) -> str:
    return f"runs/{run_id}/lease"
