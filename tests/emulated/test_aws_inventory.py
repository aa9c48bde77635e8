"""Machines of one region through a lying description: what is missing is not lost, what is old is not shared."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from holdfast.clock import WallClock
from holdfast.drivers.aws.inventory import Inventory
from holdfast.drivers.protocol import CapacityPool, Machine
from holdfast.errors import TransientError
from tests.contract.machines import wait_for

POOL = CapacityPool("aws", "us-east-1", "us-east-1a", "c7i.large", "spot")


def machine(name: str = "i-1", state: str = "running", **changes: Any) -> Machine:
    given = {"launched_at": datetime(2026, 11, 24, 20, tzinfo=UTC), **changes}
    return Machine(id=name, pool=POOL, state=state, **given)  # type: ignore[arg-type]


class Ec2:
    """What EC2 would show, and how often it was asked."""

    def __init__(self, *shown: Machine) -> None:
        self.shown = list(shown)
        self.asked = 0
        self.failure: TransientError | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self) -> list[Machine]:
        self.asked += 1
        shown = list(self.shown)  # as of the moment it was asked, like a slow answer
        self.may_answer.wait(10)
        if self.failure:
            raise self.failure
        return shown


def inventory(ec2: Ec2, unseen_seconds: float = 0.1) -> Inventory:
    return Inventory("us-east-1", WallClock(), ec2, unseen_seconds)


def states(of: Inventory) -> list[str]:
    return [one.state for one in of.machines(0)]


def test_a_machine_that_is_never_shown_counts_as_ended_in_the_end() -> None:
    here = inventory(Ec2())
    here.launched(machine(state="pending"))
    assert here.may_be_hidden("i-1") and states(here) == ["pending"]
    wait_for(lambda: states(here) == ["terminated"], 5)
    (over,) = here.machines(0)
    assert "never showed" in over.detail and over.terminated_at and not here.may_be_hidden("i-1")


def test_a_machine_that_is_missing_once_after_a_long_pause_is_as_it_was() -> None:
    ec2 = Ec2(machine())
    here = inventory(ec2)
    assert states(here) == ["running"]
    time.sleep(0.2)
    ec2.shown = []
    assert states(here) == ["running"]
    ec2.shown = [machine()]
    assert states(here) == ["running"]
    time.sleep(0.2)
    ec2.shown = []
    assert states(here) == ["running"]
    wait_for(lambda: states(here) == ["terminated"], 5)
    assert "no longer" in here.machines(0)[0].detail


def test_an_end_is_told_once_and_never_taken_back() -> None:
    ec2 = Ec2(machine(state="terminated", reason="preempted"))
    here = inventory(ec2)
    (over,) = here.machines(0)
    assert over.terminated_at and datetime.now(UTC) - over.terminated_at < WallClock().now() - over.launched_at
    ec2.shown = [machine(state="running")]
    assert here.machines(0) == [over]
    ec2.shown = []
    time.sleep(0.2)
    assert here.machines(0) == [over]


def test_what_was_asked_before_a_launch_does_not_answer_who_asks_after_it() -> None:
    ec2 = Ec2()
    here = inventory(ec2)
    ec2.may_answer.clear()
    first = threading.Thread(target=here.machines, args=(0,))
    first.start()
    wait_for(lambda: ec2.asked == 1)
    ec2.shown = [machine(state="stopping")]
    here.changed()  # as after a termination
    found: list[list[Machine]] = []
    second = threading.Thread(target=lambda: found.append(here.machines(0)))
    second.start()
    ec2.may_answer.set()
    first.join()
    second.join()
    assert [one.state for one in found[0]] == ["stopping"] and ec2.asked == 2


def test_a_failure_is_shared_by_who_waited_and_an_older_answer_still_does() -> None:
    ec2 = Ec2(machine())
    here = inventory(ec2)
    assert states(here) == ["running"]
    ec2.failure = TransientError("EC2 is away")
    ec2.may_answer.clear()
    raised: list[Exception] = []

    def ask() -> None:
        try:
            here.machines(0)
        except TransientError as error:
            raised.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: ec2.asked == 2)
    time.sleep(0.1)
    ec2.may_answer.set()
    for thread in threads:
        thread.join()
    assert ec2.asked == 2 and [str(error) for error in raised] == ["EC2 is away"] * 4
    assert len({id(error) for error in raised}) == 4
    assert [one.id for one in here.machines(60)] == ["i-1"] and ec2.asked == 2
    with pytest.raises(TransientError):
        here.machines(0)
