"""haproxy as the load balancer: replicas come and go over its runtime API, without a reload.

Source: https://docs.haproxy.org/2.6/management.html#9.3
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from holdfast.drivers.protocol import CapacityPool
from holdfast.errors import ConfigError, HoldfastError, TransientError
from holdfast.model import Haproxy
from holdfast.process_identity import identify, lives
from holdfast.serving.balancer import Endpoint, Standing
from holdfast.serving.health import HEALTH_PATH

ANSWER_SECONDS = 5.0
START_SECONDS = 20.0
CHECK = "check inter 500ms fall 1 rise 1"
"""A notice takes a replica out within half a second, also while no orchestrator lives."""
OLDEST = (2, 6)
DYNAMIC_ALGORITHMS = ("roundrobin", "leastconn", "random", "static-rr")

CONFIGURATION = """\
global
    stats socket {socket} mode 600 level admin
defaults
    mode http
    timeout connect 2s
    timeout client 1h
    timeout server 1h
    timeout check 2s
    timeout http-keep-alive 1m
    retries 3
    option redispatch 1
    # A connection to a replica is a request in flight on it, and nothing else: so it knows when it may stop.
    option http-server-close
frontend {backend}-in
    bind {listen}
    default_backend {backend}
backend {backend}
    balance leastconn
    option httpchk
    http-check send meth GET uri {path}
    http-check expect status 200
"""


class HaproxyBalancer:
    """Implements `holdfast.serving.balancer.LoadBalancer`."""

    def __init__(self, config: Haproxy, run_id: str, store_url: str) -> None:
        self._config = config
        self._backend = config.backend
        self._is_ours = not config.socket
        self._run_id, self._store_url = run_id, store_url
        self._id = hashlib.sha256(f"{store_url}\n{run_id}".encode()).hexdigest()[:16]
        self._socket = config.socket or str(_own_folder() / f"{self._id}.sock")

    def check(self, pools: Sequence[CapacityPool]) -> None:
        if not self._is_ours:
            try:
                self._check_theirs()
            except TransientError as error:
                raise ConfigError(
                    f"load_balancer.socket: no haproxy answers at {self._socket!r}: {error}; start it with `stats socket "
                    "... level admin`, or leave it empty"
                ) from error
            return
        program = shutil.which("haproxy")
        if not program:
            raise ConfigError(
                "load_balancer: no haproxy on the path; install the package haproxy, or name the socket of one that runs"
            )
        said = subprocess.run([program, "-v"], capture_output=True, text=True).stdout
        _insist_on_version(said.split()[2] if len(said.split()) > 2 else said, "load_balancer")
        if not self._answers():
            _insist_on_free(self._config.listen)

    def _check_theirs(self) -> None:
        version = next((line.split(":")[1] for line in self._ask("show info").splitlines() if "Version:" in line), "")
        _insist_on_version(version.strip(), "load_balancer.socket")
        names = self._ask("show backend").splitlines()
        if self._backend not in names:
            known = ", ".join(name for name in names if name and not name.startswith("#"))
            raise ConfigError(f"load_balancer.backend: haproxy has no {self._backend!r}; it has {known}")

    def open(self) -> None:
        if not self._is_ours or self._answers():
            return
        folder = Path(self._socket).parent
        process = _process_of(folder / f"{self._id}.json")
        if process and lives(process):  # a second one would share its port
            raise TransientError(f"haproxy, process {process['pid']}, lives and does not answer at {self._socket}")
        path = folder / f"{self._id}.cfg"
        path.write_text(
            CONFIGURATION.format(
                socket=self._socket, listen=self._config.listen, backend=self._backend, path=HEALTH_PATH
            )
        )
        record = {"run": self._run_id, "store": self._store_url}
        (folder / f"{self._id}.json").write_text(json.dumps(record))  # first: what is started is known to the reaper
        # A daemon: it goes on serving when the orchestrator dies, and whoever takes the run up finds it by its socket.
        started = subprocess.run(
            ["haproxy", "-D", "-f", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            timeout=START_SECONDS,
        )
        if started.returncode:
            raise ConfigError(
                f"load_balancer.listen {self._config.listen!r}: haproxy does not start:\n{started.stdout}"
            )
        give_up_at = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > give_up_at:
                raise TransientError(f"haproxy was started, and does not answer at {self._socket}")
            time.sleep(0.05)
        record["process"] = identify(_pid_at(self._socket))
        (folder / f"{self._id}.json").write_text(json.dumps(record))

    def register(self, endpoint: Endpoint) -> None:
        name = f"{self._backend}/{endpoint.machine}"
        where = f"{endpoint.address}:{endpoint.port}"
        said = self._ask(f"add server {name} {where} {CHECK} port {endpoint.health_port}")
        if "registered" not in said and "exists" not in said:
            raise ConfigError(f"load_balancer: haproxy does not take {name} in: {said}")
        self._ask(f"enable health {name}")
        self._ask(f"set server {name} state ready")

    def drain(self, endpoint: Endpoint) -> None:
        self._ask(f"set server {self._backend}/{endpoint.machine} state drain")

    def remove(self, endpoint: Endpoint) -> None:
        name = f"{self._backend}/{endpoint.machine}"
        self._ask(f"set server {name} state maint")
        self._ask(f"shutdown sessions server {name}")
        said = self._ask(f"del server {name}")
        if "deleted" not in said and "No such server" not in said:
            raise TransientError(f"haproxy does not let go of {name}: {said}")

    def standings(self) -> dict[str, Standing]:
        rows = self._ask(f"show stat {self._backend} 4 -1")
        return {
            row["svname"]: Standing(state=_state_of(row["status"]), in_flight=int(row["scur"] or 0))
            for row in csv.DictReader(rows.removeprefix("# ").splitlines())
        }

    def close(self) -> None:
        if self._is_ours:
            end_own(Path(self._socket).with_suffix(".json"))

    # -- the runtime API ----------------------------------------------------------------------------------------------

    def _answers(self) -> bool:
        with contextlib.suppress(HoldfastError):
            return bool(self._ask("show info"))
        return False

    def _ask(self, command: str) -> str:
        return ask(self._socket, command)


def ask(where: str, command: str) -> str:
    """Of the runtime API. Raises TransientError when no haproxy answers."""
    family, address = _address_of(where)
    try:
        with socket.socket(family) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(address)
            connection.sendall(f"{command}\n".encode())
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode(errors="replace").strip()
    except OSError as error:
        raise TransientError(f"haproxy at {where} does not answer: {error}") from error


def _pid_at(where: str) -> int:
    """Raises TransientError when no haproxy answers."""
    lines = dict(line.split(": ", 1) for line in ask(where, "show info").splitlines() if ": " in line)
    return int(lines["Pid"])


# -- those that we have started ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OwnHaproxy:
    """One that a run of this user started on this computer, whether or not it still runs."""

    run_id: str
    store_url: str
    record: Path


def own_haproxies() -> list[OwnHaproxy]:
    found = []
    for path in sorted(_own_folder().glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # it is being written, or ended, at this moment
            record = json.loads(path.read_text())
            found.append(OwnHaproxy(record["run"], record["store"], path))
    return found


def _process_of(record: Path) -> dict[str, Any] | None:
    """None where there is no record, or where its writer died before it could say which process it was."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(record.read_text()).get("process")
    return None


def end_own(record: Path) -> None:
    """End the haproxy that this record is of, if it runs, and forget it. Raises TransientError when it does not end."""
    own_socket = record.with_suffix(".sock")
    process = _process_of(record)
    if process is None:  # whoever started it died before it could write down which process it was
        with contextlib.suppress(TransientError, psutil.NoSuchProcess, KeyError):
            process = identify(_pid_at(str(own_socket)))
    if process and lives(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process["pid"], signal.SIGTERM)
        give_up_at = time.monotonic() + START_SECONDS
        while lives(process):
            if time.monotonic() > give_up_at:
                raise TransientError(f"haproxy, process {process['pid']}, does not end")
            time.sleep(0.05)
    for path in (own_socket, record.with_suffix(".cfg"), record):
        path.unlink(missing_ok=True)


def _address_of(text: str) -> tuple[socket.AddressFamily, Any]:
    host, _, port = text.rpartition(":")
    if "/" not in text and port.isdigit():
        return socket.AF_INET, (host or "127.0.0.1", int(port))
    return socket.AF_UNIX, text


def _state_of(status: str) -> Any:
    """Of haproxy's words, such as `UP`, `UP 1/2`, `DOWN (agent)`, `MAINT`, `DRAIN`, `NOLB`, `no check`."""
    word = status.split()[0] if status else ""
    if word in ("DRAIN", "MAINT", "NOLB"):
        return "draining"
    return "down" if word == "DOWN" else "up"


def _insist_on_version(version: str, field: str) -> None:
    numbers: Sequence[str] = version.split("-")[0].split(".")
    if len(numbers) < 2 or not all(one.isdigit() for one in numbers[:2]):
        raise ConfigError(f"{field}: haproxy tells no version that is known: {version!r}")
    if (int(numbers[0]), int(numbers[1])) < OLDEST:
        raise ConfigError(
            f"{field}: haproxy {version} can't be told of new servers while it runs; {OLDEST[0]}.{OLDEST[1]} or newer can"
        )


def _insist_on_free(listen: str) -> None:
    host, _, port = listen.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host if host not in ("", "*") else "0.0.0.0", int(port)))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"load_balancer.listen: {listen!r} can't be had: {error}; choose another port") from error


def _own_folder() -> Path:
    """For sockets: short, because a socket's path may have 107 characters, and the same for every process of this user."""
    folder = Path(tempfile.gettempdir()) / f"holdfast-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise ConfigError(f"{folder} is another user's; set TMPDIR to a folder of your own")
    return folder
