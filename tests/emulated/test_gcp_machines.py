"""How machines of Google Cloud are described: what became of those that are gone, and what one description costs."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.cloud import compute_v1

from holdfast.drivers.gcp import operations_log
from holdfast.drivers.gcp.console import tail
from holdfast.drivers.gcp.driver import GcpDriver
from holdfast.drivers.local.config import Fate
from holdfast.drivers.protocol import Machine
from tests.contract.machines import described, ended, line_of, wait_for
from tests.emulated.gce import TOKEN, GceEmulator
from tests.emulated.test_gcp_launch import ON_DEMAND, SPOT, asked

QUICK = "#!/bin/bash\necho 'says: done'\n"
LIVING = {"pending", "running"}


@pytest.fixture
def gce(tmp_path: Path) -> Iterator[GceEmulator]:
    with GceEmulator(tmp_path / "gce") as emulator:
        yield emulator


def gone(gce: GceEmulator, driver: GcpDriver, machine: Machine) -> Machine:
    """Its end, when nothing of it is left in the project."""
    over = ended(driver, machine)
    wait_for(lambda: (driver.machines({}), machine.id not in gce.names)[1])
    return over


# -- ends -------------------------------------------------------------------------------------------------------------


def test_every_end_is_told_by_another_process_when_nothing_is_left_of_the_machine(tmp_path: Path) -> None:
    fates = [Fate(after_seconds=0.2, notice=False), Fate(), Fate(), Fate()]
    with GceEmulator(tmp_path / "gce", spot_fates=fates) as gce:
        driver = gce.driver()
        launches = {
            "preempted": asked("run-0001", tags={"holdfast-run": "run", "holdfast-attempt": "1"}),
            "terminated-by-user": asked("run-0002", tags={"holdfast-run": "run", "holdfast-attempt": "2"}),
            "ended-itself": asked(
                "run-0003", tags={"holdfast-run": "run", "holdfast-attempt": "3"}, startup_script=QUICK
            ),
            "host-failed": asked("run-0004", tags={"holdfast-run": "run", "holdfast-attempt": "4"}),
        }
        machines = {reason: driver.launch(request) for reason, request in launches.items()}
        driver.terminate(machines["terminated-by-user"].id, SPOT)
        wait_for(lambda: described(driver, machines["host-failed"]).state == "running")
        gce.fail_host(machines["host-failed"].id)
        overs = {reason: gone(gce, driver, machine) for reason, machine in machines.items()}
        assert {reason: over.reason for reason, over in overs.items()} == {reason: reason for reason in overs}
        assert overs["preempted"].detail == "Instance was preempted."
        assert gce.names == []

        program = """
import sys, json
from google.oauth2.credentials import Credentials
from holdfast.drivers.gcp import GcpConfig, GcpDriver
driver = GcpDriver(GcpConfig.model_validate_json(sys.argv[1]), Credentials(token=sys.argv[2]))
for attempt in "1234":
    (machine,) = driver.machines({"holdfast-run": "run", "holdfast-attempt": attempt})
    print(machine.id, machine.state, machine.reason, machine.pool, machine.terminated_at.isoformat(),
          machine.tags["holdfast-attempt"])
"""
        said = subprocess.run(
            [sys.executable, "-c", program, gce.config().model_dump_json(), TOKEN],
            capture_output=True,
            text=True,
            check=True,
        )
        for line, over in zip(said.stdout.splitlines(), overs.values(), strict=True):
            machine_id, state, reason, pool, at, attempt = line.split()
            assert (machine_id, state, reason, pool) == (over.id, "terminated", over.reason, str(SPOT))
            assert datetime.fromisoformat(at) == over.terminated_at and attempt == over.tags["holdfast-attempt"]


def test_a_machine_that_heard_its_notice_and_left_by_itself_was_preempted() -> None:
    at = datetime(2026, 11, 1, 12, tzinfo=UTC)

    def event(kind: str, seconds: float) -> operations_log.Event:
        when = at + timedelta(seconds=seconds)
        return operations_log.Event(kind, when, when, "system", "")

    def reason(*events: operations_log.Event) -> str:
        end = operations_log.Life("hf", "z", "1", list(events)).end
        return end.reason if end else ""

    preempted, itself = "compute.instances.preempted", "compute.instances.guestTerminate"
    assert reason(event("insert", 0), event(itself, 50), event(preempted, 52)) == "preempted"
    assert reason(event("insert", 0), event(itself, 50), event("delete", 60)) == "ended-itself"
    assert reason(event("delete", 50), event(itself, 51)) == "terminated-by-user"
    assert reason(event(preempted, 50), event("delete", 51)) == "preempted"
    assert reason(event("compute.instances.terminateOnHostMaintenance", 9)) == "host-failed"
    assert reason(event("insert", 0), event("setMetadata", 9)) == ""


def test_the_cloud_s_own_switch_ends_a_machine_that_nobody_ends(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked(max_run_seconds=30))
    gce.age(machine.id, seconds=31)
    over = gone(gce, driver, machine)
    assert over.reason == "terminated-by-user" and "run limit" in over.detail


def test_a_machine_that_powered_itself_off_leaves_no_disk_behind(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked(startup_script=QUICK))
    gone(gce, driver, machine)
    assert gce.calls["instances.delete"] == 1


def test_a_stopped_machine_is_left_to_who_launched_it_for_a_while(gce: GceEmulator) -> None:
    machine = gce.driver().launch(asked(startup_script=QUICK))
    wait_for(lambda: gce.instance(machine.id).status == "TERMINATED")
    reaper = gce.driver()
    assert reaper.machines({})[0].reason == "ended-itself"
    assert gce.calls["instances.delete"] == 0 and gce.names == [machine.id]
    gce.instance(machine.id).last_stop_timestamp = (datetime.now(UTC) - timedelta(minutes=6)).isoformat()
    later = gce.driver()
    wait_for(lambda: (later.machines({}), gce.names == [])[1])


def test_an_end_is_final_and_does_not_change_with_what_is_found_later(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked(startup_script=QUICK))
    over = ended(driver, machine)
    wait_for(lambda: (driver.machines({}), gce.names == [])[1])
    assert described(driver, machine) == over
    driver.terminate(machine.id, SPOT)
    assert described(driver, machine) == over


# -- eventual consistency ---------------------------------------------------------------------------------------------


def test_an_instance_that_is_not_shown_yet_is_pending_and_not_lost(gce: GceEmulator) -> None:
    gce.invisible_seconds = 1.5
    driver = gce.driver()
    machine = driver.launch(asked())
    assert machine.state == "pending"
    assert [one.id for one in driver.machines({"holdfast-run": "run"})] == [machine.id]
    assert [one.state for one in driver.machines({"holdfast-run": "run"})] == ["pending"]
    assert driver.launch(asked()).id == machine.id
    shown = wait_for(lambda: next((one for one in driver.machines({}) if one.state == "running"), None))
    assert shown.id == machine.id and abs(shown.launched_at - machine.launched_at) < timedelta(seconds=1)
    assert len(gce.names) == 1


def test_an_instance_that_the_list_forgets_for_a_moment_stays_as_it_was(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked())
    before = wait_for(lambda: next((one for one in driver.machines({}) if one.state == "running"), None))
    gce.invisible_seconds = 1000.0
    assert driver.machines({}) == [before]
    gce.invisible_seconds = 0.0
    assert driver.machines({}) == [before] and before.id == machine.id


def test_an_instance_whose_deletion_failed_is_shown_as_what_it_is_and_can_be_deleted_again(
    gce: GceEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.drivers.gcp.machines.CLEAR_AGAIN_SECONDS", 0.5)
    driver = gce.driver()
    machine = driver.launch(asked())
    wait_for(lambda: next((one for one in driver.machines({}) if one.state == "running"), None))
    begin = gce._begin_deletion

    def fails(instance: Any, user: str = "") -> compute_v1.Operation:
        operation = gce._operation("delete", f"zones/{instance.zone}", f"instances/{machine.id}", done=True)
        gce._fail(operation, 503, "INTERNAL_ERROR", "Internal error.")
        return operation

    gce._begin_deletion = fails  # type: ignore[method-assign]
    driver.terminate(machine.id, SPOT)
    assert described(driver, machine).state == "stopping"
    time.sleep(0.6)
    assert described(driver, machine).state == "running"
    gce._begin_deletion = begin  # type: ignore[method-assign]
    driver.terminate(machine.id, SPOT)
    assert ended(driver, machine).reason == "terminated-by-user"


def test_an_instance_that_stays_away_unexplained_is_asked_for_by_name_and_then_over(
    gce: GceEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.drivers.gcp.machines.UNSEEN_SECONDS", 0.2)
    driver = gce.driver()
    machine = driver.launch(asked())
    gce.invisible_seconds = 1000.0
    time.sleep(0.3)
    over = described(driver, machine)
    assert (over.state, over.reason) == ("terminated", "host-failed") and "does not show" in over.detail


def test_a_zone_that_can_t_be_asked_loses_none_of_its_machines(
    gce: GceEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.drivers.gcp.machines.UNSEEN_SECONDS", 0.0)
    driver = gce.driver()
    for token, pool in (("run-0001", SPOT), ("run-0002", ON_DEMAND)):
        driver.launch(asked(token, pool))
    gce.unreachable.add("us-central1-a")
    assert {machine.state for machine in driver.machines({})} <= LIVING and len(driver.machines({})) == 2


# -- what a description costs -----------------------------------------------------------------------------------------


def test_all_pages_are_read(gce: GceEmulator) -> None:
    gce.page_size = 2
    driver = gce.driver()
    launched = {driver.launch(asked(f"run-{number:04d}")).id for number in range(5)}
    before = gce.calls["instances.aggregatedList"]
    assert {machine.id for machine in gce.driver().machines({"holdfast-run": "run"})} == launched
    assert gce.calls["instances.aggregatedList"] - before == 3


def test_a_hundred_callers_share_a_description(gce: GceEmulator) -> None:
    driver = gce.driver()
    launched = [
        driver.launch(asked(f"run-{n:04d}", tags={"holdfast-run": "run", "holdfast-attempt": str(n)})) for n in range(4)
    ]
    before = gce.calls["instances.aggregatedList"]
    with ThreadPoolExecutor(100) as pool:
        found = list(
            pool.map(
                lambda n: driver.machines({"holdfast-run": "run", "holdfast-attempt": str(n % 4)}, max_age_seconds=600),
                range(100),
            )
        )
    assert [machines[0].id for machines in found] == [launched[n % 4].id for n in range(100)]
    assert gce.calls["instances.aggregatedList"] - before == 1
    assert driver.machines({}, max_age_seconds=600) and gce.calls["instances.aggregatedList"] - before == 1
    assert driver.machines({}) and gce.calls["instances.aggregatedList"] - before == 2


def test_who_wants_a_fresh_description_never_gets_one_that_was_begun_before(gce: GceEmulator) -> None:
    """Callers that come while one is under way share the next one."""
    driver = gce.driver()
    driver.machines({})
    before = gce.calls["instances.aggregatedList"]
    entered = threading.Barrier(10)

    def ask() -> int:
        entered.wait()
        return len(driver.machines({}))

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda _: ask(), range(10)))
    assert 1 <= gce.calls["instances.aggregatedList"] - before <= 10


def test_machines_that_live_cost_one_call_a_description(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked())
    wait_for(lambda: described(driver, machine).state == "running")
    before = gce.calls.copy()
    for _ in range(10):
        driver.machines({"holdfast-run": "run"})
    assert gce.calls - before == {"instances.aggregatedList": 10}


def test_other_clouds_are_not_asked_for_here(gce: GceEmulator) -> None:
    driver = gce.driver()
    driver.launch(asked())
    calls = gce.calls.copy()
    assert driver.machines({}, cloud="aws") == [] and gce.calls == calls
    assert len(driver.machines({}, cloud="gcp")) == 1


# -- consoles ---------------------------------------------------------------------------------------------------------


def test_a_console_is_readable_after_the_end_and_by_another_process(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked(startup_script=QUICK))
    assert line_of(driver, machine, "says: ") == "done"
    gone(gce, driver, machine)
    assert driver.console(machine.id, SPOT).endswith("says: done\n")
    other = gce.driver()
    other.machines({"holdfast-run": "run"})
    gce.page_size = 1
    assert "says: done\n" in other.console(machine.id, SPOT)


def test_a_console_that_may_not_be_read_from_the_logs_is_what_was_seen(gce: GceEmulator) -> None:
    gce.denied.add("logging.logEntries.list")
    driver = gce.driver()
    script = "#!/bin/bash\ntrap 'echo bye; exit' TERM\necho up\nwhile :; do sleep 0.01; done\n"
    machine = driver.launch(asked(startup_script=script))
    line_of(driver, machine, "up")
    driver.terminate(machine.id, SPOT)
    gone(gce, driver, machine)
    assert driver.console(machine.id, SPOT).splitlines()[-1] == "bye"
    assert gce.driver().console(machine.id, SPOT) == ""


def test_a_console_is_cut_to_64_kib_and_freed_of_what_the_image_prints_before_it() -> None:
    before = "Nov 24 21:49:30 hf-abc google_metadata_script_runner[512]: startup-script: "
    console = "[    0.0] Linux\r\n" + "".join(f"{before}holdfast: step {n}\r\n" for n in range(5000))
    lines = tail(console).splitlines()
    assert lines[-1] == "holdfast: step 4999" and len(tail(console).encode()) <= 65536
    newer = "2026/11/24 21:49:30 GCEMetadataScripts[77]: 2026/11/24 21:49:30 GCEMetadataScripts: startup-script: x\n"
    assert tail(newer).strip().endswith("x")
