"""What runs the machines of an emulated cloud: the local cloud's own hosts, so that start-up scripts really run.

An emulator answers the API; whatever it launches is started here, served its metadata, taken away by its fate, ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.drivers.local import machine_files as files
from holdfast.drivers.local.catalogue import Dialect
from holdfast.drivers.local.config import Fate
from holdfast.drivers.local.processes import kill_marked
from holdfast.process_identity import lives

SOURCES = Path(__file__).parents[2] / "src"


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """A machine as its host sees it."""

    state: str
    """pending, running, stopping, terminated."""
    reason: str = ""
    """preempted, terminated-by-user, ended-itself, host-failed; empty while it lives."""
    ended_at: datetime | None = None


@dataclass
class MachineHost:
    """All machines of one emulated cloud, below one folder."""

    folder: Path
    dialect: Dialect
    environment: Mapping[str, str] = field(default_factory=dict)
    """What every machine's image has set, such as the emulators' addresses. Never credentials."""
    spot_fates: Sequence[Fate] = ()
    """Spot machine n meets fate n; after the list, machines live on. `refuse` is the emulator's to answer."""
    on_demand_fates: Sequence[Fate] = ()
    notice_seconds: float = 2.0
    """The real ones' 120 s and 30 s, shortened: the tests run by the wall's clock."""
    shutdown_grace_seconds: float = 0.5

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._asked = {"spot": 0, "on-demand": 0}

    def next_fate(self, provisioning_model: str) -> Fate:
        """The fate of the next launch of this model. Ask once for each launch that is no repetition."""
        fates = self.spot_fates if provisioning_model == "spot" else self.on_demand_fates
        number = self._asked[provisioning_model]
        self._asked[provisioning_model] += 1
        return fates[number] if number < len(fates) else Fate()

    def start(
        self,
        machine_id: str,
        *,
        region: str,
        zone: str,
        instance_type: str,
        provisioning_model: str,
        startup_script: str,
        shutdown_script: str = "",
        fate: Fate | None = None,
        name: str = "",
        number: str = "",
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        """Boot the machine; returns at once. The last three are GCP's, for its metadata: name, id, and what was attached."""
        machine = self.folder / machine_id
        machine.mkdir()
        spec: dict[str, Any] = {
            "id": machine_id,
            "name": name,
            "number": number,
            "attributes": dict(attributes or {}),
            "token": machine_id,
            "pool": {
                "cloud": self.dialect,
                "region": region,
                "zone": zone,
                "instance_type": instance_type,
                "provisioning_model": provisioning_model,
            },
            "tags": {},
            "environment": dict(self.environment),
            "startup_script": startup_script,
            "shutdown_script": shutdown_script,
            "launched_at": datetime.now(UTC).isoformat(),
            "clock": "",
            "dialect": self.dialect,
            "notice_seconds": self.notice_seconds,
            "shutdown_grace_seconds": self.shutdown_grace_seconds,
            "fate": (fate or Fate()).model_dump(),
        }
        files.write_json(machine / files.SPEC, spec)
        with open(machine / "host.log", "wb") as output:
            subprocess.Popen(
                [sys.executable, "-m", "holdfast.drivers.local.host", str(machine)],
                cwd=machine,
                env={
                    "PATH": os.environ.get("PATH", ""),
                    "PYTHONPATH": str(SOURCES),
                    "LANG": "C.UTF-8",
                    files.HOST_MARK: machine_id,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def life(self, machine_id: str) -> Life:
        machine = self.folder / machine_id
        host = files.read_json(machine / files.RUNNING)
        end = files.read_json(machine / files.END)
        if end is None and host and not lives(host) and kill_marked(machine_id):
            files.record_end(machine, "host-failed", datetime.now(UTC))
            end = files.read_json(machine / files.END)
        if end:
            return Life(state="terminated", reason=end["reason"], ended_at=datetime.fromisoformat(end["terminated_at"]))
        if (machine / files.TERMINATE).exists():
            return Life(state="stopping")
        return Life(state="running" if host else "pending")

    def terminate(self, machine_id: str) -> None:
        """As the API's call: an orderly shutdown, then power off."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / machine_id / files.TERMINATE).touch()

    def console(self, machine_id: str) -> str:
        path = self.folder / machine_id / files.CONSOLE
        return path.read_text(errors="replace") if path.exists() else ""

    def user_data(self, machine_id: str) -> str:
        return json.loads((self.folder / machine_id / files.SPEC).read_text())["startup_script"]

    def ids(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def stop_all(self) -> None:
        """Ends every machine and every host; what a test started must end with it."""
        for machine_id in self.ids():
            host = files.read_json(self.folder / machine_id / files.RUNNING)
            if host and lives(host):
                self.terminate(machine_id)
        give_up_at = time.monotonic() + 10
        while any(self.life(machine_id).state != "terminated" for machine_id in self.ids()):
            if time.monotonic() > give_up_at:
                for machine_id in self.ids():
                    host = files.read_json(self.folder / machine_id / files.RUNNING)
                    if host and lives(host):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(host["pid"], signal.SIGKILL)
                    kill_marked(machine_id)
                return
            time.sleep(0.02)
