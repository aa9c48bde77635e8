"""The agent of a gang's member: one program after another, each under torchrun in a formation of its own."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from holdfast.errors import ConfigError, TransientError
from holdfast.runtime import contract, torchrun
from holdfast.runtime.agent import TICK_SECONDS, Agent, log
from holdfast.runtime.gang import Formation, Left, Membership, Over
from holdfast.runtime.metadata import Notice, own_address

REGROUP_SECONDS = 120.0
"""Time to commit before a formation that is over is left (cloud seconds)."""
BROKEN_WALL_SECONDS = 10.0
"""Ranks whose collectives lost a peer fail by themselves, some (NCCL's) only after minutes."""
TORCHRUN_WALL_SECONDS = 45.0
"""torchrun itself kills ranks that do not end within 30 s."""
UNKNOWN = -1
"""Number of the newest formation, as long as the store was not asked."""


class GangAgent(Agent):
    def __init__(self, work: Path) -> None:
        super().__init__(work)
        self.leased_attempt = sys.maxsize  # formations come and go, the machine stays
        member = self.of_member[contract.MEMBER]
        self.of_member = {contract.MEMBER: member}  # checkpoints are the run's
        self.gang = Membership(self.store, self.run_id, member, own_address(self.clock), self.clock)
        self.formation: Formation | None = None
        self._over: Over | None = None
        self._leave_by = self._kill_at = self._next_look = 0.0

    def _carry_out(self) -> None:
        number, left = UNKNOWN, Left()
        while True:
            self.formation = self._next_formation(number, left)
            number = self.formation.number
            ending = self._take_part(self.formation)
            finished, noticed = ending["outcome"] == "finished", self.notice and self.notice.kind != "rebalance"
            if finished or noticed:
                # A program that fails at the notice may have missed a peer that had it too.
                self._create_end(ending if finished else {**ending, "outcome": "preempted"})
                return
            left = Left(**ending, report=self._report())

    def _next_formation(self, number: int, left: Left) -> Formation:
        """The first after `number` that this machine is in. Raises Interrupted on a notice."""
        told, next_look = UNKNOWN, 0.0
        while True:
            self._stop_if_noticed(left.log_tail or "its gang had not formed yet")
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + self._beat_every
                try:
                    if number == UNKNOWN:
                        number = self.gang.newest()
                    if told != number:
                        self.gang.wait_for(number + 1, left)
                        told = number
                    if formation := self.gang.formation(number + 1):
                        if self.gang.member in formation.members:
                            return formation
                        number += 1
                        next_look = 0.0
                except TransientError as error:
                    log.warning("can't ask for a formation error=%s", error)
                with self._noting_refusals():
                    self._heartbeat()
            time.sleep(TICK_SECONDS)

    def _take_part(self, formation: Formation) -> dict[str, Any]:
        """The program, from its start to its end in this formation; how it ended."""
        self._over, self._leave_by, self._kill_at = None, 0.0, 0.0
        with self._notice_lock:
            self._expect_program(f"-{formation.number:04d}", self.run_id, formation.number)
            if self.notice:
                self._show(self.notice)
        self.of_member |= {contract.ATTEMPT: str(formation.number)}
        self._mark("formed", formation=formation.number, machines=len(formation.members))
        with contextlib.suppress(OSError):  # a console that is gone
            print(f"holdfast: formation {formation.number}", flush=True)
        logs = self._start_program(self._command())
        self._accompany(logs)
        return self._end(logs)

    def _command(self) -> list[str]:
        formation = self.formation
        assert formation
        return torchrun.together(
            len(formation.members),
            torchrun.processes_here(self.config["processes_per_machine"]),
            self.config["command"],
            rendezvous=f"{self.run_id}-{formation.number}",
            meeting=formation.meeting,
            address=self.gang.address,
            hosts=formation.host == self.gang.member,
        )

    # -- while the program runs ---------------------------------------------------------------------------------------

    def _look_around(self) -> None:
        assert self.formation
        if self._over is None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + self._beat_every
            try:
                self._over = self.gang.over(self.formation.number)
            except (TransientError, ConfigError) as error:
                log.warning("can't ask whether the formation is over error=%s", error)
            if self._over:
                self._begin_to_leave(self._over)
        if self._leave_by and time.monotonic() >= self._leave_by:
            # torchrun ends its ranks, and leaves alone what still makes a checkpoint durable.
            self._signal_program(signal.SIGTERM)
            self._leave_by, self._kill_at = 0.0, time.monotonic() + TORCHRUN_WALL_SECONDS
        if self._kill_at and time.monotonic() >= self._kill_at:
            self._kill_program()

    def _begin_to_leave(self, over: Over) -> None:
        log.warning("formation %s is over: %s", self.formation and self.formation.number, over.why)
        if not over.gracious:
            self._leave_by = time.monotonic() + BROKEN_WALL_SECONDS
            return
        now = self.clock.now()
        notice = Notice(kind="lease", reclaim_at=now + timedelta(seconds=REGROUP_SECONDS), seen_at=now)
        self._leave_by = time.monotonic() + REGROUP_SECONDS / self.clock.speed
        with self._notice_lock:
            if self.notice is None or self.notice.kind == "rebalance":
                self._show(notice)
        self._ask_program_to_leave()

    def _report(self) -> dict[str, Any]:
        return {**super()._report(), "formation": self.formation.number if self.formation else 0}

    def _outcome(self, status: int) -> contract.Outcome:
        """torchrun's status is 1 whatever its ranks' were; only 0 means that all of them ended well."""
        marks = self.telemetry.report["marks"]
        asked = self._told_program or (self._over is not None and self._over.gracious)
        if marks.keys() & {"preempting", "reforming"} or (asked and "finished" not in marks):
            return "preempted"
        return "finished" if status == contract.EXIT_FINISHED else "program-failed"
