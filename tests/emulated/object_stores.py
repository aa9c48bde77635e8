"""S3 of the tests: moto's, served from a thread of this process, with what it lacks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self
from urllib.parse import quote

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

REGION = "us-east-1"
ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTESTTEST", "secret-of-the-tests"
ACCOUNT = "123456789012"
"""moto's own."""


class S3Emulator:
    """`with S3Emulator("bucket-a") as s3: open_store(s3.url("bucket-a", "prefix"))`. Its buckets go when it ends.

    moto keeps its state in the process: another emulator of this process sees the same buckets.
    """

    def __init__(self, *buckets: str, certificate: tuple[str, str] | None = None) -> None:
        """`certificate`: files of it and of its key, to be spoken to by TLS."""
        self._buckets, self._certificate = buckets, certificate
        # moto looks whether a key is free, then writes: of two at once both would win. One write at a time, then.
        app = _OneWriteAtATime(DomainDispatcherApplication(create_backend_app))
        self._server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet, ssl_context=certificate)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self.endpoint = f"{'https' if certificate else 'http'}://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="s3").start()
        for bucket in self._buckets:
            self.client().create_bucket(Bucket=bucket)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for account in s3_backends.values():
            for bucket in self._buckets:
                account["aws"].buckets.pop(bucket, None)
        for bucket in self._buckets:
            s3_backends.bucket_accounts.pop(bucket, None)

    def client(self) -> Any:
        """boto3's, to look at what is really there."""
        return self.session().client(
            "s3", endpoint_url=self.endpoint, verify=self._certificate[0] if self._certificate else None
        )

    def session(self) -> boto3.Session:
        return boto3.Session(aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, region_name=REGION)

    def contents(self, bucket: str) -> dict[str, bytes]:
        keys = self._bucket(bucket).keys
        return {name: keys[name].value for name in list(keys)}

    def unfinished_uploads(self, bucket: str) -> int:
        return len(self._bucket(bucket).multiparts)

    def fill(self, bucket: str, keys: Iterable[str]) -> None:
        """Many empty objects, quickly."""
        for key in keys:
            s3_backends[ACCOUNT]["aws"].put_object(bucket, key, b"")

    def _bucket(self, bucket: str) -> Any:
        return s3_backends[ACCOUNT]["aws"].buckets[bucket]

    def url(self, bucket: str, prefix: str = "", endpoint: str = "") -> str:
        """What open_store takes. `endpoint`: of a proxy in front."""
        return f"s3://{bucket}/{quote(prefix)}?region={REGION}&endpoint={endpoint or self.endpoint}"


class _OneWriteAtATime:
    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app, self._lock = app, threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._app(environ, start_response)
        with self._lock:
            return list(self._app(environ, start_response))


class _Quiet(WSGIRequestHandler):
    def log_request(self, *args: Any, **kwargs: Any) -> None:
        pass


logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # a part that arrives after its upload's end is a traceback
