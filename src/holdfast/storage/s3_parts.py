"""S3's uploads in parts, each of which S3 verifies by a CRC-32 that the caller knows.

Why not obstore's: docs/decisions/0001-object-store.md. The protocol:
https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import re
import select
import socket
import ssl
import struct
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Self
from urllib.parse import quote, urlsplit
from xml.sax.saxutils import escape, unescape

from holdfast.runtime.fetch import sign
from holdfast.storage.address import Address
from holdfast.storage.protocol import Data

Keys = Callable[[], dict[str, str]]
"""Gives AccessKeyId, SecretAccessKey and, where they end some day, Token."""
CONNECT_SECONDS = 5.0
REQUEST_SECONDS = 60.0
"""One part of 16 MB must be through in this time, so 3 Mbit/s for each of the connections."""
UNRESERVED = "-_.~"
MOST_ANSWER_BYTES = 1 << 20
NEAR_MICROSECONDS, NEAR_SEND_BYTES = 1000, 512 * 1024
"""To a server that answers this soon, a buffer of this size lets half a gigabyte a second through. With larger ones, as Linux
would have them grow, uploads over loopback were slower: most likely the processor's cache does not hold them all.
"""
TCP_RTT = struct.Struct("=68xI")
"""tcpi_rtt, microseconds, of linux/tcp.h's tcp_info."""


class RefusedError(Exception):
    """What S3 answered instead, worded as obstore words it."""


class S3Parts:
    """Requests of one upload, from any number of threads; each has a connection of its own for as long as it needs one.

    They raise RefusedError, OSError and http.client.HTTPException, and nothing is asked twice.
    """

    def __init__(self, address: Address, keys: Keys) -> None:
        self._region = address.options.get("region", "us-east-1")
        self._endpoint = urlsplit(endpoint_of(address))
        self._bucket, self._keys = address.bucket, keys
        self._idle: list[http.client.HTTPConnection] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().close()

    def begin(self, path: str, metadata: Mapping[str, str]) -> str:
        """The upload's id."""
        headers = {f"x-amz-meta-{name}": value for name, value in metadata.items()}
        headers["x-amz-checksum-algorithm"] = "CRC32"
        _, text = self._ask("POST", path, {"uploads": ""}, headers)
        if not (found := re.search(r"<UploadId>([^<]+)</UploadId>", text)):
            raise RefusedError(f"no upload's id in the answer: {text[:200]}")
        return unescape(found[1])

    def put(self, path: str, upload: str, number: int, data: Data, crc32: int) -> str:
        """The part's tag. `number`: from 1."""
        query = {"partNumber": str(number), "uploadId": upload}
        headers, _ = self._ask("PUT", path, query, {"x-amz-checksum-crc32": _encoded(crc32)}, data)
        if not (tag := headers.get("ETag")):
            raise RefusedError(f"no tag in the answer to part {number}")
        return tag

    def finish(self, path: str, upload: str, parts: Sequence[tuple[str, int]]) -> None:
        """`parts`: tag and CRC-32 of each, in their order."""
        listed = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(tag)}</ETag>"
            f"<ChecksumCRC32>{_encoded(crc32)}</ChecksumCRC32></Part>"
            for number, (tag, crc32) in enumerate(parts, 1)
        )
        body = f'<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{listed}</CompleteMultipartUpload>'
        _, text = self._ask("POST", path, {"uploadId": upload}, {}, body.encode())
        # Else it is a proxy's page, or only half of an answer.
        if not re.search(r"<(\w+:)?CompleteMultipartUploadResult[\s>]", text):
            raise RefusedError(f"no word of success in the answer: {text[:200]}")

    def abort(self, path: str, upload: str) -> None:
        self._ask("DELETE", path, {"uploadId": upload}, {})

    def _ask(
        self, method: str, path: str, query: Mapping[str, str], headers: dict[str, str], body: Data = b""
    ) -> tuple[Mapping[str, str], str]:
        """Headers and text of the answer."""
        path = f"{self._endpoint.path}/{self._bucket}/{quote(path, safe='/' + UNRESERVED)}"
        asked = "&".join(f"{name}={quote(value, safe=UNRESERVED)}" for name, value in sorted(query.items()))
        headers |= {"host": self._endpoint.netloc, "x-amz-content-sha256": "UNSIGNED-PAYLOAD"}
        sign(method, path, asked, headers, self._region, self._keys())
        connection = self._idle_one() or self._connected()
        is_whole = False
        try:
            # A server that refuses may hang up before it has heard all; what it said by then is waiting.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                connection.request(method, f"{path}?{asked}", body or None, headers)
                is_whole = True
            answer = connection.getresponse()
            text = answer.read(MOST_ANSWER_BYTES).decode(errors="replace")
            if answer.length:  # http.client takes an answer that was cut off for a short one
                raise http.client.IncompleteRead(text.encode(), answer.length)
        except BaseException:
            connection.close()
            raise
        if is_whole and answer.isclosed() and not answer.will_close:
            self._idle.append(connection)
        else:
            connection.close()
        # "Complete the upload" is answered with 200 at once, and with what came of it in the end. And no answer to half a
        # request is a success.
        if not is_whole or not 200 <= answer.status < 300 or re.search(r"<Error[\s>]", text):
            raise RefusedError(f"status code: {answer.status}, {text}")
        return answer.headers, text

    def _idle_one(self) -> http.client.HTTPConnection | None:
        """One that the server has not closed meanwhile."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            look = select.poll()
            look.register(connection.sock, select.POLLIN)
            if not look.poll(0):
                return connection
            connection.close()

    def _connected(self) -> http.client.HTTPConnection:
        host, port = self._endpoint.hostname or "", self._endpoint.port
        if self._endpoint.scheme == "http":
            connection = http.client.HTTPConnection(host, port or 80, timeout=CONNECT_SECONDS)
        else:
            connection = http.client.HTTPSConnection(host, port or 443, timeout=CONNECT_SECONDS, context=_tls())
        connection.connect()
        connection.sock.settimeout(REQUEST_SECONDS)
        with contextlib.suppress(OSError):  # a sandbox's kernel may know neither: slower then, no failure
            if _is_near(connection.sock):
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NEAR_SEND_BYTES)
        return connection


def endpoint_of(address: Address) -> str:
    region = address.options.get("region", "us-east-1")
    return address.options.get("endpoint", f"https://s3.{region}.amazonaws.com")


def is_behind_proxy(address: Address) -> bool:
    endpoint, proxies = urlsplit(endpoint_of(address)), urllib.request.getproxies()
    is_named = endpoint.scheme in proxies or "all" in proxies
    return is_named and not urllib.request.proxy_bypass(endpoint.netloc)


def _is_near(connected: socket.socket) -> bool:
    if not hasattr(socket, "TCP_INFO"):
        return False
    said = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_RTT.size)
    return len(said) == TCP_RTT.size and TCP_RTT.unpack(said)[0] < NEAR_MICROSECONDS


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _encoded(crc32: int) -> str:
    return base64.b64encode(crc32.to_bytes(4, "big")).decode()
