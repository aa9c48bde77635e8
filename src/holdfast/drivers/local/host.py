"""`python -m holdfast.drivers.local.host FOLDER`: what holds one machine, as a hypervisor holds a virtual one.

It outlives the orchestrator. It starts the start-up script in a process group of its own, serves the metadata, lets
the machine meet its fate, and leaves no process behind. Imports are few: its start is on the way of every recovery.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from holdfast.clock import Clock, clock_from_text
from holdfast.drivers.local import machine_files as files
from holdfast.drivers.local.metadata import Facts, serve
from holdfast.drivers.local.processes import kill_marked
from holdfast.process_identity import identify

log = logging.getLogger(__name__)

TICK_SECONDS = 0.01
PR_SET_CHILD_SUBREAPER = 36


class Host:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec: dict[str, Any] = json.loads((folder / files.SPEC).read_text())
        self.clock: Clock = clock_from_text(self.spec["clock"])
        self.fate: dict[str, Any] = self.spec["fate"]
        self.facts = Facts(
            machine_id=self.spec["id"],
            dialect=self.spec["dialect"],
            zone=self.spec["pool"]["zone"],
            region=self.spec["pool"]["region"],
            instance_type=self.spec["pool"]["instance_type"],
            user_data=self.spec["startup_script"],
            name=self.spec.get("name", ""),
            number=self.spec.get("number", ""),
            attributes={
                "startup-script": self.spec["startup_script"],
                "shutdown-script": self.spec["shutdown_script"],
                "life-cycle": self.spec["pool"]["provisioning_model"],
                **self.spec.get("attributes", {}),
            },
        )
        self._console_offset = 0
        self._terminate = threading.Event()

    def run(self) -> None:
        if self._given_up():
            return
        _adopt_orphans()
        signal.signal(signal.SIGTERM, lambda *_: self._terminate.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server = serve(self.facts)
        environment = self._environment(server.server_address[1])
        script = self.folder / "startup.sh"
        script.write_text(self.spec["startup_script"])
        with open(self.folder / files.CONSOLE, "ab") as console:
            self.machine = subprocess.Popen(
                ["bash", str(script)],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._environment_of_machine = environment
        files.write_json(self.folder / files.RUNNING, identify(os.getpid()))
        reason = self._live()
        while not kill_marked(self.spec["id"], self.machine.pid):
            log.error("processes are left that can't be ended machine=%s", self.spec["id"])
        files.record_end(self.folder, reason, self.clock.now())

    def _live(self) -> str:
        """Until the machine is over; why it is."""
        due_at: float | None = None
        reclaim_at: datetime | None = None
        while True:
            if self.machine.poll() is not None:
                return "preempted" if reclaim_at else "ended-itself"
            if self._given_up():
                return "host-failed"
            if self._terminate.is_set() or (self.folder / files.TERMINATE).exists():
                return self._shut_down(preempted=reclaim_at is not None)
            if reclaim_at is None:
                if due_at is None and self._is_due():
                    due_at = time.monotonic() + self.fate["delay_seconds"]
                if due_at is not None and time.monotonic() >= due_at:
                    if not self.fate["notice"]:
                        return "preempted"
                    reclaim_at = self._announce()
            elif self.clock.now() >= reclaim_at:
                return "preempted"
            time.sleep(TICK_SECONDS)

    def _given_up(self) -> bool:
        """Has a driver recorded this machine's end? It does when a host takes too long to come up."""
        return (self.folder / files.END).exists()

    def _is_due(self) -> bool:
        fate, age = self.fate, (self.clock.now() - self._launched_at).total_seconds()
        after = fate["after_seconds"]
        early = fate["rebalance_seconds_before"]
        if after is not None:
            if early is not None and age >= after - early and not self.facts.rebalance_at:
                self.facts.change(rebalance_at=self.clock.now())
            return age >= after
        if fate["at_step"] is None and fate["in_phase"] is None:
            return False
        for line in self._new_console_lines():
            if fate["at_step"] is not None:
                found = re.match(r"holdfast: step (\d+)", line)
                if found and int(found[1]) >= fate["at_step"]:
                    return True
            else:
                found = re.match(rf"holdfast: phase {fate['in_phase']} (\d+)", line)
                if found and int(found[1]) >= fate["after_step"]:
                    return True
        return False

    @property
    def _launched_at(self) -> datetime:
        return datetime.fromisoformat(self.spec["launched_at"])

    def _new_console_lines(self) -> list[str]:
        path = self.folder / files.CONSOLE
        if path.stat().st_size <= self._console_offset:
            return []
        with open(path, "rb") as console:
            console.seek(self._console_offset)
            data = console.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._console_offset += len(whole)
        return whole.decode(errors="replace").splitlines()

    def _announce(self) -> datetime:
        reclaim_at = self.clock.now() + timedelta(seconds=self.spec["notice_seconds"])
        self.facts.change(reclaim_at=reclaim_at)
        if self.facts.dialect == "gcp" and self.spec["shutdown_script"]:
            with open(self.folder / files.CONSOLE, "ab") as console:
                subprocess.Popen(
                    ["bash", "-c", self.spec["shutdown_script"]],
                    cwd=self.folder,
                    env=self._environment_of_machine,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # it ends with the machine all the same: it carries the mark
                )
        return reclaim_at

    def _shut_down(self, preempted: bool) -> str:
        """As a cloud does it: the system is asked to stop, and switched off when it takes too long."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.machine.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.machine.wait(self.spec["shutdown_grace_seconds"])
        return "preempted" if preempted else "terminated-by-user"

    def _environment(self, port: int) -> dict[str, str]:
        address = f"127.0.0.1:{port}"
        aws = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{address}/", "AWS_EC2_METADATA_V1_DISABLED": "true"}
        gcp = {
            "GCE_METADATA_HOST": address,
            "GCE_METADATA_IP": address,
            "HOLDFAST_NOTICE_SECONDS": str(self.spec["notice_seconds"]),
        }
        home = self.folder / "home"
        temporary = self.folder / "tmp"
        home.mkdir(exist_ok=True)
        temporary.mkdir(exist_ok=True)
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "LANG": "C.UTF-8",
            "HOLDFAST_CLOCK": self.spec["clock"],
            "HOLDFAST_CONSOLE": str(self.folder / files.CONSOLE),
            "HOLDFAST_POWER_OFF": "true",
            "HOLDFAST_PYTHON": sys.executable,
            files.MARK: self.spec["id"],
            **(aws if self.facts.dialect == "aws" else gcp),
            **self.spec["environment"],
        }


def _adopt_orphans() -> None:
    """Become the parent of what daemonises itself below us, so that it can be found and ended (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    Host(Path(sys.argv[1])).run()
