"""The agent: starts the user's program, hears notices, holds the lease, tells the store, ends the machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.clock import Clock, clock_from_environment
from holdfast.errors import AlreadyExistsError, ConfigError, TransientError
from holdfast.runtime import contract
from holdfast.runtime.folders import FolderCheckpoints
from holdfast.runtime.logs import LogShipper
from holdfast.runtime.metadata import Notice
from holdfast.runtime.telemetry import Telemetry
from holdfast.runtime.watchers import LeaseWatcher, NoticeWatcher
from holdfast.storage import open_store

log = logging.getLogger(__name__)

TICK_SECONDS = 0.05
HEARTBEAT_SECONDS = 2.0
SHORTEST_HEARTBEAT_WALL_SECONDS = 0.25
LEASE_POLL_SECONDS = 10.0
SHUTDOWN_SECONDS = 25.0
"""An orderly shutdown gives at least so long on every cloud (GCP 30 s, EC2 minutes)."""
STRENGTH = {"rebalance": 1, "lease": 2, "shutdown": 2, "preemption": 3}


class Agent:
    def __init__(self, work: Path) -> None:
        environment = os.environ
        self.clock: Clock = clock_from_environment()
        self.config: dict[str, Any] = json.loads((work / "agent.json").read_text())
        self.work = work
        self.run_id, self.attempt = environment[contract.RUN], int(environment[contract.ATTEMPT])
        self.store = open_store(environment[contract.STORE])
        self.prefix = contract.attempt_prefix(self.run_id, self.attempt)
        self.telemetry = Telemetry(work / "telemetry.jsonl")
        policy = CheckpointPolicy.from_json(environment.get(contract.CHECKPOINT_POLICY, "{}"))
        self.folders = FolderCheckpoints(
            work / "checkpoints", self.store, self.run_id, self.attempt, policy, self.clock
        )
        self.notice: Notice | None = None
        self._notice_lock = threading.Lock()
        self._told_program = False
        self.program: subprocess.Popen[bytes] | None = None
        self._mark("agent-started")

    def run(self) -> None:
        """From the program's start to the machine's end. Never raises: what went wrong is in end.json."""
        signal.signal(signal.SIGTERM, lambda *_: self._hear_shutdown())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._watch()
            logs = self._start_program()
            self._accompany(logs)
            self._end(logs)
        except ConfigError as error:  # another machine would meet the same: no whole checkpoint, a run of another kind
            log.error("the program can't be started: %s", error)
            self._create_end({"outcome": "program-failed", "exit_status": None, "log_tail": str(error)})
        except Exception as error:
            log.exception("the agent failed")
            self._kill_program()
            self._create_end({"outcome": "lost", "detail": f"the agent failed: {error!r}"})

    def _watch(self) -> None:
        NoticeWatcher(self.clock, self.config["notice_poll_seconds"], self.hear).start()
        LeaseWatcher(
            self.store, self.run_id, self.attempt, self.clock, LEASE_POLL_SECONDS, self.hear, self._power_off
        ).start()

    def _start_program(self) -> LogShipper:
        environment = {**os.environ, **self.config["env"], **self.folders.restore()}
        environment[contract.TELEMETRY] = str(self.work / "telemetry.jsonl")
        environment[contract.NOTICE] = str(self.work / "notice.json")
        code = self.work / "code"
        environment["PYTHONPATH"] = os.pathsep.join([str(code), str(self.work / "lib")])
        environment["PYTHONUNBUFFERED"] = "1"
        command = [*([sys.executable] if self.config["python"] else []), *self.config["command"]]
        if self.folders.restored_step is not None:
            self._mark("resumed", step=self.folders.restored_step, checkpoint="folder", load_seconds=0.0)
        try:
            # A session of its own: an orderly shutdown of the machine reaches the agent first, which tells the program.
            self.program = subprocess.Popen(
                command,
                cwd=code,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            self._create_end({"outcome": "program-failed", "exit_status": 127, "log_tail": f"{command[0]}: {error}"})
            raise SystemExit(0) from None
        self._mark("program-started")
        assert self.program.stdout
        return LogShipper(self.program.stdout, self.store, self.prefix + "logs/")

    def _accompany(self, logs: LogShipper) -> None:
        assert self.program
        beat_every = max(HEARTBEAT_SECONDS / self.clock.speed, SHORTEST_HEARTBEAT_WALL_SECONDS)
        next_beat = 0.0
        while self.program.poll() is None:
            news = self.telemetry.read()
            for event in self.folders.new_events():
                self.telemetry.add(event)
                news = True
            self._pass_on_notice(logs)
            if news or time.monotonic() >= next_beat:
                self._heartbeat()
                logs.ship()
                next_beat = time.monotonic() + beat_every
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.program.wait(TICK_SECONDS)
        self._mark("program-ended")

    def hear(self, notice: Notice) -> None:
        """Remember the strongest notice and show it to the program. Any thread may call."""
        with self._notice_lock:
            if self.notice and STRENGTH[self.notice.kind] >= STRENGTH[notice.kind]:
                return
            self.notice = notice
            staged = self.work / "notice.json.staged"
            staged.write_text(json.dumps(notice.to_json()))
            staged.replace(self.work / "notice.json")
        log.warning("notice kind=%s reclaim_at=%s", notice.kind, notice.reclaim_at)

    def _hear_shutdown(self) -> None:
        # In a thread: this is a signal handler, and the lock may be held by the very thread it interrupted.
        now = self.clock.now()
        notice = Notice(kind="shutdown", reclaim_at=now + timedelta(seconds=SHUTDOWN_SECONDS), seen_at=now)
        threading.Thread(target=self.hear, args=(notice,), daemon=True).start()

    def _pass_on_notice(self, logs: LogShipper) -> None:
        notice, now = self.notice, self.clock.now()
        if notice is None or notice.kind == "rebalance":
            return
        if not self._told_program:
            self._told_program = True
            self._mark("notice", notice_kind=notice.kind, reclaim_at=notice.to_json()["reclaim_at"])
            if not self.telemetry.attached:
                self._signal_program(signal.SIGTERM)  # it does not read the notice file: say it the usual way
            self._heartbeat()
            logs.ship_all()
        if notice.kind != "preemption" and notice.reclaim_at and now > notice.reclaim_at:
            self._kill_program()

    def _end(self, logs: LogShipper) -> None:
        assert self.program
        status = self.program.returncode
        self._signal_program(signal.SIGKILL)  # what it left behind in its group
        self.telemetry.read()
        for event in self.folders.finish():
            self.telemetry.add(event)
        logs.finish(seconds=1.0)
        self._create_end({"outcome": self._outcome(status), "exit_status": status, "log_tail": logs.tail()})

    def _outcome(self, status: int) -> str:
        """Why the program ended. Its exit status alone does not say: many save on SIGTERM and leave with 0."""
        marks = self.telemetry.report["marks"]
        if status in (contract.EXIT_PREEMPTED_COMMITTED, contract.EXIT_PREEMPTED_UNCOMMITTED) or "preempting" in marks:
            return "preempted"
        if self._told_program and "finished" not in marks:
            if (
                not self.telemetry.attached
            ):  # it was sent SIGTERM; if it was done all the same, the next one ends at once
                return "preempted"
            if status in (contract.EXIT_FINISHED, -signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL):
                return "preempted"
        return "finished" if status == contract.EXIT_FINISHED else "program-failed"

    def _create_end(self, ending: dict[str, Any]) -> None:
        ending = {**ending, "at": self.clock.now().isoformat(), "report": self._report()}
        for pause in (0.1, 0.5, 2.0, 5.0, None):
            try:
                self.store.create(self.prefix + "end.json", json.dumps(ending).encode())
                return
            except AlreadyExistsError:
                return
            except TransientError as error:
                log.warning("the ending could not be stored error=%s", error)
                if pause is not None:
                    time.sleep(pause)

    def _report(self) -> dict[str, Any]:
        notice = self.notice.to_json() if self.notice else None
        return {"at": self.clock.now().isoformat(), "notice": notice, **self.telemetry.to_json()}

    def _heartbeat(self) -> None:
        try:
            self.store.put(self.prefix + "heartbeat.json", json.dumps(self._report()).encode())
        except TransientError as error:
            log.warning("heartbeat not stored error=%s", error)

    def _mark(self, kind: str, **fields: Any) -> None:
        self.telemetry.add({"kind": kind, "at": self.clock.now().isoformat(), **fields})

    def _signal_program(self, number: int) -> None:
        if self.program:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.program.pid, number)

    def _kill_program(self) -> None:
        self._signal_program(signal.SIGKILL)

    def _power_off(self) -> None:
        """The main thread did not end the machine in time: the start-up script does, when we are gone."""
        self._kill_program()
        os._exit(70)
