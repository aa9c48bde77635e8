"""An HTTP proxy in front of an emulator that does to requests what networks and busy clouds do.

    with Wire(emulator.endpoint) as wire:
        client = boto3.client("ec2", endpoint_url=wire.url)
        wire.inject("lost", when=lambda request: request.action == "RunInstances")
        ...
        assert wire.calls()["RunInstances"] == 2

It keeps the Host header, so that signatures and the URLs in answers stay those of the proxy.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

Kind = Literal["throttle", "error", "reset", "lost", "cut", "slow"]
"""throttle: told to slow down; error: HTTP 500; reset: the connection is reset before the request reaches the cloud;
lost: the request takes effect, then the connection is reset; cut: it is reset in the middle of the answer's body; slow:
the answer comes late."""

KEPT_BODY_BYTES = 65_536
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}


@dataclass(slots=True)
class Request:
    """`service` and `action` as the provider names them: ec2 RunInstances, s3 PutObject, compute instances.insert."""

    method: str
    path: str
    """With its query."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    """Whole for the predicate of a fault; of a recorded request the first 64 KB."""
    service: str
    action: str
    at: float
    """`time.monotonic()` when it had arrived."""
    fault: str = ""
    """What was done to it."""
    status: int = 0
    """What was answered; 0 when nothing was."""

    @property
    def key(self) -> str:
        """The path without its query, decoded."""
        return unquote(urlsplit(self.path).path)


@dataclass(slots=True, kw_only=True)
class Fault:
    kind: Kind
    when: Callable[[Request], bool]
    left: float
    seconds: float
    status: int
    body: bytes | None
    hits: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    headers: Iterable[tuple[str, str]] = field(default=())


class Wire:
    """Listens at `url` on 127.0.0.1 and hands every request on to `upstream_url`, unless a fault takes it."""

    def __init__(
        self,
        upstream_url: str,
        *,
        probability: float = 0.0,
        seed: int = 0,
        kinds: Iterable[Kind] = ("throttle", "error", "reset", "lost"),
    ) -> None:
        """Of all requests the share `probability` meets one of `kinds`, drawn by `seed`; more by `inject`."""
        upstream = urlsplit(upstream_url)
        self._upstream = (upstream.hostname or "127.0.0.1", upstream.port or 80)
        self._prefix = upstream.path.rstrip("/")
        self.probability, self.kinds = probability, tuple(kinds)
        self.requests: list[Request] = []
        self._random, self._faults, self._lock = random.Random(seed), list[Fault](), threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="wire").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.hang_up()

    def hang_up(self) -> None:
        """On every connection."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def inject(
        self,
        kind: Kind,
        *,
        when: Callable[[Request], bool] = lambda request: True,
        count: float = 1,
        seconds: float = 1.0,
        status: int = 0,
        body: bytes | None = None,
    ) -> Fault:
        """Do `kind` to the next `count` requests that `when` picks (`math.inf`: to all). Its `hits` counts them.

        `when` is asked under a lock: it must not call through this wire. `seconds` is the delay of `slow`; `status` and `body` replace what the provider says by itself to
        `throttle` and `error`. With a `status`, `lost` is an HTTP 500 after the effect instead of a reset.
        """
        fault = Fault(kind=kind, when=when, left=count, seconds=seconds, status=status, body=body)
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()
            self.probability = 0.0

    def calls(self) -> Counter[str]:
        """How often each action was asked for, faulty answers included."""
        return Counter(request.action for request in list(self.requests))

    def _fault_for(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.left > 0 and fault.when(request):
                    fault.left -= 1
                    fault.hits += 1
                    return fault
            if self.probability and self._random.random() < self.probability:
                kind = self._random.choice(self.kinds)
                return Fault(kind=kind, when=lambda _: True, left=0, seconds=1.0, status=0, body=None, hits=1)
        return None

    def _forward(self, request: Request) -> Answer:
        # A connection for each request: on one that is kept, a request could meet the upstream's closing of it.
        upstream = http.client.HTTPConnection(*self._upstream, timeout=300)
        try:
            upstream.putrequest(request.method, self._prefix + request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name not in HOP_BY_HOP and name != "content-length":
                    upstream.putheader(name, value)
            if request.body or "content-length" in request.headers or request.method in ("POST", "PUT", "PATCH"):
                upstream.putheader("content-length", str(len(request.body)))
            upstream.putheader("connection", "close")
            upstream.endheaders(request.body or None)
            response = upstream.getresponse()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP]
            return Answer(response.status, response.read(), headers)
        finally:
            upstream.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what these tests are about."""


def _handler_of(wire: Wire) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            wire._connections.add(self.connection)

        def finish(self) -> None:
            wire._connections.discard(self.connection)
            super().finish()

        def handle_any(self) -> None:
            body = self._body()
            headers = {name.lower(): value for name, value in self.headers.items()}
            service, action = name_of(self.command, self.path, headers, body)
            request = Request(self.command, self.path, headers, body, service, action, time.monotonic())
            fault = wire._fault_for(request)
            request.fault = fault.kind if fault else ""
            wire.requests.append(request)
            answer = self._answer(request, fault)
            request.body = body[:KEPT_BODY_BYTES]
            if answer is None:
                self._reset()
            else:
                request.status = answer.status
                self._send(answer, cut=request.fault == "cut")

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = do_OPTIONS = handle_any

        def _answer(self, request: Request, fault: Fault | None) -> Answer | None:
            match fault.kind if fault else None:
                case "throttle" | "error" as kind:
                    assert fault
                    answer = refusal(kind, request)
                    body = answer.body if fault.body is None else fault.body
                    return Answer(fault.status or answer.status, body, answer.headers)
                case "reset":
                    return None
                case "slow":
                    assert fault
                    time.sleep(fault.seconds)
                case "lost":
                    wire._forward(request)
                    return refusal("error", request) if fault and fault.status else None
            try:
                return wire._forward(request)
            except OSError:  # the emulator is gone: so is the connection
                return None

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                pieces = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    pieces.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():  # trailers
                    pass
                return b"".join(pieces)
            return self.rfile.read(int(self.headers.get("content-length", 0)))

        def _send(self, answer: Answer, cut: bool) -> None:
            lines = [f"HTTP/1.1 {answer.status} {http.client.responses.get(answer.status, '')}"]
            lines += [f"{name}: {value}" for name, value in answer.headers if name.lower() != "content-length"]
            size = next((value for name, value in answer.headers if name.lower() == "content-length"), None)
            if self.command != "HEAD" or size is None:
                size = str(len(answer.body))
            if answer.status not in (204, 304):
                lines.append(f"Content-Length: {size}")
            body = b"" if self.command == "HEAD" else answer.body
            data = "\r\n".join([*lines, "", ""]).encode("latin-1") + body
            if not cut:
                self.wfile.write(data)
                return
            self.wfile.write(data[: len(data) - max(1, len(body) // 2)])
            time.sleep(0.05)  # what is on its way when a connection is reset may be thrown away
            self._reset()

        def _reset(self) -> None:
            # Lingering for no time makes close() send RST; detaching first, or Python waits for its own files.
            self.close_connection = True
            wire._connections.discard(self.connection)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


# -- what a request is called -----------------------------------------------------------------------------------------

REST_VERBS = {"GET": "get", "DELETE": "delete", "PATCH": "patch", "PUT": "update"}


def name_of(method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[str, str]:
    """(service, action). AWS's form field and X-Amz-Target, S3's REST verbs, Compute Engine's and GCS's; else the method."""
    parts = urlsplit(path)
    signed = re.search(r"Credential=[^/]*/[^/]*/[^/]*/([^/]*)/aws4_request", headers.get("authorization", ""))
    service = signed[1] if signed else ""
    if target := headers.get("x-amz-target"):
        return service, target.rpartition(".")[2]
    if headers.get("content-type", "").startswith("application/x-www-form-urlencoded") and (
        action := parse_qs(body.decode("latin-1")).get("Action")
    ):
        return service, action[0]
    if compute := re.match(r"/compute/\w+/projects/[^/]+/(.+)", parts.path):
        return "compute", compute_action(method, compute[1].split("/"))
    if service == "s3":
        return "s3", object_action(method, parts.path, parts.query, headers)
    if not service and headers.get("authorization", "").startswith("Bearer ") and not parts.path.startswith("/token"):
        return "storage", object_action(method, parts.path, parts.query, headers)
    return service, method


def compute_action(method: str, segments: list[str]) -> str:
    """`zones/z/instances/i/stop` is `instances.stop`; source: https://docs.cloud.google.com/compute/docs/reference/rest/v1."""
    if segments[0] == "aggregated":
        return f"{segments[1]}.aggregatedList"
    if segments[0] == "global" or (segments[0] in ("zones", "regions") and len(segments) > 2):
        kind = "Operations"
        if (
            segments[-1] == "wait"
            or (len(segments) > 1 and segments[-2] == "operations")
            or segments[-1] == kind.lower()
        ):
            scope = {"zones": "zone", "regions": "region", "global": "global"}[segments[0]]
            segments = [scope + kind, *segments[(2 if scope == "global" else 3) :]]
        else:
            segments = segments[(1 if segments[0] == "global" else 2) :]
    if len(segments) == 1:
        return f"{segments[0]}.{'list' if method == 'GET' else 'insert'}"
    if len(segments) == 2:
        # POST .../instances/bulkInsert has a verb where an item has its name.
        return f"{segments[0]}.{REST_VERBS.get(method, segments[1])}"
    if segments[1] == "family":
        return f"{segments[0]}.getFromFamily"
    return f"{segments[0]}.{segments[-1]}"


def object_action(method: str, path: str, query: str, headers: Mapping[str, str]) -> str:
    """What S3 calls it; GCS's XML API has the same verbs."""
    fields = dict(parse_qsl(query, keep_blank_values=True))
    if "uploadId" in fields:
        uploads = {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}
        return uploads.get(method, "ListParts")
    if "uploads" in fields:
        return "CreateMultipartUpload" if method == "POST" else "ListMultipartUploads"
    if "delete" in fields:
        return "DeleteObjects"
    of = "Object" if path.strip("/").count("/") else "Bucket"
    if method == "GET" and of == "Bucket":
        return (
            "ListObjectsV2" if fields.get("list-type") == "2" else "ListObjects" if path.strip("/") else "ListBuckets"
        )
    if method == "PUT" and "x-amz-copy-source" in headers:
        return "CopyObject"
    return {"GET": "Get", "PUT": "Put", "DELETE": "Delete", "HEAD": "Head"}.get(method, method) + of


# -- what a provider says when it refuses -----------------------------------------------------------------------------

XML = (("Content-Type", "application/xml"),)
JSON = (("Content-Type", "application/json"),)


def refusal(kind: Literal["throttle", "error"], request: Request) -> Answer:
    """In the words of the service that was asked."""
    busy = kind == "throttle"
    if request.service == "ec2":
        code = "RequestLimitExceeded" if busy else "InternalError"
        text = f"<Response><Errors><Error><Code>{code}</Code><Message>injected</Message></Error></Errors></Response>"
        return Answer(503 if busy else 500, text.encode(), XML)
    if request.service in ("s3", "storage"):
        code = "SlowDown" if busy else "InternalError"
        text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
        return Answer((503 if request.service == "s3" else 429) if busy else 500, text.encode(), XML)
    if request.service == "compute":
        status, reason = (403, "rateLimitExceeded") if busy else (500, "backendError")
        error = {"code": status, "message": "injected", "errors": [{"reason": reason, "message": "injected"}]}
        return Answer(status, json.dumps({"error": error}).encode(), JSON)
    if "x-amz-target" in request.headers:
        kind_of_error = "ThrottlingException" if busy else "InternalServerError"
        return Answer(400 if busy else 500, json.dumps({"__type": kind_of_error, "message": "injected"}).encode(), JSON)
    code = "Throttling" if busy else "InternalFailure"
    text = f"<ErrorResponse><Error><Code>{code}</Code><Message>injected</Message></Error></ErrorResponse>"
    return Answer(400 if busy and request.service else 503 if busy else 500, text.encode(), XML)
