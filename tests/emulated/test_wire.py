"""The proxy that the tests of both clouds trust to fail in the way it says."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from tests.emulated.wire import Wire, compute_action, name_of

SIGNED = {"authorization": "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/ec2/aws4_request, Signature=x"}


class Upstream(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, str, bytes]]] = []

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append((self.headers["host"], self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "12345")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[str]:
    Upstream.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def put(wire: Wire, body: Any = b"x", path: str = "/a?b=c") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", wire.port, timeout=10)
    try:
        connection.request("PUT", path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_requests_arrive_whole_with_the_host_they_were_sent_to(upstream: str) -> None:
    large = b"0123456789" * 2_000_000
    with Wire(upstream) as wire:
        assert put(wire, large) == (200, large)
        assert put(wire, iter([b"in ", b"pieces"])) == (200, b"in pieces")  # chunked
    host = f"127.0.0.1:{wire.port}"
    assert Upstream.seen == [(host, "/a?b=c", large), (host, "/a?b=c", b"in pieces")]
    assert [len(request.body) for request in wire.requests] == [65_536, 9]


def test_a_connection_is_kept_and_a_head_answer_keeps_its_length(upstream: str) -> None:
    with Wire(upstream) as wire:
        connection = http.client.HTTPConnection("127.0.0.1", wire.port, timeout=10)
        for _ in range(2):
            connection.request("HEAD", "/a")
            response = connection.getresponse()
            response.read()
            assert response.headers["content-length"] == "12345"
            local = connection.sock.getsockname()
        assert local == connection.sock.getsockname()
        connection.close()


def test_faults_hit_whom_they_are_meant_for_and_as_often(upstream: str) -> None:
    with Wire(upstream) as wire:
        fault = wire.inject("error", when=lambda request: request.key == "/bad", count=2)
        assert [put(wire, path="/bad")[0] for _ in range(3)] == [500, 500, 200]
        assert put(wire, path="/good")[0] == 200
        assert fault.hits == 2
        wire.inject("throttle", status=429, body=b"later")
        assert put(wire) == (429, b"later")


def test_reset_never_reaches_the_cloud_and_lost_does(upstream: str) -> None:
    with Wire(upstream) as wire:
        for kind, arrived in (("reset", 0), ("lost", 1)):
            wire.inject(kind)  # type: ignore[arg-type]
            with pytest.raises(ConnectionResetError):
                put(wire)
            assert len(Upstream.seen) == arrived
        assert [(request.fault, request.status) for request in wire.requests] == [("reset", 0), ("lost", 0)]


def test_a_cut_answer_ends_in_the_middle_of_its_body(upstream: str) -> None:
    with Wire(upstream) as wire:
        wire.inject("cut")
        with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
            put(wire, b"x" * 100_000)
        assert len(Upstream.seen) == 1


def test_random_faults_are_drawn_by_their_seed(upstream: str) -> None:
    def fates(seed: int) -> list[str]:
        with Wire(upstream, probability=0.3, seed=seed) as wire:
            for _ in range(40):
                try:
                    put(wire)
                except ConnectionResetError:
                    pass
            return [request.fault for request in wire.requests]

    assert fates(1) == fates(1) != fates(2)
    assert 4 <= sum(map(bool, fates(1))) <= 24


def test_an_action_has_the_name_that_its_provider_gives_it() -> None:
    form = {**SIGNED, "content-type": "application/x-www-form-urlencoded; charset=utf-8"}
    assert name_of("POST", "/", form, b"Action=RunInstances&Version=1") == ("ec2", "RunInstances")
    target = {**SIGNED, "x-amz-target": "AmazonSSM.GetParameter"}
    assert name_of("POST", "/", target, b"{}")[1] == "GetParameter"
    s3 = {"authorization": SIGNED["authorization"].replace("/ec2/", "/s3/")}
    for method, path, action in (
        ("PUT", "/bucket/a/b", "PutObject"),
        ("POST", "/bucket/a/b?uploads", "CreateMultipartUpload"),
        ("PUT", "/bucket/a/b?partNumber=1&uploadId=x", "UploadPart"),
        ("GET", "/bucket?list-type=2&prefix=a", "ListObjectsV2"),
        ("GET", "/bucket/a", "GetObject"),
        ("POST", "/bucket?delete", "DeleteObjects"),
    ):
        assert name_of(method, path, s3, b"") == ("s3", action)
    assert name_of("GET", "/compute/v1/projects/p/aggregated/instances", {}, b"") == (
        "compute",
        "instances.aggregatedList",
    )


@pytest.mark.parametrize(
    ("method", "path", "action"),
    [
        ("POST", "zones/z/instances", "instances.insert"),
        ("GET", "zones/z/instances", "instances.list"),
        ("GET", "zones/z/instances/i", "instances.get"),
        ("DELETE", "zones/z/instances/i", "instances.delete"),
        ("POST", "zones/z/instances/i/stop", "instances.stop"),
        ("POST", "zones/z/instances/bulkInsert", "instances.bulkInsert"),
        ("GET", "zones/z/operations/o", "zoneOperations.get"),
        ("POST", "zones/z/operations/o/wait", "zoneOperations.wait"),
        ("GET", "zones/z/operations", "zoneOperations.list"),
        ("GET", "global/operations/o", "globalOperations.get"),
        ("GET", "global/images/family/f", "images.getFromFamily"),
        ("POST", "global/instanceTemplates", "instanceTemplates.insert"),
        ("GET", "zones", "zones.list"),
        ("GET", "regions/r", "regions.get"),
    ],
)
def test_compute_engine_s_methods_are_read_from_its_paths(method: str, path: str, action: str) -> None:
    assert compute_action(method, path.split("/")) == action
