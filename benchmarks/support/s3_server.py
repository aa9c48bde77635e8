"""An S3 server on loopback that costs its clients as little as Python can: bodies are received straight into memory.

`python -m benchmarks.support.s3_server [BYTES_PER_SECOND]` prints its port, and ends with its standard input. It checks
neither signatures nor checksums, has one bucket for every name, and keeps everything in memory. With a speed, what is
sent to it arrives no faster than over a link that has it, all connections together.
"""

from __future__ import annotations

import itertools
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

MOST_HEADER_BYTES = 64 * 1024
PACKET_BYTES = 1024 * 1024
"""So much a slower link lets through at a time."""
NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'


@dataclass(slots=True)
class Stored:
    """An object: the parts that it came in, in their order."""

    parts: list[memoryview]
    e_tag: str
    metadata: dict[str, str]
    changed: str = field(default_factory=lambda: formatdate(usegmt=True))

    @property
    def size(self) -> int:
        return sum(map(len, self.parts))

    def pieces(self, start: int, stop: int) -> list[memoryview]:
        found, place = [], 0
        for part in self.parts:
            lower, upper = max(start - place, 0), min(stop - place, len(part))
            if lower < upper:
                found.append(part[lower:upper])
            place += len(part)
        return found


@dataclass(slots=True)
class Request:
    verb: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: memoryview


@dataclass(slots=True)
class Answer:
    status: str
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[memoryview | bytes] = field(default_factory=list)
    length: int | None = None
    """Where it is not the pieces' own: of the object that a HEAD asks about."""


class Memory:
    """Buffers are used again: fresh ones cost the kernel more than receiving into them."""

    def __init__(self) -> None:
        self._free: dict[int, list[bytearray]] = {}
        self._lock = threading.Lock()

    def take(self, size: int) -> memoryview:
        with self._lock:
            free = self._free.get(size)
            buffer = free.pop() if free else bytearray(size)
        return memoryview(buffer)

    def give_back(self, parts: list[memoryview]) -> None:
        with self._lock:
            for part in parts:
                if isinstance(part.obj, bytearray) and len(part.obj) >= 1 << 20:
                    self._free.setdefault(len(part.obj), []).append(part.obj)


class Link:
    """All connections' way to here."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()

    def wait_for(self, size: int) -> None:
        """Until so many more bytes are through."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + size / self._bytes_per_second
            seconds = self._free_at - time.perf_counter()
        time.sleep(max(0.0, seconds))


class Bucket:
    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._objects: dict[str, Stored] = {}
        self._uploads: dict[str, dict[int, memoryview]] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def answer(self, request: Request) -> Answer:
        verb = self._verb(request)
        with self._lock:
            return verb(request)

    def _verb(self, request: Request) -> Callable[[Request], Answer]:
        query = request.query
        match request.verb:
            case "PUT":
                return self._put_part if "partNumber" in query else self._put
            case "POST":
                return self._create_upload if "uploads" in query else self._complete
            case "GET" | "HEAD" if request.key:
                return self._get
            case "GET":
                return self._list
            case "DELETE":
                return self._abort if "uploadId" in query else self._delete
        return lambda _: Answer("200 OK")

    def _put(self, request: Request) -> Answer:
        if request.headers.get("if-none-match") == "*" and request.key in self._objects:
            return _error("412 Precondition Failed", "PreconditionFailed")
        return self._store(request.key, [request.body], _metadata(request))

    def _store(self, key: str, parts: list[memoryview], metadata: dict[str, str]) -> Answer:
        if replaced := self._objects.get(key):
            self._memory.give_back(replaced.parts)
        stored = self._objects[key] = Stored(parts, f'"{next(self._numbers):032x}"', metadata)
        return Answer("200 OK", {"ETag": stored.e_tag})

    def _create_upload(self, request: Request) -> Answer:
        name = f"{next(self._numbers):016x}"
        self._uploads[name], self._metadata[name] = {}, _metadata(request)
        return _xml(
            "InitiateMultipartUploadResult",
            f"<Bucket>bucket</Bucket><Key>{escape(request.key)}</Key><UploadId>{name}</UploadId>",
        )

    def _put_part(self, request: Request) -> Answer:
        upload = self._uploads.get(request.query["uploadId"])
        if upload is None:
            return _error("404 Not Found", "NoSuchUpload")
        number = int(request.query["partNumber"])
        if replaced := upload.get(number):
            self._memory.give_back([replaced])
        upload[number] = request.body
        return Answer("200 OK", {"ETag": f'"{number:032x}"'})

    def _complete(self, request: Request) -> Answer:
        name = request.query.get("uploadId", "")
        upload = self._uploads.pop(name, None)
        if upload is None:
            return _error("404 Not Found", "NoSuchUpload")
        self._store(request.key, [upload[number] for number in sorted(upload)], self._metadata.pop(name))
        return _xml(
            "CompleteMultipartUploadResult",
            f"<Location>http://localhost/</Location><Bucket>bucket</Bucket><Key>{escape(request.key)}</Key>"
            f"<ETag>{escape(self._objects[request.key].e_tag)}</ETag>",
        )

    def _abort(self, request: Request) -> Answer:
        self._memory.give_back(list(self._uploads.pop(request.query["uploadId"], {}).values()))
        return Answer("204 No Content")

    def _delete(self, request: Request) -> Answer:
        if stored := self._objects.pop(request.key, None):
            self._memory.give_back(stored.parts)
        return Answer("204 No Content")

    def _get(self, request: Request) -> Answer:
        stored = self._objects.get(request.key)
        if stored is None:
            return _error("404 Not Found", "NoSuchKey")
        if request.headers.get("if-match") not in (None, "*", stored.e_tag):
            return _error("412 Precondition Failed", "PreconditionFailed")
        headers = {"ETag": stored.e_tag, "Last-Modified": stored.changed, "Accept-Ranges": "bytes", **stored.metadata}
        start, stop, status = 0, stored.size, "200 OK"
        if "range" in request.headers:
            start, stop = _range(request.headers["range"], stored.size)
            if start >= stop:
                return _error("416 Range Not Satisfiable", "InvalidRange")
            status = "206 Partial Content"
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{stored.size}"
        pieces = [] if request.verb == "HEAD" else stored.pieces(start, stop)
        return Answer(status, headers, pieces, stop - start)

    def _list(self, request: Request) -> Answer:
        if "location" in request.query:
            return _xml("LocationConstraint", "")
        prefix, after = request.query.get("prefix", ""), request.query.get("start-after", "")
        found = [(key, one) for key, one in sorted(self._objects.items()) if key.startswith(prefix) and key > after]
        listed = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(one.e_tag)}</ETag><Size>{one.size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key, one in found
        )
        return _xml(
            "ListBucketResult",
            f"<Name>bucket</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{listed}",
        )


class Connection:
    """One client's, answered by a thread of its own; receiving waits outside the interpreter's lock."""

    def __init__(self, accepted: socket.socket, bucket: Bucket, memory: Memory, link: Link | None) -> None:
        self._socket, self._bucket, self._memory, self._link = accepted, bucket, memory, link
        self._rest = b""

    def serve(self) -> None:
        try:
            while head := self._head():
                self._answer(head)
        except (ConnectionError, ValueError, OSError):
            pass
        finally:
            self._socket.close()

    def _answer(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        verb, target, _ = first.split(" ", 2)
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        parts = urlsplit(target)
        _, _, key = parts.path.lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        answer = self._bucket.answer(Request(verb, unquote(key), query, headers, self._body(headers)))
        length = sum(map(len, answer.pieces)) if answer.length is None else answer.length
        said = {"Content-Length": str(length), **answer.headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in said.items())
        self._socket.sendall(f"HTTP/1.1 {answer.status}\r\n{text}\r\n".encode())
        for piece in answer.pieces:
            self._socket.sendall(piece)

    def _head(self) -> str:
        while (end := self._rest.find(b"\r\n\r\n")) < 0:
            if len(self._rest) > MOST_HEADER_BYTES or not (more := self._socket.recv(MOST_HEADER_BYTES)):
                return ""
            self._rest += more
        head, self._rest = self._rest[:end], self._rest[end + 4 :]
        return head.decode("latin-1")

    def _body(self, headers: dict[str, str]) -> memoryview:
        if "x-amz-decoded-content-length" in headers:
            return self._chunked(int(headers["x-amz-decoded-content-length"]))
        body = self._memory.take(int(headers.get("content-length", "0")))
        self._fill(body)
        return body

    def _chunked(self, size: int) -> memoryview:
        """aws-chunked: the sizes of the chunks lie between them, and a checksum after them."""
        body, place = self._memory.take(size), 0
        while length := int(self._line().partition(b";")[0], 16):
            self._fill(body[place : place + length])
            place += length
            self._line()
        while self._line():
            pass
        return body

    def _fill(self, view: memoryview) -> None:
        have = min(len(self._rest), len(view))
        view[:have] = self._rest[:have]
        self._rest = self._rest[have:]
        while have < len(view):
            more = view[have:]
            if self._link:
                more = more[:PACKET_BYTES]
                self._link.wait_for(len(more))
            got = self._socket.recv_into(more, 0, socket.MSG_WAITALL)
            if not got:
                raise ConnectionError("the client left in the middle of a body")
            have += got

    def _line(self) -> bytes:
        while b"\r\n" not in self._rest:
            if not (more := self._socket.recv(4096)):
                raise ConnectionError("the client left in the middle of a body")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\r\n")
        return line


def _metadata(request: Request) -> dict[str, str]:
    return {name: value for name, value in request.headers.items() if name.startswith("x-amz-meta-")}


def _range(header: str, size: int) -> tuple[int, int]:
    first, _, last = header.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(int(last) + 1, size) if last else size


def _xml(root: str, content: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} {NAMESPACE}>{content}</{root}>'.encode()
    return Answer("200 OK", {"Content-Type": "application/xml"}, [body])


def _error(status: str, code: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{code}</Message></Error>'
    return Answer(status, {"Content-Type": "application/xml"}, [body.encode()])


def main() -> None:
    memory = Memory()
    bucket = Bucket(memory)
    link = Link(float(sys.argv[1])) if len(sys.argv) > 1 else None
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def accept() -> None:
        while True:
            accepted, _ = listener.accept()
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=Connection(accepted, bucket, memory, link).serve, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
