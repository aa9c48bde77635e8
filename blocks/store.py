"""Checkpoint stores: where runs leave their checkpoints, journals and summaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode

import boto3
import botocore.exceptions
import google.auth
from google.auth.exceptions import GoogleAuthError
from prefect.blocks.core import Block
from prefect_aws import S3Bucket
from prefect_gcp.cloud_storage import GcsBucket
from pydantic import Field, model_validator

from blocks.credentials import GOOGLE_REMEDY, READ_AGAIN_SECONDS, Reload, aws_session, google_credentials
from blocks.loading import load_now, load_saved
from holdfast.errors import ConfigError
from holdfast.storage import ObjectStore, open_store
from holdfast.supervision.doctor import examine_store, to_text

DEFAULT_URL = ".holdfast"


class CheckpointStore(Block):
    """An S3 bucket, a GCS bucket, or a folder with the semantics of an object store."""

    _block_type_name: ClassVar[str] = "Checkpoint Store"
    _block_type_slug: ClassVar[str] = "checkpoint-store"

    url: str = Field(
        "",
        title="Folder or URL",
        description="A folder, or file://, s3://bucket/prefix, gs://bucket/prefix. A bucket named so is reached with the "
        f"credentials that this computer has. Empty, and no bucket below: the folder {DEFAULT_URL}.",
    )
    s3_bucket: S3Bucket | None = Field(None, title="S3 bucket", repr=False)  # their credentials print their tokens
    gcs_bucket: GcsBucket | None = Field(None, title="GCS bucket", repr=False)
    machine_role: str = Field(
        "",
        title="Role for Google's machines",
        description="Of an S3 bucket: the ARN of the role that machines of Google Cloud take on to reach it.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> CheckpointStore:
        named = [name for name in ("url", "s3_bucket", "gcs_bucket") if getattr(self, name)]
        if len(named) > 1:
            raise ValueError(f"a store is one place; this one names {' and '.join(named)}: drop all but one")
        if self.machine_role and not (self.s3_bucket or self.url.startswith("s3://")):
            raise ValueError("machine_role is for an S3 bucket, and this store is none: drop it")
        return self

    def store(self, read_again_seconds: float = READ_AGAIN_SECONDS) -> ObjectStore:
        """The object store; `read_again_seconds` as of an account. Raises ConfigError when it can't be one."""
        if self.s3_bucket:
            bucket = self.s3_bucket
            client = bucket.credentials.aws_client_parameters
            query = {
                "region": bucket.credentials.region_name,
                "endpoint": client.endpoint_url,
                "role": self.machine_role,
            }
            session = aws_session(bucket.credentials, self._reload(), read_again_seconds)
            return open_store(_url("s3", bucket.bucket_name, bucket.bucket_folder, query), session)
        if self.gcs_bucket:
            gcs = self.gcs_bucket
            url = _url("gs", gcs.bucket, gcs.bucket_folder, {})
            return open_store(url, credentials=google_credentials(gcs.gcp_credentials))
        url = self.url or DEFAULT_URL
        if self.machine_role:
            url += ("&" if "?" in url else "?") + urlencode({"role": self.machine_role})
        return open_store(url if "://" in url else str(Path(url).absolute()), credentials=_found_here(url))

    def _reload(self) -> Reload | None:
        name = self._block_document_name
        return (lambda: load_now(CheckpointStore, name).s3_bucket.credentials) if name else None

    def check(self) -> str:
        """One screen: every right that a run needs of its store, and whether it is there."""
        return to_text(examine_store(self.store))


def load_store(name: str) -> CheckpointStore:
    """The saved store block of that name; `local` works unsaved. Raises ConfigError."""
    return load_saved(name, "store", [CheckpointStore], {"local": CheckpointStore})


def _found_here(url: str) -> Any:
    """What boto3 and Google's libraries find on this computer: profiles, single sign-on, application-default files."""
    if url.startswith("s3://"):
        try:
            return boto3.Session()
        except botocore.exceptions.BotoCoreError as error:
            raise ConfigError(f"store: {url!r}: {error}; correct this computer's profiles, or AWS_PROFILE") from error
    if url.startswith("gs://"):
        try:
            credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
        except GoogleAuthError as error:
            raise ConfigError(
                f"store: {url!r} needs Google credentials, and this computer has none: {error}; {GOOGLE_REMEDY}"
            ) from error
        return credentials
    return None


def _url(scheme: str, bucket: str, folder: str, query: dict[str, str | None]) -> str:
    place = "/".join(part for part in (bucket, folder.strip("/")) if part)
    given = urlencode({name: value for name, value in query.items() if value})
    return f"{scheme}://{place}" + (f"?{given}" if given else "")
