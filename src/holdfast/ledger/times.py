"""What passes in a run besides training: of the machine, of the market, and of the orchestrator. Read from journals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime

from holdfast.ledger.journal import Entry
from holdfast.ledger.run_state import Attempt, read_run_state

IN_ORDER = ("finished", "moved", "preempted", "over-budget", "cancelled")


@dataclass(slots=True)
class Times:
    """Every time that was seen, in seconds of the cloud's clock."""

    begin: list[float] = field(default_factory=list)
    """From the run's start to its first launch: the code is packed and sent before it."""
    launch: list[float] = field(default_factory=list)
    """From a decision to the launch, of every later one."""
    refusal: list[float] = field(default_factory=list)
    """From a decision to the next one, where the cloud had no machine."""
    boot: list[float] = field(default_factory=list)
    """From a launch to the first step."""
    stop: list[float] = field(default_factory=list)
    """From the last step to the machine's end, where it ended in order."""
    detect: list[float] = field(default_factory=list)
    """From a machine's end to the next decision."""
    obey: list[float] = field(default_factory=list)
    """From the request to leave to the last step."""
    unused_notice: list[float] = field(default_factory=list)
    """From a machine's own end to when it would have been taken; negative where that took its time."""
    short_life: list[float] = field(default_factory=list)
    """From a launch to the end of a machine that was told of it before its first step."""
    told_restart: list[float] = field(default_factory=list)
    """What the policies were told that another machine takes."""
    commits: int = 0
    commit_seconds: float = 0.0
    """Of all commits together, until they were durable."""

    def mean(self, name: str) -> float:
        """0 where nothing was seen."""
        seen = getattr(self, name)
        return sum(seen) / len(seen) if seen else 0.0

    def means(self) -> dict[str, float]:
        return {
            one.name: round(self.mean(one.name), 3) for one in fields(self) if isinstance(getattr(self, one.name), list)
        }


def times_of(journals: Iterable[Sequence[Entry]]) -> Times:
    """Of several runs together. Seconds spent waiting for capacity are nobody's and not in it."""
    times = Times()
    for entries in journals:
        _add_decisions(times, entries)
        for attempt in read_run_state("", entries).attempts:
            _add_machine(times, attempt)
    return times


def _add_decisions(times: Times, entries: Sequence[Entry]) -> None:
    started: datetime | None = None
    ended: tuple[str, datetime] | None = None
    decided: datetime | None = None
    reserved: datetime | None = None
    asked: datetime | None = None
    alive = False
    for entry in entries:
        match entry.kind:
            case "run-started":
                started = entry.at
            case "reserved" | "planned":
                if entry.kind == "planned":
                    times.told_restart.append(entry.fields["restart_seconds"])
                if not alive and ended:
                    getattr(times, ended[0]).append((entry.at - ended[1]).total_seconds())
                    ended = None
                if entry.kind == "planned" and not alive:  # told where a decision is another than the one before
                    decided = entry.at if entry.fields["pool"] else None
                elif entry.kind == "reserved":
                    reserved, decided, alive = decided or entry.at, None, True
            case "launched" if reserved:
                launched_at = datetime.fromisoformat(entry.fields["launched_at"])
                if started:
                    times.begin.append((launched_at - started).total_seconds())
                    started = None
                else:
                    times.launch.append((launched_at - reserved).total_seconds())
            case "asked-to-end":
                asked = entry.at
            case "ended":
                alive = False
                terminated_at, last = entry.fields.get("terminated_at"), entry.fields["report"].get("last_step_at")
                if terminated_at:
                    ended = ("detect", datetime.fromisoformat(terminated_at))
                elif reserved and entry.fields["outcome"] == "no-capacity":
                    ended = ("refusal", reserved)
                if asked and last:
                    times.obey.append(max(0.0, (datetime.fromisoformat(last) - asked).total_seconds()))
                reserved = asked = started = None


def _add_machine(times: Times, attempt: Attempt) -> None:
    launched, ended, last = attempt.launched_at, attempt.terminated_at, attempt.last_step_at
    if attempt.boot_seconds is not None:
        times.boot.append(attempt.boot_seconds)
    if ended and last and attempt.outcome in IN_ORDER:
        times.stop.append(max(0.0, (ended - last).total_seconds()))
    notice = attempt.report.get("notice") or {}
    if launched and ended and attempt.outcome == "preempted" and notice.get("reclaim_at"):
        unused = (datetime.fromisoformat(notice["reclaim_at"]) - ended).total_seconds()
        if last:
            times.unused_notice.append(unused)
        elif unused > 0:
            times.short_life.append((ended - launched).total_seconds())
    times.commits += attempt.report.get("commits", 0)
    times.commit_seconds += attempt.report.get("totals", {}).get("commit_seconds", 0.0)
