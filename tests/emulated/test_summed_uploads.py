"""Images on their way to S3: parts that S3 verifies by the sums of the manifest, behind a network that fails."""

from __future__ import annotations

import base64
import contextlib
import math
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit
from zlib import crc32

import boto3
import botocore.credentials
import botocore.session
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from holdfast.drivers.local.metadata import Facts, serve
from holdfast.errors import ConfigError, CredentialsError, TransientError
from holdfast.storage import cloud_clients, s3_parts
from holdfast.storage.address import Address
from holdfast.storage.cloud import PARTS_AT_ONCE, CloudStore
from tests.emulated.object_stores import ACCESS_KEY, SECRET_KEY, S3Emulator
from tests.emulated.wire import Request, Wire

BUCKET = "summed"
PIECE_BYTES = 5 * 1024 * 1024
"""The smallest part that S3 takes."""
PROXIES = [name for one in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for name in (one, one.upper())]
PATH = "p/image é.safetensors"


@pytest.fixture(autouse=True)
def key_in_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", *PROXIES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture
def s3() -> Iterator[S3Emulator]:
    with S3Emulator(BUCKET) as emulator:
        yield emulator


@pytest.fixture
def wire(s3: S3Emulator) -> Iterator[Wire]:
    with Wire(s3.endpoint) as between:
        yield between


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """trusting(FILE): Python trusts that certificate."""

    def trust(certificate: str) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        s3_parts._tls.cache_clear()

    yield trust
    s3_parts._tls.cache_clear()


def opened(
    s3: S3Emulator, endpoint: str, credentials: Any = None, retry_seconds: float = 20.0, more: str = ""
) -> CloudStore:
    address = Address.parse(s3.url(BUCKET, "p", endpoint) + more)
    return CloudStore(address, credentials, retry_seconds=retry_seconds, part_bytes=PIECE_BYTES)


def some_pieces(count: int = 3, seed: int = 0) -> list[bytes]:
    """All but the last as large as a part."""
    draw = random.Random(seed)
    return [draw.randbytes(PIECE_BYTES if number < count - 1 else 1000) for number in range(count)]


def summed(pieces: list[bytes]) -> Iterator[tuple[bytes, int]]:
    for piece in pieces:
        yield piece, crc32(piece)


def key() -> str:
    return PATH.removeprefix("p/")


def of(action: str) -> Callable[[Request], bool]:
    return lambda request: request.action == action


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_every_part_carries_the_sum_it_was_given_with_and_nothing_else_is_summed_up(s3: S3Emulator, wire: Wire) -> None:
    pieces = some_pieces(4)
    opened(s3, wire.url).put_summed(key(), summed(pieces))
    parts = sorted((one for one in wire.requests if one.action == "UploadPart"), key=lambda one: one.path)
    assert [one.headers["x-amz-checksum-crc32"] for one in parts] == [
        base64.b64encode(crc32(piece).to_bytes(4, "big")).decode() for piece in pieces
    ]
    begin = next(one for one in wire.requests if one.action == "CreateMultipartUpload")
    assert begin.headers["x-amz-checksum-algorithm"] == "CRC32"
    finish = next(one for one in wire.requests if one.action == "CompleteMultipartUpload")
    for part in parts:
        assert f"<ChecksumCRC32>{part.headers['x-amz-checksum-crc32']}</ChecksumCRC32>".encode() in finish.body
    assert s3.contents(BUCKET) == {PATH: b"".join(pieces)}


@pytest.mark.parametrize("token", ["", "a token/of+some=hours"])
def test_its_requests_are_signed_as_botocore_signs_them(
    s3: S3Emulator, wire: Wire, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    opened(s3, wire.url).put_summed(key(), summed(some_pieces()))
    signer = S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY, token or None), "s3", "us-east-1")
    signed = [
        one for one in wire.requests if one.action in ("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")
    ]
    assert len(signed) == 5
    for one in signed:
        names = one.headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
        request = AWSRequest(one.method, wire.url + one.path, headers={name: one.headers[name] for name in names})
        request.context["timestamp"] = one.headers["x-amz-date"]
        text = signer.string_to_sign(request, signer.canonical_request(request))
        assert one.headers["authorization"].endswith("Signature=" + signer.signature(text, request))
        assert one.headers.get("x-amz-security-token", "") == token
        assert {name for name in one.headers if name.startswith("x-amz-")} <= set(names)


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="only Linux says how far a server is")
@pytest.mark.parametrize("distance", ["near", "far", "unknown"])
def test_only_to_a_server_nearby_the_send_buffer_is_small(
    s3: S3Emulator, monkeypatch: pytest.MonkeyPatch, distance: str
) -> None:
    buffers: list[int] = []
    port = urlsplit(s3.endpoint).port
    send = socket.socket.sendall

    def sendall(self: socket.socket, *given: Any) -> None:
        if self.getpeername()[1] == port:
            buffers.append(self.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
        send(self, *given)

    def refuse(self: socket.socket, level: int, option: int, *size: int) -> Any:
        if option == socket.TCP_INFO and level == socket.IPPROTO_TCP:
            raise OSError("no such option")
        return ask(self, level, option, *size)

    ask = socket.socket.getsockopt
    monkeypatch.setattr(socket.socket, "sendall", sendall)
    if distance == "far":  # no round trip is shorter
        monkeypatch.setattr(s3_parts, "NEAR_MICROSECONDS", 0)
    elif distance == "unknown":
        monkeypatch.setattr(socket.socket, "getsockopt", refuse)
    pieces = some_pieces(2)
    store = opened(s3, s3.endpoint)
    store.put_summed(key(), summed(pieces))
    assert store.get(key()) == b"".join(pieces)
    is_bounded = [size == 2 * s3_parts.NEAR_SEND_BYTES for size in buffers]
    assert buffers and (all(is_bounded) if distance == "near" else not any(is_bounded))


def test_a_single_piece_is_one_request(s3: S3Emulator, wire: Wire) -> None:
    opened(s3, wire.url).put_summed(key(), summed([b"little"]))
    assert dict(wire.calls()) == {"PutObject": 1}
    opened(s3, wire.url).put_summed(key(), iter([]))
    assert s3.contents(BUCKET) == {PATH: b""}


@pytest.mark.parametrize("checksum", ["sha256", "crc64nvme", "none"])
def test_a_checksum_that_the_url_names_is_the_one_that_is_sent(s3: S3Emulator, wire: Wire, checksum: str) -> None:
    opened(s3, wire.url, more=f"&checksum={checksum}").put_summed(key(), summed(some_pieces()))
    sent = {name for one in wire.requests for name in one.headers if name.startswith("x-amz-checksum-")}
    assert sent - {"x-amz-checksum-algorithm"} == (set() if checksum == "none" else {f"x-amz-checksum-{checksum}"})


def test_pieces_are_sent_while_they_are_made_not_gathered_first(s3: S3Emulator, wire: Wire) -> None:
    waiting = []

    def pieces() -> Iterator[tuple[bytes, int]]:
        for number in range(2 * PARTS_AT_ONCE):
            waiting.append(number - wire.calls()["UploadPart"])
            piece = bytes([number]) * PIECE_BYTES
            yield piece, crc32(piece)

    opened(s3, wire.url).put_summed(key(), pieces())
    assert max(waiting) <= PARTS_AT_ONCE + 3


# -- a network that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
@pytest.mark.parametrize("kind", ["lost", "reset", "error", "throttle", "cut"])
def test_it_survives_one_failure_anywhere(s3: S3Emulator, wire: Wire, action: str, kind: str) -> None:
    pieces = some_pieces()
    fault = wire.inject(kind, when=of(action))  # type: ignore[arg-type]
    opened(s3, wire.url).put_summed(key(), summed(pieces))
    assert fault.hits == 1
    assert s3.contents(BUCKET) == {PATH: b"".join(pieces)}


@pytest.mark.parametrize("seed", range(3))
def test_with_a_fifth_of_all_calls_failing_everything_arrives(s3: S3Emulator, wire: Wire, seed: int) -> None:
    wire.probability, wire._random = 0.2, random.Random(seed)
    store = opened(s3, wire.url, retry_seconds=30)
    for number in range(12):
        pieces = some_pieces(seed=number)
        store.put_summed(key(), summed(pieces))
        assert s3.contents(BUCKET) == {PATH: b"".join(pieces)}
    assert sum(bool(request.fault) for request in wire.requests) > 3


def test_a_part_damaged_on_its_way_is_sent_again(s3: S3Emulator, wire: Wire) -> None:
    pieces = some_pieces()
    body = b"<Error><Code>BadDigest</Code><Message>The CRC32 you specified did not match</Message></Error>"
    wire.inject("error", when=of("UploadPart"), status=400, body=body)
    opened(s3, wire.url).put_summed(key(), summed(pieces))
    assert wire.calls()["UploadPart"] == len(pieces) + 1
    assert s3.contents(BUCKET) == {PATH: b"".join(pieces)}


def test_an_error_that_comes_with_status_200_is_an_error(s3: S3Emulator, wire: Wire) -> None:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html"""
    pieces = some_pieces()
    body = b'<?xml version="1.0"?>\n<Error><Code>InternalError</Code><Message>try again</Message></Error>'
    wire.inject("error", when=of("CompleteMultipartUpload"), status=200, body=body)
    opened(s3, wire.url).put_summed(key(), summed(pieces))
    assert wire.calls()["CompleteMultipartUpload"] == 2
    assert s3.contents(BUCKET) == {PATH: b"".join(pieces)}


def test_an_upload_that_another_ended_is_no_success(s3: S3Emulator, wire: Wire) -> None:
    """What is there is another's."""
    store = opened(s3, wire.url, retry_seconds=0.5)
    store.put(key(), b"another's")
    body = b"<Error><Code>NoSuchUpload</Code><Message>.</Message></Error>"
    wire.inject("error", when=of("CompleteMultipartUpload"), count=math.inf, status=404, body=body)
    with pytest.raises(TransientError, match="NoSuchUpload"):
        store.put_summed(key(), summed(some_pieces()))
    assert s3.contents(BUCKET) == {PATH: b"another's"}


def test_a_store_that_throttles_for_long_is_transient_within_the_time_given(s3: S3Emulator, wire: Wire) -> None:
    wire.inject("throttle", when=of("UploadPart"), count=math.inf)
    began = time.monotonic()
    with pytest.raises(TransientError, match="SlowDown"):
        opened(s3, wire.url, retry_seconds=0.5).put_summed(key(), summed(some_pieces(2 * PARTS_AT_ONCE)))
    assert time.monotonic() - began < 5
    assert wire.calls()["UploadPart"] < 6 * PARTS_AT_ONCE  # the later pieces were not even begun
    assert s3.contents(BUCKET) == {} and s3.unfinished_uploads(BUCKET) == 0


def test_a_source_that_fails_late_leaves_no_part_that_costs_money(s3: S3Emulator, wire: Wire) -> None:
    def pieces() -> Iterator[tuple[bytes, int]]:
        yield from summed(some_pieces()[:2])
        raise FileNotFoundError("the snapshot is gone")

    store = opened(s3, wire.url)
    store.put(key(), b"whole")
    with pytest.raises(FileNotFoundError, match="snapshot is gone"):
        store.put_summed(key(), pieces())
    assert s3.contents(BUCKET) == {PATH: b"whole"}
    assert s3.unfinished_uploads(BUCKET) == 0


def test_a_store_out_of_reach_says_why(s3: S3Emulator) -> None:
    with pytest.raises(TransientError, match="Connection refused"):
        opened(s3, "http://127.0.0.1:9", retry_seconds=0.3).put_summed(key(), summed(some_pieces()))


class Answering:
    """A server of an upload's requests that says what a test wants, and hangs up where a test wants; no S3."""

    def __init__(self, part: bytes = b"", complete: bytes = b"", tls: tuple[str, str] | None = None) -> None:
        self._part, self._complete, self._context = part, complete, None
        if tls:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*tls)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http{'s' if tls else ''}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: Counter[str] = Counter()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection, connection.makefile("rb") as stream:
                while first := stream.readline().decode():
                    size = 0
                    while (line := stream.readline().lower()) not in (b"\r\n", b""):
                        name, _, value = line.partition(b":")
                        size = int(value) if name == b"content-length" else size
                    verb = next(word for word in ("partNumber", "uploads=", "uploadId", "") if word in first)
                    verb = "abort" if first.startswith("DELETE") else verb
                    self.asked[verb] += 1
                    if verb == "partNumber" and self._part:
                        connection.sendall(self._part)  # with most of the part unread
                        time.sleep(0.2)
                        return
                    stream.read(size)
                    if verb == "uploadId":
                        connection.sendall(self._complete)
                        return
                    body = b"<UploadId>1</UploadId>" if verb == "uploads=" else b""
                    connection.sendall(
                        b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body)
                    )


REFUSAL = b"<Error><Code>AccessDenied</Code><Message>not you</Message></Error>"


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_what_a_server_says_before_it_hangs_up_in_the_middle_of_a_part_is_heard(
    s3: S3Emulator, tmp_path: Path, tls: bool, trusting: Callable[[str], None]
) -> None:
    certificate = self_signed(tmp_path)
    trusting(certificate[0])
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(REFUSAL), REFUSAL)
    server = Answering(part=refusal, tls=certificate if tls else None)
    with server, pytest.raises(ConfigError, match="s3:PutObject"):
        opened(s3, server.endpoint, retry_seconds=5).put_summed(key(), summed(some_pieces()))
    assert server.asked["abort"] == 1


def test_a_success_that_is_told_before_all_of_a_part_was_heard_is_none(s3: S3Emulator) -> None:
    taken = b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 0\r\n\r\n'
    with Answering(part=taken) as server:
        with pytest.raises(TransientError):
            opened(s3, server.endpoint, retry_seconds=0.3).put_summed(key(), summed(some_pieces()[:2]))
        assert server.asked["uploadId"] == 0


DONE = b"<CompleteMultipartUploadResult></CompleteMultipartUploadResult>"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n<?xml version='1.0'?>\n<Err",
        b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n<CompleteMultipartUploadResult>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n    \n   ",
        b"HTTP/1.1 200 OK\r\n\r\n<Error xmlns='http://s3.amazonaws.com/'><Code>InternalError</Code></Error>",
        b"HTTP/1.1 200 OK\r\n\r\n<html>Please log in to the hotel's network</html>",
        b"HTTP/1.1 302 Found\r\nContent-Length: %d\r\n\r\n%s" % (len(DONE), DONE),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n<Com\r\n",
        b"",
    ],
    ids=[
        "half an error",
        "half a success",
        "nothing of it",
        "spaces",
        "an error",
        "a page",
        "elsewhere",
        "chunk",
        "none",
    ],
)
def test_only_a_whole_word_of_success_is_one(s3: S3Emulator, answer: bytes) -> None:
    with Answering(complete=answer) as server:
        with pytest.raises((TransientError, ConfigError)):
            opened(s3, server.endpoint, retry_seconds=0.3).put_summed(key(), summed(some_pieces()))
        assert server.asked["abort"] >= 1
    done = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(DONE), DONE)
    with Answering(complete=done) as server:
        opened(s3, server.endpoint, retry_seconds=0.3).put_summed(key(), summed(some_pieces()))
        assert server.asked["abort"] == 0


def test_parts_are_removed_by_a_store_that_is_busy_just_then(s3: S3Emulator, wire: Wire) -> None:
    def pieces() -> Iterator[tuple[bytes, int]]:
        yield from summed(some_pieces()[:2])
        raise FileNotFoundError("the snapshot is gone")

    wire.inject("throttle", when=of("AbortMultipartUpload"), count=2)
    with pytest.raises(FileNotFoundError):
        opened(s3, wire.url).put_summed(key(), pieces())
    assert s3.unfinished_uploads(BUCKET) == 0


def test_parts_that_stay_behind_are_named(s3: S3Emulator, wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    wire.inject(
        "throttle", when=lambda request: request.action in ("UploadPart", "AbortMultipartUpload"), count=math.inf
    )
    with pytest.raises(TransientError):
        opened(s3, wire.url, retry_seconds=0.3).put_summed(key(), summed(some_pieces()))
    assert "left behind" in caplog.text and key() in caplog.text


def test_connections_that_the_server_has_closed_meanwhile_cost_no_pause(s3: S3Emulator, wire: Wire) -> None:
    def pieces() -> Iterator[tuple[bytes, int]]:
        yield from summed(some_pieces(2 * PARTS_AT_ONCE)[:-1])
        deadline = time.monotonic() + 20
        while wire.calls()["UploadPart"] < 2 * PARTS_AT_ONCE - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # until all are answered
        wire.hang_up()
        paused.append(time.monotonic())
        yield b"the end", crc32(b"the end")

    paused: list[float] = []
    opened(s3, wire.url).put_summed(key(), pieces())
    assert time.monotonic() - paused[0] < 1.0
    assert wire.calls()["UploadPart"] == 2 * PARTS_AT_ONCE


def test_an_upload_goes_on_in_a_thread_when_the_main_thread_has_ended(s3: S3Emulator, tmp_path: Path) -> None:
    program = """
import sys, threading, time
from zlib import crc32
from holdfast.storage import open_store
def pieces():
    for number in range(3):
        threading.main_thread().join()
        piece = bytes([number]) * (5 << 20)
        yield piece, crc32(piece)
threading.Thread(target=lambda: open_store(sys.argv[1]).put_summed("object", pieces())).start()
"""
    subprocess.run([sys.executable, "-c", program, s3.url(BUCKET)], check=True, timeout=60)
    assert s3.contents(BUCKET)["object"] == b"".join(bytes([number]) * (5 << 20) for number in range(3))


# -- who signs --------------------------------------------------------------------------------------------------------


def on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOLDFAST_CLOUD", "aws")


def key_id(request: Request) -> str:
    return request.headers["authorization"].partition("Credential=")[2].partition("/")[0]


def test_a_session_is_asked_again_so_that_renewed_keys_are_used(
    s3: S3Emulator, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    given = []

    def renew() -> dict[str, str]:
        given.append(f"KEY{len(given)}")
        expiry = datetime.now(UTC) + timedelta(minutes=20 if len(given) > 1 else 5)  # botocore renews the first at once
        return {"access_key": given[-1], "secret_key": "s", "token": "t", "expiry_time": expiry.isoformat()}

    session = botocore.session.Session()
    session._credentials = botocore.credentials.RefreshableCredentials.create_from_metadata(renew(), renew, "test")
    store = opened(s3, wire.url, boto3.Session(botocore_session=session))
    store.put_summed(key(), summed(some_pieces()))
    assert {key_id(one) for one in wire.requests} == {"KEY1"}


@pytest.mark.parametrize("minutes", [60, 2])
def test_a_machine_signs_by_its_role_and_asks_for_it_again_before_its_keys_end(
    s3: S3Emulator, wire: Wire, monkeypatch: pytest.MonkeyPatch, minutes: int
) -> None:
    on_a_machine(monkeypatch)
    asked = []

    def identity(role: str = "") -> tuple[str, dict[str, str]]:
        asked.append(role)
        expiration = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()
        return "role", {"AccessKeyId": "ROLES", "SecretAccessKey": "s", "Token": "t", "Expiration": expiration}

    monkeypatch.setattr("holdfast.runtime.fetch.aws_identity", identity)
    store = opened(s3, wire.url)
    for _ in range(2):
        store.put_summed(key(), summed(some_pieces()))
    parts = [one for one in wire.requests if one.action == "UploadPart"]
    assert {(key_id(one), one.headers["x-amz-security-token"]) for one in parts} == {("ROLES", "t")}
    assert len(asked) == 1 if minutes == 60 else len(asked) >= 10  # once for every request


def test_a_machines_role_comes_from_its_metadata(s3: S3Emulator, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_machine(monkeypatch)
    server = serve(Facts("i-1", "aws", "us-east-1a", "us-east-1", "c7i.large", ""))
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
    try:
        pieces = some_pieces()
        opened(s3, wire.url).put_summed(key(), summed(pieces))
    finally:
        server.shutdown()
        server.server_close()
    assert any("x-amz-checksum-crc32" in one.headers for one in wire.requests)
    assert s3.contents(BUCKET) == {PATH: b"".join(pieces)}


def test_without_a_role_it_is_said_that_credentials_are_missing(
    s3: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_machine(monkeypatch)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("holdfast.runtime.fetch.ROLE_PAUSES", (0.01,))
    with pytest.raises(CredentialsError, match="metadata service"):
        opened(s3, s3.endpoint).put_summed(key(), summed(some_pieces()))


KEYS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


@pytest.mark.parametrize(
    "environment",
    [
        {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/role"},
        {**KEYS, "AWS_SERVER_SIDE_ENCRYPTION": "aws:kms", "AWS_SSE_KMS_KEY_ID": "key"},
        {**KEYS, "AWS_SSE_CUSTOMER_KEY_BASE64": "a2V5"},
        {**KEYS, "AWS_REQUEST_PAYER": "true"},
        {**KEYS, "aws_skip_signature": "true"},
    ],
    ids=lambda environment: next(reversed(environment)),
)
def test_what_only_obstore_knows_is_left_to_it(s3: S3Emulator, environment: dict[str, str]) -> None:
    address = Address.parse(s3.url(BUCKET, "p"))
    assert cloud_clients.signing_keys(address, None, {**KEYS, "AWS_REQUEST_PAYER": ""})
    assert cloud_clients.signing_keys(address, None, environment) is None


@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_the_way_through_a_proxy_is_left_to_obstore(s3: S3Emulator, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    address = Address.parse(s3.url(BUCKET, "p", "http://minio.example"))
    monkeypatch.setenv(name, "http://proxy.example:3128")
    assert cloud_clients.signing_keys(address, None, KEYS) is None
    monkeypatch.setenv("no_proxy", "minio.example")
    assert cloud_clients.signing_keys(address, None, KEYS)


def test_keys_that_can_not_be_renewed_are_used_until_their_end_and_the_service_is_not_pestered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends_at = datetime.now(UTC) + timedelta(seconds=1)
    asked = []

    def provide() -> dict[str, Any]:
        asked.append(1)
        if len(asked) > 1:
            raise OSError("the metadata service is away")
        return {"access_key_id": "K", "secret_access_key": "s", "token": None, "expires_at": ends_at}

    keys = cloud_clients._Kept(provide)
    assert [keys()["AccessKeyId"] for _ in range(5)] == ["K"] * 5 and len(asked) == 2
    time.sleep(1.1)
    for _ in range(3):
        with pytest.raises(CredentialsError, match="metadata service is away"):
            keys()
    assert len(asked) == 2


def test_an_endpoint_may_be_an_address_of_ipv6_without_a_port(s3: S3Emulator) -> None:
    with pytest.raises(TransientError, match=r"Connection refused|Cannot assign|unreachable|not supported"):
        opened(s3, "http://[::1]", retry_seconds=0.2).put_summed(key(), summed(some_pieces()))


# -- certificates -----------------------------------------------------------------------------------------------------


def test_a_store_whose_certificate_this_python_trusts_not_is_left_to_obstore(
    s3: S3Emulator, tmp_path: Path, caplog: pytest.LogCaptureFixture, trusting: Callable[[str], None]
) -> None:
    certificate = self_signed(tmp_path)
    with S3Emulator(BUCKET, certificate=certificate) as secure:
        store = opened(secure, secure.endpoint, retry_seconds=0.3)
        with pytest.raises(TransientError):
            store.put_summed(key(), summed(some_pieces()))  # nor does obstore trust it
        assert "by obstore then" in caplog.text
        trusting(certificate[0])
        pieces = some_pieces()
        opened(secure, secure.endpoint, retry_seconds=5).put_summed(key(), summed(pieces))
        assert secure.contents(BUCKET) == {PATH: b"".join(pieces)}


def self_signed(folder: Path) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1 and of its key."""
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number(), now, now + timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(private, hashes.SHA256())
    )
    certificate, key_file = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return str(certificate), str(key_file)
