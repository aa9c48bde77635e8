"""Every broker the queues' tests run against: real servers where Debian has them, HTTP emulators of the clouds' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Broker:
    url: str
    environment: dict[str, str] = field(default_factory=dict)
    """Of processes that open the URL."""
    restart: Callable[[], None] | None = None
    """Killed without warning and started again over the same files; None: it is no process of its own."""
    back_at_once: bool = False
    """A killed worker's lease comes back when its connection ends, not when its time is over."""
    sees_all_leases: bool = True
    """Depth counts those of other workers."""


@contextmanager
def sqlite(folder: Path) -> Iterator[Broker]:
    yield Broker(f"sqlite://{folder}/queue.db")


Opener = Callable[[Path], AbstractContextManager[Broker]]
BROKERS: dict[str, Opener] = {"sqlite": sqlite}


@pytest.fixture(scope="session", params=BROKERS)
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One server for all tests of a session; each has a queue of its own name."""
    with (
        BROKERS[request.param](tmp_path_factory.mktemp(request.param)) as started,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started
