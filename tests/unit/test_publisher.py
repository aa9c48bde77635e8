"""What the watchers publish goes to Prefect's API behind their backs."""

from __future__ import annotations

import threading

import pytest

from tasks.progress import Publisher
from tests.chaos.runs import wait_until


def test_a_server_that_is_slow_holds_up_nobody_and_is_told_the_newest_only() -> None:
    publisher, answers, told = Publisher(), threading.Event(), []
    begun = threading.Event()

    def slow() -> None:
        begun.set()
        assert answers.wait(30)
        told.append("first")

    publisher.publish("progress", slow)
    assert begun.wait(30)
    for number in range(100):  # none of these calls waits
        publisher.publish("progress", lambda number=number: told.append(number))
    publisher.publish("plan", lambda: told.append("plan"))
    assert told == []
    answers.set()
    wait_until(lambda: len(told) == 3)
    assert told == ["first", 99, "plan"]


def test_a_call_that_fails_is_told_of_and_the_next_is_made(caplog: pytest.LogCaptureFixture) -> None:
    publisher, told = Publisher(), []

    def fail() -> None:
        raise ConnectionError("no server")

    publisher.publish("plan", fail)
    wait_until(lambda: "plan not shown error=ConnectionError('no server')" in caplog.text)
    publisher.publish("plan", lambda: told.append("plan"))
    wait_until(lambda: told == ["plan"])
