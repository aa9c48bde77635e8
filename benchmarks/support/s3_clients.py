"""Uploads of one object in parts by the clients that people use, each in its fastest settings: what is raw here."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
BUCKET, REGION = "bucket", "us-east-1"
PART_BYTES = 16 * 2**20
PARTS_AT_ONCE = 8
FASTEST = "obstore"
CHECKSUMMED = "obstore, CRC64-NVME"
"""What S3 checks on arrival: the others send none."""
Upload = Callable[[memoryview, str], None]


@contextmanager
def server(bytes_per_second: float | None = None) -> Iterator[str]:
    """Its endpoint; credentials for it are in the environment. `bytes_per_second`: of its link; None: as fast as it can."""
    speed = [] if bytes_per_second is None else [str(bytes_per_second)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.support.s3_server", *speed],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout and process.stdin
        port = process.stdout.readline().strip()
        if not port:
            raise SystemExit("the S3 server did not start")
        os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
        os.environ.pop("AWS_PROFILE", None)
        yield f"http://127.0.0.1:{port}"
    finally:
        assert process.stdin
        process.stdin.close()
        process.wait()


def uploads(endpoint: str) -> tuple[dict[str, Upload], dict[str, str]]:
    """By client; and why a client can't be had here."""
    found: dict[str, Upload] = {}
    missing: dict[str, str] = {}
    for name, make in (
        (FASTEST, _obstore),
        (CHECKSUMMED, lambda endpoint: _obstore(endpoint, checksum_algorithm="crc64nvme")),
        ("boto3", _boto3),
        ("s3torchconnector", _s3torchconnector),
    ):
        try:
            found[name] = make(endpoint)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    return found, missing


def _obstore_client(endpoint: str, **options: Any) -> Any:
    from obstore.store import S3Store

    return S3Store(
        BUCKET,
        region=REGION,
        endpoint=endpoint,
        unsigned_payload=True,  # as over TLS: without it the whole body is hashed for the signature
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
        **options,
    )


def _obstore(endpoint: str, **options: Any) -> Upload:
    import obstore

    client = _obstore_client(endpoint, **options)

    def upload(data: memoryview, key: str) -> None:
        pieces = (data[start : start + PART_BYTES] for start in range(0, len(data), PART_BYTES))
        obstore.put(client, key, pieces, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)

    return upload


def _boto3(endpoint: str) -> Upload:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore import UNSIGNED
    from botocore.config import Config

    client = boto3.client(
        "s3",
        region_name=REGION,
        endpoint_url=endpoint,
        config=Config(
            signature_version=UNSIGNED,  # signed over plain HTTP, the whole body would be hashed; over TLS it is not
            request_checksum_calculation="when_required",
            max_pool_connections=PARTS_AT_ONCE,
            s3={"addressing_style": "path"},
        ),
    )
    transfer = TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE
    )

    def upload(data: memoryview, key: str) -> None:
        client.upload_fileobj(_MemoryFile(data), BUCKET, key, Config=transfer)

    return upload


class _MemoryFile(io.RawIOBase):
    """io.BytesIO would copy it all first."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._place = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: len(self._data)}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        stop = len(self._data) if size < 0 else self._place + size
        piece = bytes(self._data[self._place : stop])
        self._place += len(piece)
        return piece


def _s3torchconnector(endpoint: str) -> Upload:
    from s3torchconnector import S3Checkpoint, S3ClientConfig

    checkpoint = S3Checkpoint(
        REGION,
        endpoint,
        S3ClientConfig(throughput_target_gbps=100.0, part_size=PART_BYTES, unsigned=True, force_path_style=True),
    )

    def upload(data: memoryview, key: str) -> None:
        with checkpoint.writer(f"s3://{BUCKET}/{key}") as writer:
            for start in range(0, len(data), PART_BYTES):
                writer.write(data[start : start + PART_BYTES])

    return upload


class Download:
    """An object into memory that is there, in ranges side by side, by obstore."""

    def __init__(self, endpoint: str) -> None:
        self._client = _obstore_client(endpoint)

    def __call__(self, key: str, into: memoryview) -> None:
        import obstore

        def read(start: int) -> None:
            stop = min(start + PART_BYTES, len(into))
            into[start:stop] = memoryview(obstore.get_range(self._client, key, start=start, end=stop))

        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            list(pool.map(read, range(0, len(into), PART_BYTES)))

    def delete(self, key: str) -> None:
        import obstore

        obstore.delete(self._client, key)
