"""The object store: everything a run leaves behind, and the only thing that its parts share."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from holdfast.errors import ConfigError
from holdfast.storage.directory import DirectoryStore
from holdfast.storage.protocol import ObjectInfo, ObjectStore

__all__ = ["DirectoryStore", "ObjectInfo", "ObjectStore", "open_store"]


def open_store(url: str) -> ObjectStore:
    """The store that `url` names. Raises ConfigError for a scheme that no store here speaks."""
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc:
        return DirectoryStore(unquote(parts.path))
    if not parts.scheme:
        return DirectoryStore(url)
    raise ConfigError(f"store {url!r}: no store speaks {parts.scheme!r}; use a folder or a file:// URL")
