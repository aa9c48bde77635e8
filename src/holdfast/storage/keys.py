"""Which names an object may have: the same in every store, so that a run can move from one to another."""

from __future__ import annotations

import re

from holdfast.errors import ConfigError

STAGED_SUFFIX = ".staged"
"""A directory's half-written objects end so."""
CONTROL = re.compile(r"[\0-\x1f\x7f]")
MAX_KEY_BYTES = 1024
"""https://docs.aws.amazon.com/AmazonS3/latest/userguide/object-keys.html; GCS has the same."""


def is_key(text: str) -> bool:
    bad_part = any(part in ("", ".", "..") for part in text.split("/"))
    return not (bad_part or CONTROL.search(text) or text.endswith(STAGED_SUFFIX) or len(text.encode()) > MAX_KEY_BYTES)


def check_key(key: str) -> None:
    """Raises ConfigError."""
    if not is_key(key):
        raise ConfigError(
            f"{key!r} is no key of an object: it must be relative, without empty or dotted parts or control characters"
        )
