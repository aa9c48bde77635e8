"""Blocks by name, with an answer for names that nobody has saved."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from pydantic import ValidationError

from holdfast.errors import ConfigError
from holdfast.model import validation_message

Saved = TypeVar("Saved", bound=Block)


def load_saved(
    name: str, field: str, types: Sequence[type[Saved]], built_in: Mapping[str, Callable[[], Saved]]
) -> Saved:
    """The block `name`, of the first of `types` that has one. Raises ConfigError naming field, value and remedy."""
    known: list[str] = []
    with get_client(sync_client=True) as client:
        registered = {block_type.slug for block_type in client.read_block_types()}
        for block_type in types:
            slug = block_type.get_block_type_slug()
            names = [saved.name for saved in client.read_block_documents_by_type(slug)] if slug in registered else []
            known += [saved for saved in names if saved]
            if name in names:
                try:
                    return block_type.load(name)
                except ValidationError as error:
                    raise ConfigError(f"{field}: block {slug}/{name}: {validation_message(error)}") from error
    if name in built_in:
        return built_in[name]()
    close = difflib.get_close_matches(name, [*known, *built_in], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "save one in the UI under Blocks"
    raise ConfigError(f"{field}: no block is called {name!r}; {hint}")
