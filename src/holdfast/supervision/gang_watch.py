"""Watch a gang: what a fleet's watch sees, when its members form anew, and how far they have come."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from holdfast.drivers.protocol import Machine
from holdfast.errors import ConfigError, TransientError
from holdfast.ledger.fleet_state import TAKEN, Member
from holdfast.placement.gang_policy import (
    Dissolve,
    Form,
    GangSituation,
    Ready,
    decide_formation,
    failed_program,
    is_to_move,
)
from holdfast.runtime.contract import Outcome, ready_prefix
from holdfast.supervision.fleet_watch import FleetWatch
from holdfast.supervision.updates import Update, UpdateKind
from holdfast.supervision.watch import TRAINED

if TYPE_CHECKING:
    from holdfast.supervision.gang_run import GangRun

PROGRESS_WALL_SECONDS = 2.0
REPORTS_WALL_SECONDS = 1.0
"""How often the members' heartbeats are read."""
TOLD: dict[str, UpdateKind] = {"resumed": "resumed", "committed": "committed", "notice": "notice"}


@dataclass(slots=True)
class GangWatch(FleetWatch):
    run: GangRun
    ready: dict[str, Ready] = field(default_factory=dict)
    """Of the formation after `ready_after`."""
    ready_after: int = -1
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By machine: what it last said of itself in the newest formation."""
    told_events: dict[str, int] = field(default_factory=dict)
    told_texts: set[tuple[int, str]] = field(default_factory=set)
    next_reports: float = 0.0
    told_newest: bool = False

    def _lead(self, machines: dict[str, Machine]) -> Iterator[Update]:
        run, state = self.run, self.run.state
        if state.asked_to_end or run.complete:
            return
        if state.trained:
            self._send_home(machines, "cancelled", "the gang had finished before this machine could join")
            return
        if not self.told_newest:  # an orchestrator may have died between the journal and the store
            run.tell_newest()
            self.told_newest = True
        self._read_ready()
        situation = self._situation(machines)
        if failed := failed_program(situation):
            run.record_failure(failed)
            if len(run.program_failures) > run.job.max_program_failures:
                return
        if is_to_move(situation, run.refused_since):
            why = f"fewer than {run.job.min_machines} machines, and no more to be had beside them: the gang begins elsewhere"
            if self._send_home(machines, "moved", why):
                yield run.update("warned", why)
            return
        match decide_formation(situation):
            case Form() as form:
                formed = run.form(form, self.ready, self._joint_report(fresh=True))
                self._read_ready()
                names = ", ".join(formed.members)
                yield run.update("formed", f"formation {formed.number}: {len(formed.members)} machines, {names}")
            case Dissolve() as over:
                newest = state.newest
                run.dissolve(over, self._joint_report(fresh=True))
                yield run.update("dissolved", f"formation {newest.number if newest else 0} is over: {over.why}")
        yield from self._hear()

    def _send_home(self, machines: dict[str, Machine], outcome: Outcome, why: str) -> int:
        """End machines that take no part; how many were not ending yet."""
        told = 0
        for member in self.run.state.living:
            heard = self._heard_of(member)
            if heard.asked is None and member.machine in machines:
                heard.asked = (outcome, why)
                self.run.driver.terminate(member.machine, member.pool)
                told += 1
        return told

    def _situation(self, machines: dict[str, Machine]) -> GangSituation:
        run, state = self.run, self.run.state
        running = {one.id for one in machines.values() if one.state in ("pending", "running")}
        # A machine that was just launched may not be shown yet.
        unseen = {member.machine for member in state.living if member.machine not in machines}
        living = {
            one.machine for one in state.living if one.machine in running | unseen and one.machine not in self.ends
        }
        done = {name for name, end in self.ends.items() if end["outcome"] == "finished"}
        return GangSituation(
            now=run.driver.clock.now(),
            machines=run.job.machines,
            min_machines=run.job.min_machines,
            members=state.newest.members if state.newest else (),
            is_over=state.forming,
            living=living,
            finished=done | {one.machine for one in state.ended("finished")},
            on_demand={one.machine for one in state.living if one.model == "on-demand"},
            ready=self.ready,
        )

    def _read_ready(self) -> None:
        """What members say that wait; each says it once per formation, unless an agent asks to be heard again."""
        run = self.run
        number = run.state.newest.number if run.state.newest else 0
        if number != self.ready_after:
            self.ready_after, self.ready, self.reports = number, {}, {}
        prefix = ready_prefix(run.run_id, number)
        for info in run.store.list(prefix):
            machine = info.key.removeprefix(prefix).removesuffix(".json")
            if machine not in self.ready and machine in run.state.members:
                said = json.loads(run.store.get(info.key))
                if said["report"].get("formation") == number:
                    self.reports[machine] = said["report"]
                status, lines = said["exit_status"], said["log_tail"]
                self.ready[machine] = Ready(
                    member=machine,
                    address=said["address"],
                    port=said["port"],
                    at=datetime.fromisoformat(said["at"]),
                    outcome=said["outcome"],
                    detail=f"the program ended with status {status}:\n{lines}" if said["outcome"] else "",
                )

    def _max_age_seconds(self) -> float:
        """Who waits for a formation waits for the cloud to say who is gone."""
        slow = FleetWatch._max_age_seconds(self)  # super() knows no class that slots have made anew
        return slow / 6 if self.ready else slow

    def _record(self, machines: dict[str, Machine]) -> Iterator[Update]:
        living = {member.machine for member in self.run.state.living}
        yield from FleetWatch._record(self, machines)
        last = self.run.state.newest
        for name in last.members if last else ():
            member = self.run.state.members[name]
            if name in living and member.outcome in TAKEN:
                self._read_console(member)
        if self.run.state.trained and last and last.over_at is None:
            self.run.dissolve(Dissolve(gracious=True, why=""), self._joint_report(fresh=True))

    # -- how far they are ---------------------------------------------------------------------------------------------

    def _hear(self) -> Iterator[Update]:
        if time.monotonic() < self.next_reports:
            return
        self.next_reports = time.monotonic() + REPORTS_WALL_SECONDS
        for member in self._of_newest():
            self._read_report(member)
            yield from self._tell_events(member)

    def _of_newest(self) -> list[Member]:
        last = self.run.state.newest
        return [self.run.state.members[name] for name in last.members] if last and last.over_at is None else []

    def _read_report(self, member: Member) -> None:
        stored = self._stored_end(member) if member.machine in self.ends else None
        report = (stored or {}).get("report") or self._report(member)
        last = self.run.state.newest
        if report and last and report.get("formation") == last.number:
            self.reports[member.machine] = report

    def _read_console(self, member: Member) -> None:
        """The last steps of a machine that could not say goodbye: its heartbeat is older."""
        try:
            console = self.run.driver.console(member.machine, member.pool)
        except (ConfigError, TransientError):
            return
        last = self.run.state.newest
        _, here, since = console.rpartition(f"holdfast: formation {last.number if last else 0}\n")
        steps = [int(step) for step in TRAINED.findall(since)] if here else []
        if steps:
            report = self.reports.get(member.machine, {})
            self.reports[member.machine] = {**report, "step": max(steps[-1], report.get("step") or 0)}

    def _joint_report(self, fresh: bool = False) -> dict[str, Any]:
        """What the ranks said of the newest formation, as one: only one of them tells the steps."""
        last = self.run.state.newest
        for name in last.members if fresh and last else ():
            member = self.run.state.members[name]
            if name not in self.ready and member.outcome not in TAKEN:
                self._read_report(member)
        reports = list(self.reports.values())
        joint: dict[str, Any] = {}
        for name in ("step", "total_steps", "resumed_step", "committed_step"):
            told = [report[name] for report in reports if report.get(name) is not None]
            if told:
                joint[name] = max(told)
        for name in ("commits", "bytes_per_commit"):
            joint[name] = max((report.get(name) or 0 for report in reports), default=0)
        joint["metrics"] = next((one["metrics"] for one in reports if one.get("metrics")), {})
        return joint

    def _tell_events(self, member: Member) -> Iterator[Update]:
        for event in self.reports.get(member.machine, {}).get("events", []):
            key = f"{member.machine}-{self.ready_after}"
            if event["number"] <= self.told_events.get(key, 0):
                continue
            self.told_events[key] = event["number"]
            match event["kind"]:
                case "resumed" if event["step"]:
                    text = f"resumed from step {event['step']}"
                case "committed":
                    text = f"committed at step {event['step']}"
                case "notice":
                    text = f"notice ({event['notice_kind']}) on {member.machine}"
                case _:
                    continue
            if (self.ready_after, text) not in self.told_texts:  # every machine tells of the same commit
                self.told_texts.add((self.ready_after, text))
                yield self.run.update(TOLD[event["kind"]], text)

    def _progress(self) -> Iterator[Update]:
        report = self._joint_report()
        now = (report.get("step"), self.run.counts())
        if now != self.told or time.monotonic() - self.told_wall > PROGRESS_WALL_SECONDS:
            self.told, self.told_wall = now, time.monotonic()
            update = self.run.update("progress", f"step {report.get('step') or 0}")
            steps = {name: report.get(name) for name in ("step", "total_steps", "committed_step", "metrics")}
            update.fields.update(steps)
            yield update
