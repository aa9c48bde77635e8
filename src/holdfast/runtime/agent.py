"""The agent: starts the user's program, hears notices, holds the lease, tells the store, ends the machine."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.clock import Clock, clock_from_environment
from holdfast.errors import AlreadyExistsError, ConfigError, TransientError
from holdfast.runtime import contract, torchrun
from holdfast.runtime.environment import Image, Surroundings, obstore_for, prepare, provide_obstore
from holdfast.runtime.fetch import cloud_time, read_times
from holdfast.runtime.folders import FolderCheckpoints
from holdfast.runtime.logs import LogShipper
from holdfast.runtime.metadata import Notice, own_machine_id
from holdfast.runtime.processes import kill_marked
from holdfast.runtime.telemetry import Telemetry
from holdfast.runtime.watchers import LeaseWatcher, NoticeWatcher, Watcher
from holdfast.storage import open_store

T = TypeVar("T")
log = logging.getLogger(__name__)

TICK_SECONDS = 0.05
HEARTBEAT_SECONDS = 2.0
SHORTEST_HEARTBEAT_WALL_SECONDS = 0.25
LEASE_POLL_SECONDS = 10.0
SHUTDOWN_SECONDS = 25.0
"""An orderly shutdown gives at least so long on every cloud (GCP 30 s, EC2 minutes)."""
PREPARATION_SECONDS = 1800.0
"""One step of the environment's preparation, an image of many gigabytes included, takes no longer (wall seconds)."""
STRENGTH = {"rebalance": 1, "lease": 2, "shutdown": 2, "preemption": 3}


COMMIT_SECONDS = 90.0
"""A program that ended may have left a process behind that makes its last snapshot durable; it is given so long (wall)."""


class Interrupted(Exception):
    """The machine is to go, and no program runs; the words say why none did."""


class Agent:
    def __init__(self, work: Path) -> None:
        """Raises HoldfastError for a store that can't be opened."""
        environment = os.environ
        self.clock: Clock = clock_from_environment()
        self.config: dict[str, Any] = json.loads((work / "agent.json").read_text())
        self.work = work
        self.run_id, self.attempt = environment[contract.RUN], int(environment[contract.ATTEMPT])
        self.obstore = provide_obstore(work, environment[contract.STORE], self.config.get("obstore", ""))
        self.store = open_store(environment[contract.STORE])
        self.leased_attempt = self.attempt
        """A lease of a later one ends this machine."""
        self.prefix = contract.attempt_prefix(self.run_id, self.attempt)
        self.end_key = self.prefix + "end.json"
        self.of_member: dict[str, str] = {}
        if self.attempt == contract.FLEET_ATTEMPT:
            member = own_machine_id(self.clock)
            self.prefix = contract.member_prefix(self.run_id, member)
            self.end_key = contract.member_end_key(self.run_id, member)
            self.of_member = {contract.MEMBER: member, contract.RUN: contract.member_run(self.run_id, member)}
        self.surroundings: Surroundings = Image(sys.executable)
        self._steps = 0
        self._expect_program("", self.of_member.get(contract.RUN, self.run_id), self.attempt)
        self.watchers: list[Watcher] = []
        """They outlive `run`: the lease ends a process that does not."""
        self.notice: Notice | None = None
        self._notice_lock = threading.Lock()
        self._was_heard = False
        self.program: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(FileNotFoundError):
            for kind, wall in read_times(str(work / "boot.times")):
                self.telemetry.add({"kind": kind, "at": cloud_time(wall)})
        self._mark("agent-started")

    def _expect_program(self, mark: str, run_id: str, attempt: int) -> None:
        """What a program that is to be started leaves behind, and is told by; `mark` tells it from an earlier one's."""
        self.telemetry_file = self.work / f"telemetry{mark}.jsonl"
        self.notice_file = self.work / f"notice{mark}.json"
        self.telemetry = Telemetry(self.telemetry_file)
        policy = CheckpointPolicy.from_json(os.environ.get(contract.CHECKPOINT_POLICY, "{}"))
        folder = self.work / f"checkpoints{mark}"
        self.folders = FolderCheckpoints(folder, self.store, run_id, attempt, policy, self.clock)
        self.logs_prefix = f"{self.prefix}logs{mark}/"
        self._told_program = False

    def run(self) -> None:
        """From the program's start to the machine's end. Never raises: what went wrong is in end.json."""
        signal.signal(signal.SIGTERM, lambda *_: self._hear_shutdown())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._watch()
            self._prepare()
            self._carry_out()
        except Interrupted as interruption:
            self._create_end({"outcome": "preempted", "exit_status": None, "log_tail": str(interruption)})
        except ConfigError as error:  # another machine would meet the same: no whole checkpoint, a run of another kind
            log.error("the program can't be started: %s", error)
            self._create_end({"outcome": "program-failed", "exit_status": None, "log_tail": str(error)})
        except Exception as error:
            log.exception("the agent failed")
            self._kill_program()
            self._create_end({"outcome": "lost", "detail": f"the agent failed: {error!r}"})

    def _carry_out(self) -> None:
        logs = self._start_program(self._command())
        self._accompany(logs)
        self._create_end(self._end(logs))

    def _command(self) -> list[str]:
        """The program's arguments; Python's where it is a script or a module."""
        program = self.config["command"]
        processes = torchrun.processes_here(self.config.get("processes_per_machine", 1))
        return program if processes == 1 else torchrun.standalone(processes, program)

    def _watch(self) -> None:
        lease = self.store, self.run_id, self.leased_attempt, self.clock, LEASE_POLL_SECONDS
        self.watchers.append(NoticeWatcher(self.clock, self.config["notice_poll_seconds"], self.hear))
        self.watchers.append(LeaseWatcher(*lease, self.hear, self._power_off))
        for watcher in self.watchers:
            watcher.start()

    def _prepare(self) -> None:
        name = f"holdfast-{self.run_id}-{self.attempt:04d}"
        self.surroundings = prepare(self.work, self.config, name, self._run_step)
        self._mark("environment-ready")
        self._say_environment(f"ready after {self._steps} steps")

    def _say_environment(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a console that is gone
            print(f"holdfast: boot environment {self.clock.now():%FT%TZ} {text}", flush=True)

    def _run_step(self, command: Sequence[str], why: str) -> None:
        """One step of the preparation, which may take minutes: the orchestrator hears of it, and a notice ends it."""
        self._steps += 1
        self._say_environment(shlex.join(command))
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        assert process.stdout
        logs = LogShipper(process.stdout, self.store, f"{self.prefix}environment/{self._steps}-")
        give_up_at, next_beat = time.monotonic() + PREPARATION_SECONDS, 0.0
        try:
            while process.poll() is None:
                self._stop_if_noticed("the environment was not ready yet")
                if time.monotonic() >= give_up_at:
                    raise ConfigError(f"{why}: it took longer than {PREPARATION_SECONDS:.0f} s\n{logs.tail()}")
                if time.monotonic() >= next_beat:
                    with self._noting_refusals():
                        self._heartbeat()
                        logs.ship()
                    next_beat = time.monotonic() + self._beat_every
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(TICK_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            logs.finish(seconds=1.0)
        if process.returncode:
            raise ConfigError(f"{why}: {command[0]} ended with status {process.returncode}\n{logs.tail()}")

    def _stop_if_noticed(self, where: str) -> None:
        notice = self.notice
        if notice and notice.kind != "rebalance":
            self._mark("notice", notice_kind=notice.kind, reclaim_at=notice.to_json()["reclaim_at"])
            raise Interrupted(where)

    @property
    def _beat_every(self) -> float:
        """Wall seconds between heartbeats."""
        return max(HEARTBEAT_SECONDS / self.clock.speed, SHORTEST_HEARTBEAT_WALL_SECONDS)

    def _start_program(self, arguments: Sequence[str]) -> LogShipper:
        code = self.work / "code"
        libraries = [str(code), str(self.work / "lib")]
        if obstore := obstore_for(self.surroundings, self.work, self.obstore):
            libraries.append(obstore)
        variables = {
            **self.config["env"],
            **self._beating_during(self.folders.restore),
            **self.of_member,
            contract.TELEMETRY: str(self.telemetry_file),
            contract.NOTICE: str(self.notice_file),
            "PYTHONPATH": os.pathsep.join(libraries),
            "PYTHONUNBUFFERED": "1",
        }
        command, environment = self.surroundings.start(arguments, self.config["python"], variables)
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
        return LogShipper(self.program.stdout, self.store, self.logs_prefix)

    def _beating_during(self, call: Callable[[], T]) -> T:
        """What `call` returns. Moving a large folder takes longer than a machine may be silent."""
        with ThreadPoolExecutor(1, thread_name_prefix="folder") as pool:
            called = pool.submit(call)
            while not wait([called], timeout=self._beat_every).done:
                with self._noting_refusals():
                    self._heartbeat()
            return called.result()

    def _accompany(self, logs: LogShipper) -> None:
        assert self.program
        next_beat = 0.0
        while self.program.poll() is None:
            news = self.telemetry.read()
            for event in self.folders.new_events():
                self.telemetry.add(event)
                news = True
            self._pass_on_notice(logs)
            self._look_around()
            if news or time.monotonic() >= next_beat:
                with self._noting_refusals():
                    self._heartbeat()
                    logs.ship()
                next_beat = time.monotonic() + self._beat_every
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.program.wait(TICK_SECONDS)
        self._mark("program-ended")

    def _look_around(self) -> None:
        """Once in every round while the program runs."""

    def hear(self, notice: Notice) -> None:
        """Remember the strongest notice and show it to the program. Any thread may call."""
        with self._notice_lock:
            if self.notice and STRENGTH[self.notice.kind] >= STRENGTH[notice.kind]:
                return
            self.notice = notice
            self._show(notice)
        log.warning("notice kind=%s reclaim_at=%s", notice.kind, notice.reclaim_at)

    def _show(self, notice: Notice) -> None:
        staged = self.notice_file.with_suffix(".staged")
        staged.write_text(json.dumps(notice.to_json()))
        staged.replace(self.notice_file)

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
            self._ask_program_to_leave()
            with self._noting_refusals():
                self._heartbeat()
                logs.ship_all()
        if notice.kind != "preemption" and notice.reclaim_at and now > notice.reclaim_at:
            self._kill_program()

    def _end(self, logs: LogShipper) -> dict[str, Any]:
        """Of a program that has ended: clear up behind it, commit what it left; how it ended."""
        assert self.program
        self._beating_during(lambda: await_commits(self.work / contract.PERSISTING_LOCK, COMMIT_SECONDS))
        self._kill_program()  # what it left behind
        self.telemetry.read()
        for event in self._beating_during(self.folders.finish):
            self.telemetry.add(event)
        with self._noting_refusals():
            logs.finish(seconds=1.0)
        status = self.program.returncode
        return {"outcome": self._outcome(status), "exit_status": status, "log_tail": logs.tail()}

    def _ask_program_to_leave(self) -> None:
        """One that is attached reads the notice file; to others it is said the usual way."""
        if not self.telemetry.attached:
            self._signal_program(signal.SIGTERM)

    def _outcome(self, status: int) -> contract.Outcome:
        """Why the program ended. Its exit status alone does not say: many save on SIGTERM and leave with 0."""
        marks = self.telemetry.report["marks"]
        if status in (contract.EXIT_PREEMPTED_COMMITTED, contract.EXIT_PREEMPTED_UNCOMMITTED) or "preempting" in marks:
            return "preempted"
        if self._told_program and "finished" not in marks:
            if (
                not self.telemetry.attached
            ):  # it was sent SIGTERM; if it was done all the same, the next one ends at once
                return "preempted"
            if status in (
                contract.EXIT_FINISHED,
                -signal.SIGTERM,
                128 + signal.SIGTERM,
                -signal.SIGKILL,
                128 + signal.SIGKILL,
            ):
                return "preempted"
        return "finished" if status == contract.EXIT_FINISHED else "program-failed"

    def _create_end(self, ending: dict[str, Any]) -> None:
        ending = {**ending, "at": self.clock.now().isoformat(), "report": self._report()}
        for pause in (0.1, 0.5, 2.0, 5.0, None):
            try:
                self.store.create(self.end_key, json.dumps(ending).encode())
                return
            except AlreadyExistsError:
                return
            except (TransientError, ConfigError) as error:
                log.warning("the ending could not be stored error=%s", error)
                if pause is not None:
                    time.sleep(pause)

    def _report(self) -> dict[str, Any]:
        notice = self.notice.to_json() if self.notice else None
        return {"at": self.clock.now().isoformat(), "notice": notice, **self.telemetry.to_json()}

    def _heartbeat(self) -> None:
        try:
            self.store.put(self.prefix + "heartbeat.json", json.dumps(self._report()).encode())
            self._was_heard = True
        except TransientError as error:
            log.warning("heartbeat not stored error=%s", error)

    @contextlib.contextmanager
    def _noting_refusals(self) -> Iterator[None]:
        """A store that refuses what it took before ends no training: the right may come back, and the work is kept till
        then. One that refuses from the start would make every step worthless.
        """
        try:
            yield
        except ConfigError as error:
            if not self._was_heard:
                raise
            log.warning("the store refuses what it took before error=%s", error)

    def _mark(self, kind: str, **fields: Any) -> None:
        self.telemetry.add({"kind": kind, "at": self.clock.now().isoformat(), **fields})

    def _signal_program(self, number: int) -> None:
        if self.program:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.program.pid, number)

    def _kill_program(self) -> None:
        self.surroundings.kill()
        self._signal_program(signal.SIGKILL)
        if self.program and torchrun.MODULE in self.program.args:
            kill_marked(contract.TELEMETRY, str(self.telemetry_file))

    def _power_off(self) -> None:
        """The main thread did not end the machine in time: the start-up script does, when we are gone."""
        self._kill_program()
        os._exit(70)


def await_commits(lock: Path, seconds: float) -> bool:
    """Until no process is making a snapshot durable any more; False when one still is after so long."""
    if not lock.exists():
        return True
    give_up_at = time.monotonic() + seconds
    with open(lock, "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > give_up_at:
                    return False
            time.sleep(TICK_SECONDS)
