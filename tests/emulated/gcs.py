"""A Google Cloud Storage of the tests: the XML API, and the metadata server's tokens that open it.

Honest where a client could go wrong: preconditions on generations, parts that are too small, uploads that are over,
ranges past the end, and a bearer token on every request. Source: https://docs.cloud.google.com/storage/docs/xml-api/overview
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

MIN_PART_BYTES = 5 * 1024 * 1024
TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredObject:
    data: bytes
    generation: int
    metadata: dict[str, str]
    etag: str


@dataclass(slots=True)
class Upload:
    bucket: str
    name: str
    metadata: dict[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


class GcsError(Exception):
    """Answered as XML."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class GcsEmulator:
    """`with GcsEmulator("bucket") as gcs: open_store(gcs.url("bucket", "prefix"))`.

    `tokens`: what the metadata server has handed out. Any bearer token opens the store unless `valid_tokens` is set.
    Set GCE_METADATA_HOST to `host` for a client that takes its credentials from there.
    """

    def __init__(self, *buckets: str) -> None:
        self.buckets: dict[str, dict[str, StoredObject]] = {name: {} for name in buckets}
        self.uploads: dict[str, Upload] = {}
        self.tokens: list[str] = []
        self.valid_tokens: set[str] | None = None
        self.bearers_seen: set[str] = set()
        self.page_size = 1000
        self._generations, self._lock = itertools.count(1), threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.endpoint = f"http://{self.host}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="gcs").start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, bucket: str, prefix: str = "", endpoint: str = "") -> str:
        """What open_store takes. `endpoint`: of a proxy in front."""
        return f"gs://{bucket}/{quote(prefix)}?endpoint={endpoint or self.endpoint}"

    def contents(self, bucket: str) -> dict[str, bytes]:
        return {name: stored.data for name, stored in self.objects(bucket).copy().items()}

    def unfinished_uploads(self, bucket: str) -> int:
        return sum(upload.bucket == bucket for upload in self.uploads.values())

    # -- objects ------------------------------------------------------------------------------------------------------

    def objects(self, bucket: str) -> dict[str, StoredObject]:
        try:
            return self.buckets[bucket]
        except KeyError:
            raise GcsError(404, "NoSuchBucket", f"The specified bucket {bucket} does not exist.") from None

    def read(self, bucket: str, name: str) -> StoredObject:
        try:
            return self.objects(bucket)[name]
        except KeyError:
            raise GcsError(404, "NoSuchKey", "The specified key does not exist.") from None

    def write(
        self, bucket: str, name: str, data: bytes, metadata: dict[str, str], generation: str | None
    ) -> StoredObject:
        """`generation` is the precondition: the object's current one, 0 for none."""
        with self._lock:
            present = self.objects(bucket).get(name)
            if generation is not None and int(generation) != (present.generation if present else 0):
                raise GcsError(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
            stored = StoredObject(data, next(self._generations), metadata, f'"{hashlib.md5(data).hexdigest()}"')
            self.objects(bucket)[name] = stored
            return stored

    def remove(self, bucket: str, name: str) -> None:
        with self._lock:
            self.read(bucket, name)
            del self.objects(bucket)[name]

    def list(self, bucket: str, query: dict[str, str]) -> str:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        limit = min(int(query.get("max-keys", self.page_size)), self.page_size)
        found: list[tuple[str, StoredObject | None]] = []
        for name in sorted(self.objects(bucket).copy(), key=str.encode):
            if not name.startswith(prefix):
                continue
            rest, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            entry = prefix + rest + cut if cut else name
            if entry.encode() <= after.encode() or (found and found[-1][0] == entry):
                continue
            found.append((entry, None if cut else self.objects(bucket)[name]))
            if len(found) > limit:
                break
        page, more = found[:limit], len(found) > limit
        lines = [
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if stored is None
            else f"<Contents><Key>{escape(name)}</Key><Generation>{stored.generation}</Generation>"
            f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{escape(stored.etag)}</ETag>"
            f"<Size>{len(stored.data)}</Size></Contents>"
            for name, stored in page
        ]
        token = f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult xmlns='http://doc.s3.amazonaws.com/2006-03-01'><Name>{bucket}</Name>"
            f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(lines)}</ListBucketResult>"
        )

    # -- multipart uploads --------------------------------------------------------------------------------------------

    def start_upload(self, bucket: str, name: str, metadata: dict[str, str]) -> str:
        self.objects(bucket)
        upload_id = secrets.token_urlsafe(24)
        self.uploads[upload_id] = Upload(bucket, name, metadata)
        return upload_id

    def upload(self, upload_id: str) -> Upload:
        try:
            return self.uploads[upload_id]
        except KeyError:
            raise GcsError(
                404, "NoSuchUpload", "The upload does not exist: completed, aborted or never begun."
            ) from None

    def finish_upload(self, upload_id: str, manifest: bytes) -> StoredObject:
        with self._lock:
            upload = self.upload(upload_id)
            wanted = [
                (int(part.findtext("{*}PartNumber") or 0), part.findtext("{*}ETag") or "")
                for part in ElementTree.fromstring(manifest)
            ]
            if not wanted or wanted != sorted(set(wanted)):
                raise GcsError(400, "InvalidPartOrder", "The parts must be listed in order.")
            for number, etag in wanted:
                if _etag(upload.parts.get(number, b"")).strip('"') != etag.strip('"'):
                    raise GcsError(400, "InvalidPart", f"Part {number} is missing, or has another ETag.")
            if any(len(upload.parts[number]) < MIN_PART_BYTES for number, _ in wanted[:-1]):
                raise GcsError(400, "EntityTooSmall", "All parts but the last must be of 5 MiB or more.")
            del self.uploads[upload_id]
        data = b"".join(upload.parts[number] for number, _ in wanted)
        return self.write(upload.bucket, upload.name, data, upload.metadata, None)

    def check_token(self, authorization: str) -> None:
        kind, _, token = authorization.partition(" ")
        if kind != "Bearer" or not token:
            raise GcsError(401, "AuthenticationRequired", "Authentication required.")
        self.bearers_seen.add(token)
        if self.valid_tokens is not None and token not in self.valid_tokens:
            raise GcsError(401, "InvalidSecurity", "The provided security credentials are not valid.")

    def new_token(self) -> str:
        self.tokens.append("ya29.test-" + secrets.token_urlsafe(16))
        return self.tokens[-1]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not want the rest of an answer goes away."""


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _handler_of(gcs: GcsEmulator) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            parts = urlsplit(self.path)
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            try:
                if parts.path == TOKEN_PATH:
                    return self._token()
                gcs.check_token(self.headers.get("authorization", ""))
                bucket, _, name = unquote(parts.path).removeprefix("/").partition("/")
                if name:
                    self._object(bucket, name, query, body)
                elif self.command == "GET":
                    self._answer(200, gcs.list(bucket, query).encode())
                else:
                    raise GcsError(501, "NotImplemented", f"This emulator has no {self.command} of a bucket.")
            except GcsError as error:
                text = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{error.code}</Code><Message>{error}</Message></Error>"
                self._answer(error.status, text.encode())

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        def _object(self, bucket: str, name: str, query: dict[str, str], body: bytes) -> None:
            metadata = {
                key.lower(): value for key, value in self.headers.items() if key.lower().startswith("x-goog-meta-")
            }
            match self.command:
                case "PUT" if "uploadId" in query:
                    gcs.upload(query["uploadId"]).parts[int(query["partNumber"])] = body
                    self._answer(200, b"", ETag=_etag(body))
                case "PUT":
                    precondition = self.headers.get("x-goog-if-generation-match")
                    self._answer_written(gcs.write(bucket, name, body, metadata, precondition))
                case "POST" if "uploads" in query:
                    upload_id = gcs.start_upload(bucket, name, metadata)
                    text = f"<Bucket>{bucket}</Bucket><Key>{escape(name)}</Key><UploadId>{upload_id}</UploadId>"
                    self._answer(200, f"<InitiateMultipartUploadResult>{text}</InitiateMultipartUploadResult>".encode())
                case "POST" if "uploadId" in query:
                    stored = gcs.finish_upload(query["uploadId"], body)
                    text = f"<Bucket>{bucket}</Bucket><Key>{escape(name)}</Key><ETag>{escape(stored.etag)}</ETag>"
                    text = f"<CompleteMultipartUploadResult>{text}</CompleteMultipartUploadResult>"
                    self._answer_written(stored, text.encode())
                case "DELETE" if "uploadId" in query:
                    gcs.upload(query["uploadId"])
                    del gcs.uploads[query["uploadId"]]
                    self._answer(204, b"")
                case "DELETE":
                    gcs.remove(bucket, name)
                    self._answer(204, b"")
                case "GET" | "HEAD":
                    self._read(gcs.read(bucket, name))
                case _:
                    raise GcsError(501, "NotImplemented", f"This emulator has no {self.command} of an object.")

        def _read(self, stored: StoredObject) -> None:
            expected = self.headers.get("if-match")
            if expected and expected.strip('"') != stored.etag.strip('"'):
                raise GcsError(412, "PreconditionFailed", "At least one of the pre-conditions did not hold.")
            size, headers = len(stored.data), {**stored.metadata, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
            if not wanted:
                return self._answer_written(stored, stored.data, **headers)
            start, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
            if start >= size:
                raise GcsError(416, "InvalidRange", "The requested range cannot be satisfied.")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self._answer_written(stored, stored.data[start:stop], 206, **headers)

        def _token(self) -> None:
            if self.headers.get("metadata-flavor") != "Google":
                raise GcsError(403, "Forbidden", "Missing Metadata-Flavor:Google header.")
            token = {"access_token": gcs.new_token(), "expires_in": 3599, "token_type": "Bearer"}
            self._answer(200, json.dumps(token).encode(), **{"Metadata-Flavor": "Google"})

        def _answer_written(self, stored: StoredObject, body: bytes = b"", status: int = 200, **headers: str) -> None:
            self._answer(status, body, **{"ETag": stored.etag, "x-goog-generation": str(stored.generation), **headers})

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": "application/xml", **headers}.items():
                self.send_header(key, value)
            if status != 204:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    return Handler
