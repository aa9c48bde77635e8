"""Machines of a local cloud for the contract tests: how they are asked for, and how their end is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.drivers.protocol import CapacityPool, Driver, LaunchRequest, Machine

T = TypeVar("T")
AWS_POOL = CapacityPool("local", "local-1", "local-1a", "c7i.large", "spot")
GCP_POOL = CapacityPool("local", "local-2", "local-2a", "n2-standard-2", "spot")
POOLS = {"aws": AWS_POOL, "gcp": GCP_POOL}
SLEEP = "exec sleep 300"


def driver_of(root: Path, *fates: Fate, **changes: Any) -> LocalDriver:
    market = changes.pop("market", ScriptedMarket(spot=list(fates)))
    return LocalDriver(LocalCloudConfig(root=root, market=market, shutdown_grace_seconds=0.5, **changes))


def request(token: str, script: str = SLEEP, pool: CapacityPool = AWS_POOL, **changes: Any) -> LaunchRequest:
    given: dict[str, Any] = {"tags": {"holdfast-run": "run"}, "environment": {}, **changes}
    return LaunchRequest(token=token, pool=pool, startup_script=script, **given)


def described(driver: Driver, machine: Machine) -> Machine:
    return next(one for one in driver.machines({}) if one.id == machine.id)


def wait_for(condition: Callable[[], T | None], seconds: float = 30.0) -> T:
    """What `condition` returns when it first is something."""
    give_up_at = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up_at, "timed out"
        time.sleep(0.005)
    return found


def ended(driver: Driver, machine: Machine) -> Machine:
    """The machine as it is described after its end."""

    def over() -> Machine | None:
        now = described(driver, machine)
        return now if now.state == "terminated" else None

    return wait_for(over)


def line_of(driver: Driver, machine: Machine, beginning: str) -> str:
    """The rest of the first console line that begins so."""

    def said() -> list[str]:
        over = described(driver, machine).state == "terminated"
        console = driver.console(machine.id, machine.pool)
        lines = [line for line in console.rpartition("\n")[0].splitlines() if line.startswith(beginning)]
        assert lines or not over, f"the machine has ended and never said {beginning!r}:\n{console}"
        return lines

    return wait_for(said)[0].removeprefix(beginning).strip()


@contextmanager
def nothing_left(driver: Driver) -> Iterator[None]:
    """Whatever the test did, its machines end with it."""
    try:
        yield
    finally:
        for machine in driver.machines({}):
            driver.terminate(machine.id, machine.pool)
        wait_for(lambda: all(machine.state == "terminated" for machine in driver.machines({})))
