"""Asking the model server whether it is well, and answering the load balancer that asks the machine."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HEALTH_PATH = "/healthz"
"""What load balancers ask for at a machine's health port."""
PROBE_SECONDS = 0.5
PROBE_TIMEOUT_SECONDS = 5.0
FAILURES_IN_A_ROW = 3
"""One probe that a busy server did not answer is no illness."""


class Prober(threading.Thread):
    """Asks the server of this machine again and again (wall seconds)."""

    def __init__(self, port: int, path: str) -> None:
        super().__init__(name="health-prober", daemon=True)
        self._port, self._path = port, path
        self._failures = FAILURES_IN_A_ROW
        self._stopped = threading.Event()
        self.said = "it has not answered yet"
        self.healthy_since: float | None = None
        """On the monotonic clock; None: it is not healthy."""
        self.ill_since = time.monotonic()
        self.in_a_probe = False
        """Its own connection is no request in flight."""

    def run(self) -> None:
        while not self._stopped.wait(PROBE_SECONDS):
            self.in_a_probe = True
            problem = self._problem()
            self.in_a_probe = False
            self._failures = self._failures + 1 if problem else 0
            if not problem:
                self.healthy_since = self.healthy_since or time.monotonic()
            elif self._failures >= FAILURES_IN_A_ROW:
                if self.healthy_since:
                    self.healthy_since, self.ill_since = None, time.monotonic()
                self.said = problem

    def stop(self) -> None:
        self._stopped.set()

    def _problem(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PROBE_TIMEOUT_SECONDS)
        try:
            connection.request("GET", self._path, headers={"Connection": "close"})
            response = connection.getresponse()
            response.read()
            return "" if 200 <= response.status < 300 else f"{self._path} answered {response.status}"
        except (OSError, http.client.HTTPException) as error:
            return f"{self._path} did not answer: {error!r}"
        finally:
            connection.close()


def answer_health(address: str, port: int, verdict: Callable[[], tuple[bool, str]]) -> ThreadingHTTPServer:
    """Answer the load balancer's health checks from threads of its own. Raises OSError when the port is taken."""

    class Page(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != HEALTH_PATH:
                return self._answer(404, f"the health check is at {HEALTH_PATH}")
            well, words = verdict()
            self._answer(200 if well else 503, words)

        do_HEAD = do_GET

        def _answer(self, status: int, words: str) -> None:
            data = f"{words}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            return

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A load balancer that hangs up after the first line is no error."""

    server = Server((address, port), Page)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="health-page", daemon=True).start()
    return server
