"""Checkpoint stores: where runs leave their checkpoints, journals and summaries."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import Field

from blocks.loading import load_saved
from holdfast.storage import ObjectStore, open_store

DEFAULT_URL = ".holdfast"


class CheckpointStore(Block):
    """A folder with the semantics of an object store."""

    _block_type_name: ClassVar[str] = "Checkpoint Store"
    _block_type_slug: ClassVar[str] = "checkpoint-store"

    url: str = Field(
        DEFAULT_URL, title="Folder", description="A folder, or a file:// URL. Every machine must reach it."
    )

    def store(self) -> ObjectStore:
        return open_store(self.url if "://" in self.url else str(Path(self.url).absolute()))


def load_store(name: str) -> CheckpointStore:
    """The saved store block of that name; `local` works unsaved. Raises ConfigError."""
    return load_saved(name, "store", [CheckpointStore], {"local": CheckpointStore})
