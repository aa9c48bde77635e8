"""How long a broker that is away is waited for."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from holdfast.errors import TransientError

RETRY_SECONDS = 60.0
"""A broker's restart takes less."""
OPENING_SECONDS = 5.0
"""Whoever opens a queue that isn't there learns it soon."""
T = TypeVar("T")
log = logging.getLogger(__name__)


def persist(attempt: Callable[[], T], retry_seconds: float = RETRY_SECONDS) -> T:
    """`attempt` until it succeeds or `retry_seconds` are over; only its TransientErrors are worth a second time."""
    give_up_at = time.monotonic() + retry_seconds
    pause, failures = 0.05, 0
    while True:
        try:
            result = attempt()
        except TransientError as error:
            if time.monotonic() + pause > give_up_at:
                raise
            if not failures:
                log.warning("queue: %s; asked again for %.0f s", error, retry_seconds)
            failures += 1
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 2.0)
        else:
            if failures:
                log.info("queue: answers again after %d refusals", failures)
            return result


def poll(look: Callable[[], list[T]], wait_seconds: float, longest_pause_seconds: float = 0.25) -> list[T]:
    """What `look` finds, asked again for `wait_seconds` while it finds nothing."""
    give_up_at = time.monotonic() + wait_seconds
    pause = 0.005
    while not (found := look()) and (left := give_up_at - time.monotonic()) > 0:
        # Jitter: idle workers must not all come at the same instant.
        time.sleep(min(left, pause * random.uniform(0.5, 1.0)))
        pause = min(pause * 2, longest_pause_seconds)
    return found
