"""The object store: everything a run leaves behind, and the only thing that its parts share."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

from holdfast.errors import ConfigError
from holdfast.storage.address import OPTIONS, Address
from holdfast.storage.directory import DirectoryStore
from holdfast.storage.protocol import ObjectInfo, ObjectStore

__all__ = ["DirectoryStore", "ObjectInfo", "ObjectStore", "open_store"]


def open_store(url: str, credentials: Any = None) -> ObjectStore:
    """The store that `url` names: a folder, `file://`, `s3://bucket/prefix?region=...&endpoint=...`, `gs://...`.

    `credentials`: a boto3 or botocore session for S3, google.auth credentials for GCS; without them the environment's,
    or the machine's own role. `store.url` opens the same store on another machine. Nothing is asked of the store yet.
    Raises ConfigError for a scheme that no store here speaks, and for a URL that says what its store can't.
    """
    parts = urlsplit(url)
    if parts.scheme in OPTIONS:
        from holdfast.storage.cloud import CloudStore

        return CloudStore(Address.parse(url), credentials)
    if parts.scheme == "file" and not parts.netloc:
        return DirectoryStore(unquote(parts.path))
    if not parts.scheme:
        return DirectoryStore(url)
    raise ConfigError(f"store {url!r}: no store speaks {parts.scheme!r}; use a folder, or file://, s3:// or gs://")
