"""A Prefect server of our own, on loopback, for people who have none: its data lives in .holdfast/prefect."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.errors import ConfigError

HOME = Path(".holdfast/prefect")
START_SECONDS = 300.0
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}


@contextmanager
def prefect_server(port: int | None = None) -> Iterator[str]:
    """The URL of a Prefect API: the configured one, or that of a server that lives as long as the context."""
    if url := os.environ.get("PREFECT_API_URL"):
        yield url.removesuffix("/api")
        return
    port = port or _free_port()
    url = f"http://127.0.0.1:{port}"
    home = HOME.absolute()
    home.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        **QUIET,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
    }
    os.environ.update({name: environment[name] for name in (*QUIET, "PREFECT_HOME", "PREFECT_API_URL")})
    log = open(home / "server.log", "wb")  # noqa: SIM115 (the server writes to it for as long as it lives)
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the flow first, which still needs its server to publish
    )
    log.close()
    try:
        _wait_until_healthy(server, port, home / "server.log")
        yield url
    finally:
        _send_what_waits()
        _stop(server)


def _send_what_waits() -> None:
    """Logs and events leave in the background; without their server they would be lost, and said to be so at length."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5)


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at:
        if server.poll() is not None:
            break
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/api/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise ConfigError(f"the Prefect server did not come up on port {port}; the end of {log}:\n{tail}")


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(15)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
