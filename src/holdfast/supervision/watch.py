"""Watch one machine to its end, through the store and the cloud's own word: no connection into it is needed."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from holdfast.drivers.protocol import Machine
from holdfast.errors import ConfigError, CredentialsError, NotFoundError, RunTakenError, TransientError
from holdfast.ledger.run_state import Attempt
from holdfast.runtime.contract import Outcome, attempt_prefix, checkpoint_prefix
from holdfast.supervision.updates import Update

if TYPE_CHECKING:
    from holdfast.supervision.training_run import TrainingRun

BOOT_SECONDS = 900.0
SILENT_SECONDS, SILENT_WALL_SECONDS = 600.0, 60.0
"""A machine that runs but is not heard of for so long is lost (cloud seconds, and never under a minute of the wall)."""
QUIET_WALL_SECONDS = 15.0
"""A machine tells something every 2 s; one that does not for so long may be gone."""
POWER_OFF_SECONDS = 120.0
STOP_GRACE_SECONDS = 120.0
CONSOLE_WALL_SECONDS = 60.0
"""An ended machine's console is asked for so long, and then done without."""
CUT_OFF = (None, -15, 143)
"""Exit statuses of a program that was stopped before it knew how to leave: none yet, or SIGTERM's own."""
NO_CHECKPOINT_SECONDS = 300.0
# The console outlives the machine, so it knows what the last heartbeat did not.
# A cloud may cut it off in the middle of a number.
TRAINED = re.compile(r"^holdfast: step (\d+)(?=\s)", re.MULTILINE)
RESUMED = re.compile(r"^holdfast: phase resumed (\d+)(?=\s)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    outcome: Outcome
    detail: str = ""
    machine: Machine | None = None
    resumed_step: int | None = None
    last_step: int | None = None
    committed_step: int | None = None
    report: dict[str, Any] = field(default_factory=dict)


def watch_attempt(run: TrainingRun, attempt: Attempt, asked_to_end: Outcome | None = None) -> Iterator[Update | Ending]:
    """Updates as they come, then one Ending, when the machine is proven terminated.

    `asked_to_end`: the machine was told to go; whatever it says, this is why the attempt ended.
    """
    return _Watch(run, attempt, asked_to_end).updates()


class _Watch:
    def __init__(self, run: TrainingRun, attempt: Attempt, asked_to_end: Outcome | None) -> None:
        self.run, self.attempt, self.asked_to_end = run, attempt, asked_to_end
        self.clock = run.driver.clock
        self.prefix = attempt_prefix(run.run_id, attempt.number)
        self.report: dict[str, Any] = {}
        self.told_events = 0
        self.told_progress: Any = None
        self.heard_at = self.clock.now()
        self.heard_wall = time.monotonic()
        self.asked_at: datetime | None = None
        self.why_asked = ""
        self.ended_at: datetime | None = None
        self.detail = ""
        self.seen: Machine | None = None
        self.seen_at = self.clock.now()
        self.warned_of_commits: set[str] = set()
        self.commit_error = ""
        self.asked_console_at: float | None = None
        if asked_to_end:  # it has been terminated; if it works on all the same, it is once more
            self.asked_at = self.clock.now()
        elif attempt.asked_to_end:  # by an orchestrator that died since
            self.asked_to_end, self.detail = attempt.asked_to_end
            self.asked_at = self.clock.now()
            run.keepalive.ask_to_stop(self.asked_to_end, STOP_GRACE_SECONDS)

    def updates(self) -> Iterator[Update | Ending]:
        while True:
            if self.run.keepalive.taken:
                raise RunTakenError(f"run {self.run.run_id!r} was taken over by another process")
            try:
                machine = self._machine()
                yield from self._news()
                if machine and machine.state == "terminated":
                    yield from self._news()  # what it stored between our two looks
                    yield self._ending(machine)
                    return
                if machine is None and self._is_silent(SILENT_SECONDS):
                    self.run.driver.terminate(self.attempt.machine, self.attempt.pool)  # in case it is there after all
                    yield self._ending(self._vanished())
                    return
                if machine:
                    yield from self._act(machine)
            except CredentialsError as error:
                if self.run.warn(f"waited for credentials: {error}"):
                    yield self._update("warned", f"waiting for credentials: {error}")
            except TransientError as error:
                if self.run.warn(f"attempt {self.attempt.number}: supervision went on after errors of store or cloud"):
                    yield self._update("warned", f"{error}; going on")
            time.sleep(self.run.driver.poll_seconds)

    def _machine(self) -> Machine | None:
        tags = {"holdfast-run": self.run.run_id, "holdfast-attempt": str(self.attempt.number)}
        driver = self.run.driver
        max_age = 0.0 if self._expects_a_change() else driver.describe_seconds
        for machine in driver.machines(tags, max_age, self.attempt.pool.cloud):
            if machine.id == self.attempt.machine:
                self.seen, self.seen_at = machine, self.clock.now()
                return machine
        return None

    def _expects_a_change(self) -> bool:
        """Then the cloud is asked at every look; otherwise a description that other runs share will do."""
        noticed = (self.report.get("notice") or {}).get("kind") not in (None, "rebalance")
        quiet = time.monotonic() - self.heard_wall > max(self.run.driver.describe_seconds, QUIET_WALL_SECONDS)
        return bool(self.ended_at or self.asked_at or noticed or quiet)

    def _vanished(self) -> Machine:
        """A machine that the cloud has not shown for long: it is billed up to when it was last seen, or spoke."""
        attempt = self.attempt
        assert attempt.launched_at
        until = max(self._last_words_at() or attempt.launched_at, self.seen_at if self.seen else attempt.launched_at)
        return Machine(
            id=attempt.machine,
            pool=attempt.pool,
            state="terminated",
            launched_at=attempt.launched_at,
            terminated_at=until,
            reason="host-failed",
            detail="the cloud does not show the machine any more",
        )

    def _last_words_at(self) -> datetime | None:
        """When the machine last told the store something: it may have been long before this watch began."""
        told = [report["at"] for report in (self.report, self._stored_end() or {}) if report.get("at")]
        return max((datetime.fromisoformat(at) for at in told), default=None)

    # -- what the machine says ----------------------------------------------------------------------------------------

    def _news(self) -> Iterator[Update]:
        try:
            report = json.loads(self.run.store.get(self.prefix + "heartbeat.json"))
        except NotFoundError:
            return
        if report["at"] == self.report.get("at"):
            return
        self.report, self.heard_at, self.heard_wall = report, self.clock.now(), time.monotonic()
        for event in report["events"]:
            if event["number"] > self.told_events:
                self.told_events = event["number"]
                yield from self._tell(event)
        progress = (report["step"], report["phase"])
        if progress != self.told_progress:
            self.told_progress = progress
            yield self._update("progress", f"step {report['step'] or 0}")

    def _tell(self, event: dict[str, Any]) -> Iterator[Update]:
        match event["kind"]:
            case "resumed" if event["step"]:
                yield self._update("resumed", f"resumed from step {event['step']}", event)
            case "committed":
                self.commit_error = ""
                yield self._update("committed", f"committed at step {event['step']}", event)
            case "notice":
                seconds = "no time given"
                if event.get("reclaim_at"):
                    left = datetime.fromisoformat(event["reclaim_at"]) - datetime.fromisoformat(event["at"])
                    seconds = f"{left.total_seconds():.0f} s left"
                yield self._update("notice", f"notice ({event['notice_kind']}): {seconds}", event)
            case "damaged":
                text = f"checkpoint {event['checkpoint']} is damaged ({event['error']}); the one before is used"
                if self.run.warn(text):
                    yield self._update("warned", text, event)
            case "commit-failed" | "commit-late":
                self.commit_error = event.get("error") or self.commit_error
                text = _not_durable(event, self.commit_error)
                if event["kind"] not in self.warned_of_commits:  # once: a store that stays away would fill the journal
                    self.warned_of_commits.add(event["kind"])
                    self.run.warn(f"attempt {self.attempt.number}: {text}")
                yield self._update("warned", text, event)
            case "notice-skipped":
                if self.run.warn(f"attempt {self.attempt.number}: {event['reason']}"):
                    yield self._update("warned", event["reason"], event)

    # -- what is to be done about it ----------------------------------------------------------------------------------

    def _act(self, machine: Machine) -> Iterator[Update]:
        now = self.clock.now()
        if self._stored_end() is not None:
            self.ended_at = self.ended_at or now
            if now - self.ended_at > timedelta(seconds=POWER_OFF_SECONDS):
                self.run.driver.terminate(machine.id, machine.pool)  # its work is done, but it did not power itself off
        elif self.asked_at:
            if now - self.asked_at > timedelta(seconds=2 * STOP_GRACE_SECONDS):
                self.run.driver.terminate(machine.id, machine.pool)
        else:
            self._end_if_silent(SILENT_SECONDS if self.report else BOOT_SECONDS)
            yield from self._enforce_limits(machine, now)
        yield from self._notice_missing_checkpoints(now)

    def _is_silent(self, seconds: float) -> bool:
        silent = (self.clock.now() - self.heard_at).total_seconds()
        return silent > seconds and time.monotonic() - self.heard_wall > SILENT_WALL_SECONDS

    def _end_if_silent(self, seconds: float) -> None:
        if self._is_silent(seconds):
            self.detail = f"the machine was not heard of for over {seconds:.0f} s"
            self.asked_to_end = self.asked_to_end or "lost"
            self.run.driver.terminate(self.attempt.machine, self.attempt.pool)

    def _enforce_limits(self, machine: Machine, now: datetime) -> Iterator[Update]:
        job, state = self.run.job, self.run.state
        running = (now - machine.launched_at).total_seconds()
        if self.asked_to_end:
            return
        if state.billed_seconds + running >= job.max_run_hours * 3600 - STOP_GRACE_SECONDS:
            yield self._ask("over-budget", f"the run's max_run_hours of {job.max_run_hours:g} are used up")
            return
        if why := self.run.why_too_dear(self.attempt, now):
            yield self._ask("over-budget", why)
            return
        if asked := self.run.why_stop(self.attempt, self.report, now):
            yield self._ask(*asked)
            return
        yield from self.run.told_plans()
        back = job.fallback.return_to_spot_after_seconds
        on_demand = self.attempt.pool.provisioning_model == "on-demand"
        if back and on_demand and job.provisioning != "on-demand" and running >= back and self.report.get("commits"):
            yield self._ask("moved", f"back to spot after {running:.0f} s on demand")

    def _ask(self, outcome: Outcome, why: str) -> Update:
        """The machine is asked, through its lease, to commit and to end itself; one that has no program yet is ended."""
        self.asked_to_end, self.detail, self.asked_at = outcome, why, self.clock.now()
        self.run.ask_to_stop(self.attempt, outcome, why, STOP_GRACE_SECONDS)
        if "program-started" not in self.report.get("marks", {}):
            self.run.driver.terminate(self.attempt.machine, self.attempt.pool)
        return self._update("warned", why)

    def _notice_missing_checkpoints(self, now: datetime) -> Iterator[Update]:
        started = self.report.get("marks", {}).get("program-started")
        if not started or "attached" in self.report["marks"] or not self._nothing_committed():
            return
        if now - datetime.fromisoformat(started) > timedelta(seconds=NO_CHECKPOINT_SECONDS) and self.run.warn(
            NEVER_CHECKPOINTED
        ):
            yield self._update("warned", NEVER_CHECKPOINTED)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _ended_when_it_spoke_last(self, machine: Machine) -> Machine:
        """A cloud that can't say why a machine ended only no longer shows it, and that may be hours after its end."""
        last = self._last_words_at()
        if machine.reason or not machine.terminated_at or not last or last > machine.terminated_at:
            return machine
        return dataclasses.replace(machine, terminated_at=max(last, machine.launched_at))

    def _ending(self, machine: Machine) -> Ending:
        machine = self._ended_when_it_spoke_last(machine)
        stored = self._stored_end()
        report = (stored or {}).get("report") or self.report
        console = self._console(machine)
        outcome, detail = self._outcome(machine, stored, console)
        if outcome == "finished":
            self._warn_of_an_odd_end(report)
        steps = [int(step) for step in TRAINED.findall(console)]
        committed = self._committed_step()
        resumed = report.get("resumed_step")
        if resumed is None and (found := RESUMED.search(console)):
            resumed = int(found[1])
        if resumed is None and (steps or committed is not None):
            resumed = 0
        last = None if resumed is None else max([*steps[-1:], report.get("step") or 0, resumed, committed or 0])
        kept = (
            "marks", "totals", "longest", "commits", "bytes_per_commit", "metrics", "notice", "damaged", "commit_failures",
            "late_commits", "total_steps", "last_step_at",
        )  # fmt: skip
        return Ending(
            outcome=outcome,
            detail=detail,
            machine=machine,
            resumed_step=resumed,
            last_step=last,
            committed_step=committed,
            report={name: report[name] for name in kept if name in report},
        )

    def _console(self, machine: Machine) -> str:
        """Empty where it can't be read: its last steps are not worth an end that is never written down."""
        try:
            return self.run.driver.console(machine.id, machine.pool)
        except (ConfigError, TransientError) as error:
            now = time.monotonic()
            self.asked_console_at = self.asked_console_at or now
            if isinstance(error, TransientError) and now - self.asked_console_at < CONSOLE_WALL_SECONDS:
                raise
            self.run.warn(f"a console can't be read, steps after a machine's last report are not known: {error}")
            return ""

    def _warn_of_an_odd_end(self, report: dict[str, Any]) -> None:
        marks = report.get("marks", {})
        if "attached" in marks and "finished" not in marks:
            self.run.warn(
                f"the program ended after step {report.get('step') or 0} of {report.get('total_steps') or 'unknown'} "
                f"without asking for the next one, so what it did after step {report.get('committed_step') or 0} was not "
                "committed; end a loop early with run.stop(), not with break"
            )
        elif self._nothing_committed():
            self.run.warn(NEVER_CHECKPOINTED)

    def _nothing_committed(self) -> bool:
        return self._committed_step() is None and not self.run.state.committed_step

    def _outcome(self, machine: Machine, stored: dict[str, Any] | None, console: str) -> tuple[Outcome, str]:
        said: Outcome | None = stored["outcome"] if stored else None
        if said == "finished":
            return "finished", ""
        status = (stored or {}).get("exit_status")
        if said == "program-failed" and not (self.asked_to_end and status in CUT_OFF):
            lines = (stored or {}).get("log_tail", "")
            how = "could not be started" if status is None else f"ended with status {status}"
            return "program-failed", f"the program {how}:\n{lines}"
        if self.asked_to_end:
            return self.asked_to_end, self.detail
        if machine.reason == "preempted":
            return "preempted", machine.detail
        if said == "preempted":
            kind = ((stored or {}).get("report", {}).get("notice") or {}).get("kind")
            if kind == "lease":
                return "lost", "the machine ended itself: nobody had renewed its lease"
            return "preempted", machine.detail
        if said:
            return said, (stored or {}).get("detail", "")
        if machine.reason == "ended-itself" and not self.report:
            tail = "\n".join(console.splitlines()[-50:])
            return "program-failed", f"the machine never reached the program; its console says:\n{tail}"
        return "lost", machine.detail or f"the machine is gone: {machine.reason or 'no reason given'}"

    def _stored_end(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.run.store.get(self.prefix + "end.json"))
        except NotFoundError:
            return None

    def _committed_step(self) -> int | None:
        prefix = f"{checkpoint_prefix(self.run.run_id)}{self.attempt.number:04d}-"
        keys = [info.key for info in self.run.store.list(prefix) if info.key.endswith("/manifest.json")]
        return max((int(key.removeprefix(prefix).partition("/")[0]) for key in keys), default=None)

    def _update(self, kind: Any, text: str, event: dict[str, Any] | None = None) -> Update:
        report = self.report
        return Update(
            kind=kind,
            at=datetime.fromisoformat(event["at"]) if event else self.clock.now(),
            attempt=self.attempt.number,
            text=text,
            fields={
                "phase": report.get("phase"),
                "step": (event or {}).get("step", report.get("step")),
                "total_steps": report.get("total_steps"),
                "metrics": report.get("metrics"),
                "committed_step": report.get("committed_step"),
                "not_durable_step": report.get("not_durable_step"),
                "machine": self.attempt.machine,
                "pool": str(self.attempt.pool),
                "usd": self.run.usd_so_far(self.attempt),
                **self.run.plan_fields(),
            },
        )


def _not_durable(event: dict[str, Any], error: str) -> str:
    """Of a save that failed, and will be tried again, or that took longer than it may."""
    after = f"after {event['seconds']:.0f} s" if "seconds" in event else "yet"
    budget = f", its budget was {event['budget_seconds']:.0f} s" if "budget_seconds" in event else ""
    return f"checkpoint of step {event['step']} is not durable {after}{budget}: {error or 'the store is slow'}"


NEVER_CHECKPOINTED = (
    "the program has committed no checkpoint: a preemption would lose everything. Wrap its loop in holdfast.attach, or "
    "write folders to $HOLDFAST_CHECKPOINT_DIRECTORY"
)
