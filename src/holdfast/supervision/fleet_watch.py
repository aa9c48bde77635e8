"""Watch all machines of a fleet together: one description of them, one list of the store, at each look."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from holdfast.drivers.protocol import Machine
from holdfast.errors import CredentialsError, NotFoundError, RunTakenError, TransientError
from holdfast.ledger.fleet_state import Member
from holdfast.runtime.contract import (
    FLEET_ATTEMPT,
    Outcome,
    attempt_prefix,
    member_end_key,
    member_ends_prefix,
    member_prefix,
)
from holdfast.supervision.run import SETTLE_WALL_SECONDS
from holdfast.supervision.updates import Update

if TYPE_CHECKING:
    from holdfast.supervision.fleet_run import FleetRun

BOOT_SECONDS = 900.0
SILENT_SECONDS, SILENT_WALL_SECONDS = 600.0, 60.0
"""A machine that runs but is not heard of for so long is lost (cloud seconds, and never under a minute of the wall)."""
MEMBERS_HEARD_PER_LOOK = 10
"""Heartbeats are read one by one: so many at a look, and each member's only now and then."""
POWER_OFF_SECONDS = 120.0
STOP_GRACE_SECONDS = 120.0
PROGRESS_WALL_SECONDS = 2.0
NAMED_MACHINES = 3
UNSEEN_WALL_SECONDS = 20.0
"""How long machines may take to be shown after a launch that was interrupted before it was answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberEnd:
    machine: Machine
    """Terminated."""
    outcome: Outcome
    detail: str = ""


@dataclass(slots=True)
class _Heard:
    """What is known of a living member beside its description. Instants are the cloud's, `_wall` seconds are ours."""

    at: datetime
    wall: float
    since: datetime
    """When this watch began to look for it."""
    seen_at: datetime | None = None
    report_at: str = ""
    look_again_at: datetime | None = None
    ended_at: datetime | None = None
    asked: tuple[Outcome, str] | None = None
    """Why we terminated this one alone."""


@dataclass(slots=True)
class FleetWatch:
    run: FleetRun
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By machine: what its agent stored when it ended."""
    heard: dict[str, _Heard] = field(default_factory=dict)
    asked_at: datetime | None = None
    ending: tuple[Outcome, str] | None = None
    """All machines are being terminated, and this is why."""
    told: Any = None
    told_wall: float = 0.0

    def updates(self, until: datetime | None) -> Iterator[Update]:
        """Until there is something to decide."""
        missing = self.run.missing if until else 0
        while True:
            yield from self._look()
            if self._is_to_decide(until, missing):
                return
            time.sleep(self.run.driver.poll_seconds)

    def end_all(self, outcome: Outcome, why: str, unanswered: int | None = None) -> None:
        """Terminate every machine and see its end.

        `unanswered`: number of a round that was asked for in vain; its machines may be shown after a while only.
        """
        self.ending = (outcome, why)
        run, told = self.run, set()
        give_up_at = time.monotonic() + SETTLE_WALL_SECONDS
        look_until = time.monotonic() + (UNSEEN_WALL_SECONDS if unanswered else 0.0)
        while True:
            # Before anything is written: a journal that can't be must not keep a machine alive.
            for machine in run.patiently(lambda: self._described(0.0)).values():
                if machine.state in ("pending", "running") and machine.id not in told:
                    run.patiently(lambda machine=machine: run.driver.terminate(machine.id, machine.pool))
                    told.add(machine.id)
            for _ in self._look(fresh=True):
                pass
            if not run.state.living and (time.monotonic() >= look_until or self._is_whole(unanswered)):
                return
            if time.monotonic() > give_up_at:
                names = ", ".join(member.machine for member in run.state.living)
                raise TransientError(f"machines of run {run.run_id} do not end: {names}; reap_orphans goes on trying")
            time.sleep(run.driver.poll_seconds)

    def _is_whole(self, number: int | None) -> bool:
        """Are all machines of that round known?"""
        asked = self.run.state.rounds[number - 1] if number else None
        return asked is None or len(asked.members) >= asked.spot + asked.on_demand

    def _is_to_decide(self, until: datetime | None, missing_before: int) -> bool:
        run, state = self.run, self.run.state
        if run.complete or len(run.program_failures) > run.job.max_program_failures:
            return True
        if state.asked_to_end:
            return not state.living
        waits = until is not None and run.driver.clock.now() < until and run.missing == missing_before
        return run.missing > 0 and not waits

    # -- one look -----------------------------------------------------------------------------------------------------

    def _look(self, fresh: bool = False) -> Iterator[Update]:
        run = self.run
        if run.keepalive.taken:
            raise RunTakenError(f"run {run.run_id!r} was taken over by another process")
        try:
            self._read_ends()
            machines = self._described(0.0 if fresh else self._max_age_seconds())
            yield from self._adopt(machines)
            yield from self._record(machines)
            if self.ending is None:
                yield from self._act(machines)
                yield from self._lead(machines)
        except CredentialsError as error:
            if run.warn(f"waited for credentials: {error}"):
                yield self.run.update("warned", f"waiting for credentials: {error}")
        except TransientError as error:
            if run.warn("supervision went on after errors of store or cloud"):
                yield self.run.update("warned", f"{error}; going on")
        yield from self._progress()

    def _max_age_seconds(self) -> float:
        """One description serves a while; a shorter one when all that is awaited is that machines are gone."""
        run = self.run
        living = run.state.living
        over = run.state.asked_to_end or all(member.machine in self.ends for member in living)
        return run.driver.describe_seconds / (6 if over else 1)

    def _described(self, max_age_seconds: float) -> dict[str, Machine]:
        run = self.run
        return {
            machine.id: machine
            for cloud in run.clouds()
            for machine in run.driver.machines({"holdfast-run": run.run_id}, max_age_seconds, cloud)
        }

    def _read_ends(self) -> None:
        prefix = member_ends_prefix(self.run.run_id)
        members = self.run.state.members
        for info in self.run.store.list(prefix):
            machine = info.key.removeprefix(prefix).removesuffix(".json")
            if machine not in self.ends and machine in members and members[machine].outcome is None:
                self.ends[machine] = json.loads(self.run.store.get(info.key))

    def _adopt(self, machines: dict[str, Machine]) -> Iterator[Update]:
        """Machines that the cloud made by itself, or whose launch an orchestrator did not live to write down."""
        unknown = [machine for machine in machines.values() if machine.id not in self.run.state.members]
        for asked in self.run.state.rounds:
            if new := [machine for machine in unknown if self.run.round_of(machine) is asked]:
                self.run.record_launched(asked, new)
                yield self.run.update(
                    "launched",
                    f"{len(new)} more of round {asked.number}: {_some(new)}",
                    machines={machine.id: str(machine.pool) for machine in new},
                )

    def _record(self, machines: dict[str, Machine]) -> Iterator[Update]:
        now = self.run.driver.clock.now()
        ends: list[MemberEnd] = []
        for member in self.run.state.living:
            heard = self._heard_of(member)
            machine = machines.get(member.machine)
            if machine:
                heard.seen_at = now
            elif self._is_silent(heard.seen_at or heard.since, heard.wall, SILENT_SECONDS):
                self.run.driver.terminate(member.machine, member.pool)  # in case it is there after all
                machine = self._vanished(member)
            if machine and machine.state == "terminated":
                machine = self._ended_when_it_spoke_last(member, machine)
                outcome, detail = self._outcome(member, machine)
                ends.append(MemberEnd(machine=machine, outcome=outcome, detail=detail))
        if not ends:
            return
        self.run.record_ends(ends)
        for outcome in dict.fromkeys(end.outcome for end in ends):
            of_it = [end for end in ends if end.outcome == outcome]
            kind = "preempted" if outcome in ("preempted", "lost") else "ended"
            pools = {end.machine.id: str(end.machine.pool) for end in of_it}
            reason = of_it[0].detail if outcome in ("lost", "program-failed") else ""
            text = f"{len(of_it)} {outcome}: {_some([end.machine for end in of_it])}"
            yield self.run.update(kind, f"{text}: {reason}" if reason else text, machines=pools, outcome=outcome)

    # -- what is to be done about it ----------------------------------------------------------------------------------

    def _act(self, machines: dict[str, Machine]) -> Iterator[Update]:
        run, now = self.run, self.run.driver.clock.now()
        living = [member for member in run.state.living if member.machine in machines]
        for member in living:
            heard = self._heard_of(member)
            if member.machine in self.ends:
                heard.ended_at = heard.ended_at or now
                if now - heard.ended_at > timedelta(seconds=POWER_OFF_SECONDS):
                    run.driver.terminate(
                        member.machine, member.pool
                    )  # its work is done, but it did not power itself off
        if run.state.asked_to_end:
            if self.asked_at is None:  # by an orchestrator that died since
                self.asked_at = now
                run.ask_to_stop(*run.state.asked_to_end, STOP_GRACE_SECONDS)
            if now - self.asked_at > timedelta(seconds=2 * STOP_GRACE_SECONDS):
                for member in living:
                    run.driver.terminate(member.machine, member.pool)
            return
        self._end_the_silent(living, now)
        if living and (why := self._why_to_stop(living)):
            self.asked_at = now
            run.ask_to_stop("over-budget", why, STOP_GRACE_SECONDS)
            yield self.run.update("warned", why)

    def _why_to_stop(self, living: list[Member]) -> str | None:
        """Words when a cap of the run's would be passed if its machines were not asked to end now."""
        hours = self.run.job.max_run_hours
        reserve = min(len(living) * STOP_GRACE_SECONDS, 0.1 * hours * 3600)
        if self.run.seconds_used >= hours * 3600 - reserve:
            return f"the run's max_run_hours of {hours:g} are used up"
        return None

    def _end_the_silent(self, living: list[Member], now: datetime) -> None:
        due = [
            member
            for member in living
            if member.machine not in self.ends and (self._heard_of(member).look_again_at or now) <= now
        ]
        for member in due[:MEMBERS_HEARD_PER_LOOK]:
            heard = self._heard_of(member)
            report = self._report(member)
            if report and report["at"] != heard.report_at:
                heard.report_at, heard.at, heard.wall = report["at"], now, time.monotonic()
            limit = SILENT_SECONDS if heard.report_at else BOOT_SECONDS
            heard.look_again_at = now + timedelta(seconds=SILENT_SECONDS / 2)
            if self._is_silent(heard.at, heard.wall, limit) and heard.asked is None:
                heard.asked = ("lost", f"the machine was not heard of for over {limit:.0f} s")
                self.run.driver.terminate(member.machine, member.pool)

    def _is_silent(self, since: datetime, since_wall: float, seconds: float) -> bool:
        quiet = (self.run.driver.clock.now() - since).total_seconds() > seconds
        return quiet and time.monotonic() - since_wall > SILENT_WALL_SECONDS

    def _heard_of(self, member: Member) -> _Heard:
        if member.machine not in self.heard:
            now = self.run.driver.clock.now()
            first = now + timedelta(seconds=SILENT_SECONDS / 2)
            self.heard[member.machine] = _Heard(at=now, wall=time.monotonic(), since=now, look_again_at=first)
        return self.heard[member.machine]

    def _report(self, member: Member) -> dict[str, Any] | None:
        try:
            key = member_prefix(self.run.run_id, member.machine) + "heartbeat.json"
            return json.loads(self.run.store.get(key))
        except NotFoundError:
            return None

    def _lead(self, machines: dict[str, Machine]) -> Iterator[Update]:
        """What is to be done for members that work together; a fleet's do not."""
        yield from ()

    # -- why a member ended -------------------------------------------------------------------------------------------

    def _outcome(self, member: Member, machine: Machine) -> tuple[Outcome, str]:
        stored = self._stored_end(member)
        said: Outcome | None = stored["outcome"] if stored else None
        if said == "finished":
            return "finished", ""
        if said == "program-failed":
            status, lines = (stored or {}).get("exit_status"), (stored or {}).get("log_tail", "")
            how = "could not be started" if status is None else f"ended with status {status}"
            return "program-failed", f"the program {how}:\n{lines}"
        asked = self.ending or self.run.state.asked_to_end or self._heard_of(member).asked
        if asked and machine.reason != "preempted":
            return asked
        if machine.reason == "preempted":
            return "preempted", machine.detail
        if said == "preempted":
            kind = ((stored or {}).get("report", {}).get("notice") or {}).get("kind")
            if kind == "lease":
                return "lost", "the machine ended itself: nobody had renewed its lease"
            return "preempted", machine.detail
        if said:
            return said, (stored or {}).get("detail", "")
        if machine.reason == "ended-itself" and self._report(member) is None:
            return "program-failed", f"the machine never reached the program; {self._last_words(machine)}"
        return "lost", machine.detail or f"the machine is gone: {machine.reason or 'no reason given'}"

    def _ended_when_it_spoke_last(self, member: Member, machine: Machine) -> Machine:
        """A cloud that can't say why a machine ended only no longer shows it, and that may be hours after its end."""
        if machine.reason or not machine.terminated_at:
            return machine
        last = self._last_words_at(member)
        if not last or last > machine.terminated_at:
            return machine
        return dataclasses.replace(machine, terminated_at=max(last, machine.launched_at))

    def _vanished(self, member: Member) -> Machine:
        """A machine that the cloud has not shown for long: it is billed up to when it was last seen, or spoke."""
        known = (member.launched_at, self._last_words_at(member), self._heard_of(member).seen_at)
        return Machine(
            id=member.machine,
            pool=member.pool,
            state="terminated",
            launched_at=member.launched_at,
            terminated_at=max(at for at in known if at),
            reason="host-failed",
            detail="the cloud does not show the machine any more",
        )

    def _last_words_at(self, member: Member) -> datetime | None:
        """When the machine last told the store something: it may have been long before this watch began."""
        told = [
            report["at"] for report in (self._report(member), self._stored_end(member)) if report and "at" in report
        ]
        return max((datetime.fromisoformat(at) for at in told), default=None)

    def _stored_end(self, member: Member) -> dict[str, Any] | None:
        """Looked for once more: it may have been stored between our two looks."""
        if member.machine not in self.ends:
            try:
                self.ends[member.machine] = json.loads(
                    self.run.store.get(member_end_key(self.run.run_id, member.machine))
                )
            except NotFoundError:
                return None
        return self.ends[member.machine]

    def _last_words(self, machine: Machine) -> str:
        """Of a boot that failed. It could not be told under the machine's own id, so the first to fail has told it."""
        try:
            said = json.loads(self.run.store.get(attempt_prefix(self.run.run_id, FLEET_ATTEMPT) + "end.json"))
            return f"{said.get('detail', '')}\n{said.get('log_tail', '')}"
        except NotFoundError:
            tail = "\n".join(self.run.driver.console(machine.id, machine.pool).splitlines()[-50:])
            return f"its console says:\n{tail}"

    # -- what is told -------------------------------------------------------------------------------------------------

    def _progress(self) -> Iterator[Update]:
        counts = self.run.counts()
        if counts != self.told or time.monotonic() - self.told_wall > PROGRESS_WALL_SECONDS:
            self.told, self.told_wall = counts, time.monotonic()
            yield self.run.update("progress", ", ".join(f"{number} {name}" for name, number in counts.items()))


def _some(machines: list[Machine]) -> str:
    names = ", ".join(f"{machine.id} in {machine.pool}" for machine in machines[:NAMED_MACHINES])
    return f"{names} and {len(machines) - NAMED_MACHINES} more" if len(machines) > NAMED_MACHINES else names
