"""Blocks by name, with an answer for names that nobody has saved."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import httpx
from google.auth.exceptions import GoogleAuthError
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings
from pydantic import ValidationError

from blocks.credentials import GOOGLE_REMEDY
from holdfast.errors import ConfigError, TransientError

Saved = TypeVar("Saved", bound=Block)


def load_saved(
    name: str, field: str, types: Sequence[type[Saved]], built_in: Mapping[str, Callable[[], Saved]]
) -> Saved:
    """The block `name`, of the first of `types` that has one.

    Raises ConfigError naming field, value and remedy, and TransientError when Prefect's API does not answer.
    """
    known: list[str] = []
    with _prefect_answers(), get_client(sync_client=True) as client:
        registered = {block_type.slug for block_type in client.read_block_types()}
        for block_type in types:
            slug = block_type.get_block_type_slug()
            names = [saved.name for saved in client.read_block_documents_by_type(slug)] if slug in registered else []
            known += [saved for saved in names if saved]
            if name in names:
                with _block_is_right(f"{field}: block {slug}/{name}"):
                    return load_now(block_type, name)
    if name in built_in:
        return built_in[name]()
    close = difflib.get_close_matches(name, [*known, *built_in], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "save one in the UI under Blocks"
    raise ConfigError(f"{field}: no block is called {name!r}; {hint}")


def load_now(block_type: type[Saved], name: str) -> Saved:
    """`Block.load`, which in a thread with an event loop would be a coroutine."""
    return block_type.load(name, _sync=True)  # type: ignore[call-arg]


@contextmanager
def _block_is_right(what: str) -> Iterator[None]:
    # `from None`: pydantic's own words hold the block's values, keys and tokens too, and a traceback would print them.
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None
    except GoogleAuthError as error:
        raise ConfigError(f"{what}: no Google credentials: {error}; {GOOGLE_REMEDY}") from None
    except (RuntimeError, ValueError) as error:
        invalid = error if isinstance(error, ValidationError) else error.__cause__  # Prefect wraps what pydantic says
        if not isinstance(invalid, ValidationError):
            raise
        raise ConfigError(
            f"{what}: {_complaints(invalid)}; correct it in the UI under Blocks, or save it anew"
        ) from None


def _complaints(error: ValidationError) -> str:
    """Fields and what is wrong with them, without the values: a block's may be secrets."""
    complaints = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(
        ": ".join(part for part in (".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")) if part)
        for one in complaints
    )


@contextmanager
def _prefect_answers() -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        url = get_current_settings().api.url
        raise TransientError(
            f"Prefect's API at {url} does not answer ({error}); start it (prefect server start), or correct PREFECT_API_URL"
        ) from error
