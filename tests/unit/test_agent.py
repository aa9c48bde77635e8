"""What a machine says and does while its store refuses, or is slow."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from holdfast.clock import WallClock
from holdfast.errors import ConfigError
from holdfast.runtime import contract
from holdfast.runtime.agent import Agent
from holdfast.runtime.metadata import Notice
from holdfast.runtime.watchers import LeaseWatcher
from holdfast.storage import DirectoryStore
from holdfast.storage.protocol import Data


class Refusing(DirectoryStore):
    """Takes the first `takes` objects, then none for `seconds`."""

    takes = 0
    seconds = 0.0
    refused_at: float | None = None

    def put(self, key: str, data: Data | Iterable[Data]) -> None:
        self._refuse()
        super().put(key, data)

    def create(self, key: str, data: Data | Iterable[Data]) -> None:
        self._refuse()
        super().create(key, data)

    def _refuse(self) -> None:
        self.takes -= 1
        if self.takes < 0:
            self.refused_at = self.refused_at or time.monotonic()
            if time.monotonic() - self.refused_at < self.seconds:
                raise ConfigError("403 AccessDenied")


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """Of a program that ends well after three seconds, on a store that refuses everything from the start."""
    (tmp_path / "code").mkdir()
    orders = {
        "notice_poll_seconds": 60,
        "env": {},
        "python": True,
        "command": ["-c", "import time; time.sleep(3)"],
    }
    (tmp_path / "agent.json").write_text(json.dumps(orders))
    monkeypatch.setenv(contract.STORE, f"file://{tmp_path}/store")
    monkeypatch.setenv(contract.RUN, "light")
    monkeypatch.setenv(contract.ATTEMPT, "1")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    made = Agent(tmp_path)
    made.store = Refusing(tmp_path / "store")
    made.store.seconds = 1.5
    yield made
    for watcher in made.watchers:  # or the lease's would end the process of the tests, when it is over
        watcher.stop()
    for number, handler in before.items():
        signal.signal(number, handler)


def end_of(agent: Agent) -> str:
    agent.run()
    return json.loads(agent.store.get("runs/light/attempts/0001/end.json"))["outcome"]


def test_a_store_that_refuses_what_it_took_before_ends_no_training(agent: Agent) -> None:
    assert isinstance(agent.store, Refusing)
    agent.store.takes = 1
    assert end_of(agent) == "finished"
    assert agent.store.refused_at


def test_a_store_that_refuses_from_the_start_ends_the_attempt_at_once(agent: Agent) -> None:
    assert end_of(agent) == "program-failed"


def test_a_machine_is_heard_of_while_it_moves_a_large_folder(agent: Agent) -> None:
    assert isinstance(agent.store, Refusing)
    agent.store.takes = 1000
    restore, finish = agent.folders.restore, agent.folders.finish
    heard: list[str] = []

    def last_heard() -> str:
        return json.loads(agent.store.get("runs/light/attempts/0001/heartbeat.json"))["at"]

    def slow_restore() -> dict[str, str]:
        time.sleep(2.5)
        heard.append(last_heard())
        return restore()

    def slow_finish() -> list[dict[str, Any]]:
        heard.append(last_heard())
        time.sleep(4.5)
        heard.append(last_heard())
        return finish()

    agent.folders.restore = slow_restore  # type: ignore[method-assign]
    agent.folders.finish = slow_finish  # type: ignore[method-assign]
    assert end_of(agent) == "finished"
    assert len(set(heard)) == 3


def test_a_lease_ends_although_the_store_refuses_to_show_it(tmp_path: Path) -> None:
    clock, store = WallClock(), DirectoryStore(tmp_path)
    ends = clock.now() + timedelta(seconds=0.5)
    lease = {"attempt": 1, "expires_at": ends.isoformat(), "stop": ""}
    store.put(contract.lease_key("light"), json.dumps(lease).encode())
    answers = [store.get]

    def get(key: str) -> bytes:
        if not answers:
            raise ConfigError("403 AccessDenied")
        return answers.pop()(key)

    shown = DirectoryStore(tmp_path)
    shown.get = get  # type: ignore[method-assign]
    told: list[Notice] = []
    heard = threading.Event()

    def tell(notice: Notice) -> None:
        told.append(notice)
        heard.set()

    watcher = LeaseWatcher(shown, "light", 1, clock, 0.1, tell, power_off=lambda: None)
    watcher.start()
    assert heard.wait(10)
    watcher.stop()
    assert told[0].kind == "lease"
