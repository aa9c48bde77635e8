"""Every broker the queues' tests run against: real servers where Debian has them, HTTP emulators of the clouds' own."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import moto.sqs.models as sqs_models
import pytest

from tests.emulated.gcs import GcsEmulator
from tests.emulated.object_stores import ACCESS_KEY, REGION, SECRET_KEY, S3Emulator
from tests.emulated.pubsub import PubSubEmulator

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
    is_slow: bool = False
    """An emulator that takes a hundredth of a second of processor time for a request."""


@contextmanager
def sqlite(folder: Path) -> Iterator[Broker]:
    yield Broker(f"sqlite://{folder}/queue.db")


@contextmanager
def redis(folder: Path) -> Iterator[Broker]:
    port = free_port()
    words = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    # `everysec` answers before it has written while a flush is under way: a kill on a busy disk would lose that.
    words += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
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
        "ERL_EPMD_RELAXED_COMMAND_CHECK": "1",  # it may be ended though it has not noticed yet that the node is gone
    }
    try:
        with Server(["/usr/lib/rabbitmq/bin/rabbitmq-server"], port, folder / "rabbitmq.log", environment) as server:
            yield Broker(f"amqp://127.0.0.1:{port}/", restart=server.restart, back_at_once=True, sees_all_leases=False)
    finally:
        # The node started it, and it outlives the node.
        for program in ("epmd", *map(str, Path("/usr/lib/erlang").glob("erts-*/bin/epmd"))):
            with contextlib.suppress(FileNotFoundError):
                subprocess.run([program, "-port", mapper, "-kill"], capture_output=True)


@contextmanager
def sqs(folder: Path) -> Iterator[Broker]:
    with SqsEmulator() as emulator:
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        yield Broker(f"sqs://{REGION}/?endpoint={emulator.endpoint}", keys, is_slow=True)


class SqsEmulator(S3Emulator):
    """moto's, one request at a time, so that of two workers one has a message; it can't wait, then."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[str] = set()
        served = self._server.app

        def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            self.calls.add(environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2])
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = re.sub(rb'"WaitTimeSeconds": *\d+', b'"WaitTimeSeconds":0', body)
            environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
            return served(environ, start_response)

        self._server.app = app

    def __enter__(self) -> SqsEmulator:
        # For every message that it hands out, moto counts all that it has, by several looks at the clock each.
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(sqs_models, "unix_time", time.time)
        self._patch.setattr(sqs_models, "unix_time_millis", lambda: time.time() * 1000)
        self._patch.setattr(sqs_models.SQSBackend, "is_message_valid_based_on_retention_period", lambda *_: True)
        super().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._patch.undo()


@contextmanager
def folder_store(folder: Path) -> Iterator[Broker]:
    yield Broker(f"store+file://{folder}/store")


@contextmanager
def s3_store(folder: Path) -> Iterator[Broker]:
    with S3Emulator("queues") as emulator:
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        yield Broker(f"store+{emulator.url('queues', 'team a')}", keys, is_slow=True)


@contextmanager
def gcs_store(folder: Path) -> Iterator[Broker]:
    with GcsEmulator("queues") as emulator:
        # A person's own credentials would come before the machine's.
        environment = {"GCE_METADATA_HOST": emulator.host, "HOME": str(folder), "GOOGLE_APPLICATION_CREDENTIALS": ""}
        yield Broker(f"store+{emulator.url('queues', 'team a')}", environment, is_slow=True)


@contextmanager
def pubsub(folder: Path) -> Iterator[Broker]:
    if theirs := os.environ.get("HOLDFAST_TEST_PUBSUB"):
        yield Broker(f"pubsub://holdfast-test/?endpoint=http://{theirs}", sees_all_leases=False, is_slow=True)
        return
    with PubSubEmulator() as emulator:
        yield Broker(
            f"pubsub://holdfast-test/?endpoint=http://127.0.0.1:{emulator.port}", sees_all_leases=False, is_slow=True
        )


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
BROKERS: dict[str, Opener] = {
    "sqlite": sqlite,
    "redis": redis,
    "rabbitmq": rabbitmq,
    "sqs": sqs,
    "folder": folder_store,
    "s3": s3_store,
    "gcs": gcs_store,
    "pubsub": pubsub,
}


GROUPED = {name: pytest.param(name, marks=pytest.mark.xdist_group(f"broker-{name}")) for name in BROKERS}
"""A server is started by one process of the tests."""


@pytest.fixture(scope="session", params=GROUPED.values())
def started_broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One server for all tests of a session."""
    with BROKERS[request.param](tmp_path_factory.mktemp(request.param)) as started:
        yield started


@pytest.fixture
def broker(started_broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Broker:
    """Each test has a queue of its own name at it."""
    for name, value in started_broker.environment.items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    return started_broker
