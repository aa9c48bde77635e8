"""Every broker the queues' tests run against: real servers where Debian has them, HTTP emulators of the clouds' own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

STARTING_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Broker:
    url: str
    environment: dict[str, str] = field(default_factory=dict)
    """Of processes that open the URL."""
    restart: Callable[[], None] | None = None
    """Killed without warning and started again over the same files; None: it is no process of its own."""
    back_at_once: bool = False
    """A killed worker's lease comes back when its connection ends, not when its time is over."""
    sees_all_leases: bool = True
    """Depth counts those of other workers."""


@contextmanager
def sqlite(folder: Path) -> Iterator[Broker]:
    yield Broker(f"sqlite://{folder}/queue.db")


@contextmanager
def redis(folder: Path) -> Iterator[Broker]:
    port = free_port()
    words = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    words += ["--appendonly", "yes", "--save", ""]
    with Server(words, port, folder / "redis.log") as server:
        yield Broker(f"redis://127.0.0.1:{port}/0", restart=server.restart)


@contextmanager
def rabbitmq(folder: Path) -> Iterator[Broker]:
    """A node of its own: folder, cookie, ports and port mapper."""
    port, mapper = free_port(), str(free_port())
    environment = {
        "HOME": str(folder),
        "RABBITMQ_CONF_ENV_FILE": str(folder / "none.conf"),
        "RABBITMQ_CONFIG_FILE": str(folder / "none"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "none"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_NODENAME": f"holdfast{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "logs"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2",
        "ERL_EPMD_PORT": mapper,
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }
    try:
        with Server(["/usr/lib/rabbitmq/bin/rabbitmq-server"], port, folder / "rabbitmq.log", environment) as server:
            yield Broker(f"amqp://127.0.0.1:{port}/", restart=server.restart, back_at_once=True, sees_all_leases=False)
    finally:
        # The node started it, and it outlives the node.
        for program in ("epmd", *map(str, Path("/usr/lib/erlang").glob("erts-*/bin/epmd"))):
            with contextlib.suppress(FileNotFoundError):
                subprocess.run([program, "-port", mapper, "-kill"], capture_output=True)


class Server:
    """A program of Debian's that listens on a port of loopback, in a session of its own, ended with its test."""

    def __init__(self, words: list[str], port: int, log: Path, environment: dict[str, str] | None = None) -> None:
        if not shutil.which(words[0]):
            pytest.skip(f"{words[0]} is not installed")
        self._words, self._port, self._log = words, port, log
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Server:
        self._process = self._started()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def restart(self) -> None:
        """Killed without warning, away for a moment, and back when this returns."""
        self.kill()
        time.sleep(0.5)
        self._process = self._started()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self._words,
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        give_up_at = time.monotonic() + STARTING_SECONDS
        while not self._listens():
            if process.poll() is not None or time.monotonic() > give_up_at:
                pytest.fail(f"{self._words[0]} did not start:\n{self._log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        return process

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1.0):
            return True
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


Opener = Callable[[Path], AbstractContextManager[Broker]]
BROKERS: dict[str, Opener] = {"sqlite": sqlite, "redis": redis, "rabbitmq": rabbitmq}


@pytest.fixture(scope="session", params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One server for all tests of a session; each has a queue of its own name."""
    with (
        BROKERS[request.param](tmp_path_factory.mktemp(request.param)) as started,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started
