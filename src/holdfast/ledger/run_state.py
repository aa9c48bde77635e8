"""What the journal says of a run, attempt by attempt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from holdfast.drivers.protocol import CapacityPool
from holdfast.ledger.billing import add_usd
from holdfast.ledger.journal import Entry
from holdfast.runtime.contract import Outcome

RETRYABLE: frozenset[str] = frozenset({"preempted", "no-capacity", "lost", "moved"})
INTERRUPTIONS: frozenset[str] = frozenset({"preempted", "lost"})


@dataclass(slots=True, kw_only=True)
class Attempt:
    """The life of one machine for the run. Steps count completed steps; None where nothing is known."""

    number: int
    pool: CapacityPool
    reserved_at: datetime
    usd_per_hour: float
    on_demand_usd_per_hour: float
    usd_reserved: float
    interruptions_per_hour: float = 0.0
    """Expected when it was reserved."""
    hazards: tuple[tuple[float, float], ...] = ()
    """The same by the machine's age in seconds; empty: nothing was seen of it."""
    budget: str = ""
    """Name of the budget that the worst case is reserved from."""
    reason: str = ""
    asked_to_end: tuple[Outcome, str] | None = None
    """Why the orchestrator asked its machine to end: outcome and words."""
    machine: str = ""
    launched_at: datetime | None = None
    terminated_at: datetime | None = None
    detected_at: datetime | None = None
    outcome: Outcome | None = None
    detail: str = ""
    billed_seconds: float = 0.0
    usd: float = 0.0
    resumed_step: int | None = None
    last_step: int | None = None
    committed_step: int | None = None
    lost_steps: int = 0
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def marks(self) -> dict[str, datetime]:
        """When the program and the agent did what, by kind of telemetry event."""
        return {kind: datetime.fromisoformat(at) for kind, at in self.report.get("marks", {}).items()}

    @property
    def trained_steps(self) -> int:
        return (self.last_step or 0) - (self.resumed_step or 0) if self.last_step is not None else 0

    @property
    def new_committed_steps(self) -> int:
        return max(0, (self.committed_step or 0) - (self.resumed_step or 0))

    @property
    def boot_seconds(self) -> float | None:
        """From the launch until steps are done at their usual pace; None: not one was."""
        marks, step = self.marks, self.step_seconds
        if self.launched_at is None or "resumed" not in marks:
            return None
        began_at = marks["resumed"]
        if step is not None and "first-step" in marks:
            began_at = max(began_at, marks["first-step"] - timedelta(seconds=step))
        return max(0.0, (began_at - self.launched_at).total_seconds())

    @property
    def last_step_at(self) -> datetime | None:
        """When the last step was complete, before the last commit; None: the program did not end in order, or told nothing."""
        told, marks = self.report.get("last_step_at"), self.report.get("marks", {})
        return datetime.fromisoformat(told) if told and ("finished" in marks or "preempting" in marks) else None

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds of a step in this attempt, on the cloud's clock; without the first one, where more are known: that
        may warm up, or compile.
        """
        if self.trained_steps > 1 and self.last_step_at and (begun := self.marks.get("first-step")):
            return max(0.0, (self.last_step_at - begun).total_seconds()) / (self.trained_steps - 1)
        first, ended, marks = self.marks.get("resumed"), self.terminated_at, self.marks
        last = (
            self.last_step_at or marks.get("finished") or marks.get("preempting") or marks.get("program-ended") or ended
        )
        if not first or not last or self.trained_steps <= 0:
            return None
        return max(0.0, (last - first).total_seconds()) / self.trained_steps


@dataclass(slots=True)
class RunState:
    run_id: str
    job: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    store: str = ""
    """URL of the store that the checkpoints go to."""
    started_at: datetime | None = None
    closed_at: datetime | None = None
    reopened_at: datetime | None = None
    """When a run that had failed, or was given up, was last taken up again."""
    state: str = "new"
    """new, running, finished, failed, cancelled, over-budget."""
    detail: str = ""
    clock_speed: float = 1.0
    attempts: list[Attempt] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fallbacks: list[tuple[datetime, str]] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    """The last decision of a run that has a deadline, with what it was taken on; empty without one."""
    plans: int = 0
    """How often the plan has changed."""
    recoveries: int = 0
    """How often an orchestrator took the run over from one that had died."""

    @property
    def open_attempt(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts and self.attempts[-1].outcome is None else None

    @property
    def interruptions(self) -> int:
        return sum(attempt.outcome in INTERRUPTIONS for attempt in self.attempts)

    @property
    def usd_total(self) -> float:
        return add_usd(attempt.usd for attempt in self.attempts)

    @property
    def billed_seconds(self) -> float:
        return sum(attempt.billed_seconds for attempt in self.attempts)

    @property
    def committed_step(self) -> int:
        return max((attempt.committed_step or 0 for attempt in self.attempts), default=0)


def read_run_state(run_id: str, entries: Iterable[Entry]) -> RunState:
    """Fold the journal. The same entries give the same state, whoever asks and when."""
    state = RunState(run_id)
    for entry in entries:
        fields = entry.fields
        match entry.kind:
            case "run-started":
                state.job, state.fingerprint = fields["job"], fields["fingerprint"]
                state.started_at, state.state = entry.at, "running"
                state.clock_speed, state.store = fields["clock_speed"], fields.get("store", "")
            case "taken-over":
                state.recoveries += 1
            case "reopened":
                state.state, state.closed_at, state.detail = "running", None, ""
                state.reopened_at = entry.at
            case "reserved":
                state.attempts.append(
                    Attempt(
                        number=fields["attempt"],
                        pool=CapacityPool(**fields["pool"]),
                        reserved_at=entry.at,
                        usd_per_hour=fields["usd_per_hour"],
                        on_demand_usd_per_hour=fields["on_demand_usd_per_hour"],
                        usd_reserved=fields["usd_reserved"],
                        interruptions_per_hour=fields.get("interruptions_per_hour", 0.0),
                        hazards=tuple((age, rate) for age, rate in fields.get("hazards", ())),
                        budget=fields.get("budget", ""),
                        reason=fields["reason"],
                    )
                )
            case "launched":
                attempt = state.attempts[-1]
                attempt.machine = fields["machine"]
                attempt.launched_at = datetime.fromisoformat(fields["launched_at"])
            case "asked-to-end":
                state.attempts[-1].asked_to_end = (fields["outcome"], fields["why"])
            case "ended":
                _end_attempt(state.attempts[-1], entry)
            case "fallback":
                state.fallbacks.append((entry.at, fields["reason"]))
            case "planned":
                state.plan, state.plans = {"at": entry.at.isoformat(), **fields}, state.plans + 1
            case "warned":
                if fields["text"] not in state.warnings:
                    state.warnings.append(fields["text"])
            case "closed":
                state.state, state.closed_at, state.detail = fields["state"], entry.at, fields["detail"]
    _count_lost_steps(state.attempts)
    return state


def _end_attempt(attempt: Attempt, entry: Entry) -> None:
    fields = entry.fields
    attempt.outcome, attempt.detail, attempt.detected_at = fields["outcome"], fields["detail"], entry.at
    attempt.billed_seconds, attempt.usd = fields["billed_seconds"], fields["usd"]
    terminated_at = fields.get("terminated_at")
    attempt.terminated_at = datetime.fromisoformat(terminated_at) if terminated_at else None
    attempt.resumed_step, attempt.last_step = fields["resumed_step"], fields["last_step"]
    attempt.committed_step = fields["committed_step"]
    attempt.report = fields["report"]


def _count_lost_steps(attempts: list[Attempt]) -> None:
    """An attempt loses what it trained beyond the step that the next one resumes from.

    Steps of earlier attempts that must be done again too (their checkpoint proved damaged) are counted with the last
    attempt that had them, so that the sum is exactly the number of steps trained more than once.
    """
    last: Attempt | None = None
    for attempt in attempts:
        if attempt.resumed_step is None:
            continue
        if last is not None and last.last_step is not None:
            last.lost_steps = max(0, last.last_step - attempt.resumed_step)
        last = attempt
    if last is not None and last.outcome not in (None, "finished") and last.last_step is not None:
        durable = max(last.committed_step or 0, last.resumed_step or 0)
        last.lost_steps = max(0, last.last_step - durable)
