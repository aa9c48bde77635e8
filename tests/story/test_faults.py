"""Faults around a run: of the store, of the cloud, of the server, of another orchestrator. None ends as finished."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from flows.display import status_line
from holdfast.drivers.local import LocalDriver
from holdfast.drivers.local.config import Fate
from holdfast.drivers.protocol import CapacityPool, LaunchRequest, Machine
from holdfast.errors import (
    CapacityError,
    ConfigError,
    HoldfastError,
    OverBudgetError,
    QuotaError,
    RunTakenError,
    TransientError,
)
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.ledger.summary import summarise, to_markdown
from holdfast.model import Fallback, Resources, TrainingJob
from holdfast.placement.policy import Launch
from holdfast.storage import DirectoryStore, ObjectInfo
from holdfast.storage.protocol import Data
from holdfast.supervision.opening import open_run
from holdfast.supervision.training_run import TrainingRun
from holdfast.supervision.updates import Update
from tests.chaos.runs import (
    assert_lost_steps_were_trained_again,
    assert_nothing_left,
    carry,
    cloud,
    light_job,
    outcomes,
    story_of,
    summary_of,
    tiny_job,
    trained_again,
    wait_until,
)


class Killed(BaseException):
    """The orchestrator is gone at this very line."""


class Outage(DirectoryStore):
    """A store that does not answer the orchestrator from `begin` on, for `seconds`; the machines have a way of their own."""

    seconds = 0.0
    began: float | None = None

    def begin(self, seconds: float) -> None:
        self.seconds, self.began = seconds, time.monotonic()

    def _answer(self) -> None:
        if self.began is not None and time.monotonic() - self.began < self.seconds:
            raise TransientError("the store does not answer")

    def get(self, key: str) -> bytes:
        self._answer()
        return super().get(key)

    def put(self, key: str, data: Data | Iterable[Data]) -> None:
        self._answer()
        super().put(key, data)

    def create(self, key: str, data: Data | Iterable[Data]) -> None:
        self._answer()
        super().create(key, data)

    def list(self, prefix: str) -> list[ObjectInfo]:
        self._answer()
        return super().list(prefix)


def when_step(step: int, driver: Any, act: Callable[[], None]) -> threading.Thread:
    def wait() -> None:
        wait_until(lambda: any(f"holdfast: step {step} " in driver.console(m.id, m.pool) for m in driver.machines({})))
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("seconds", [0.05, 3.0])
def test_a_store_that_is_away_for_a_while_costs_nothing(seconds: float, folder: Path, store: DirectoryStore) -> None:
    driver, shaky = cloud(folder, []), Outage(folder / ".holdfast")
    thread = when_step(20, driver, lambda: shaky.begin(seconds))
    _, summary = carry(light_job(folder, steps=200), driver, shaky, "light")
    thread.join()
    assert outcomes(summary) == [("spot", "finished")]
    assert summary["steps_total"] == 200
    assert summary["usd_total"] > 0
    assert_nothing_left(driver)


def test_a_store_that_is_away_at_the_end_delays_the_end(folder: Path, store: DirectoryStore) -> None:
    driver, shaky = cloud(folder, []), Outage(folder / ".holdfast")
    thread = when_step(98, driver, lambda: shaky.begin(4))
    _, summary = carry(light_job(folder), driver, shaky, "light")
    thread.join()
    assert outcomes(summary) == [("spot", "finished")]


def watched(job: TrainingJob, driver: LocalDriver, store: DirectoryStore) -> tuple[list[Update], dict[str, Any]]:
    """What was told while one machine carried the whole run, and the run's summary."""
    with open_run(job, driver, store, None, job.name) as run:
        run.reserve(run.decide())  # type: ignore[arg-type]
        run.launch()
        updates = list(run.supervise())
        run.close("finished")
    return updates, summarise(run.state)


def test_saves_that_fail_for_a_while_are_told_at_once_and_counted_in_the_summary(
    folder: Path, store: DirectoryStore
) -> None:
    in_the_way = folder / ".holdfast/runs/light/checkpoints"  # a file where the checkpoints' folder must be
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    driver = cloud(folder, [])
    thread = when_step(100, driver, in_the_way.unlink)
    updates, summary = watched(light_job(folder, steps=300), driver, store)
    thread.join()
    told = [update for update in updates if update.kind == "warned"]
    assert re.match(r"checkpoint of step \d+ is not durable .*: .*can't write", told[0].text), told[0].text
    assert told[0].fields["step"] < 100
    shown = [status_line(update) for update in updates]
    troubled = [line for line in shown if "not durable since step 0" in line]
    assert troubled and "not durable" not in shown[-1]
    assert summary["steps_total"] == 300
    [row] = summary["attempts"]
    assert row["commit_failures"] == summary["checkpoints"]["commit_failures"] == len(told)
    assert row["last_committed_step"] == 300
    assert f"- Tries to make a checkpoint durable that failed: {len(told)} (attempt 1: {len(told)})" in to_markdown(
        summary
    )
    [warning] = summary["warnings"]
    assert warning == f"attempt 1: {told[0].text}"


def test_a_save_that_is_late_is_told_with_its_budget_and_counted(folder: Path, store: DirectoryStore) -> None:
    job = light_job(folder, "late").model_copy(update={"script": "late.py", "args": []})
    updates, summary = watched(job, cloud(folder, []), store)
    assert [update.text for update in updates if update.kind == "warned"] == [
        "checkpoint of step 10 is not durable after 12 s, its budget was 10 s: the store is slow",
        "checkpoint of step 10 is not durable yet: the disk is full",
        "checkpoint of step 20 is not durable after 75 s, its budget was 60 s: the disk is full",
        "12 GB do not fit the 30 s that are left",
    ]
    assert summary["attempts"][0]["late_commits"] == summary["checkpoints"]["late_commits"] == 2
    text = to_markdown(summary)
    assert "- Checkpoints that were not durable within their budget: 2 (attempt 1: 2)" in text
    assert "- Warning: attempt 1: checkpoint of step 10 is not durable after 12 s" in text
    assert "- Warning: attempt 1: 12 GB do not fit the 30 s that are left" in text
    assert len(summary["warnings"]) == 3  # one of each kind


def test_a_run_that_was_taken_over_leaves_the_new_owner_s_machine_alone(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    run = open_run(light_job(folder, steps=500), driver, store, None, "light")

    def take_over() -> None:
        owner = {"host": "elsewhere", "process": {"pid": 1}, "claimed_at": "2026-11-01T00:00:00+00:00"}
        store.create("runs/light/owners/000002.json", json.dumps(owner).encode())

    thread = when_step(20, driver, take_over)
    with pytest.raises(RunTakenError):
        story_of(run)()
    thread.join()
    [machine] = driver.machines({})
    assert machine.state == "running"
    assert not (folder / ".holdfast/runs/light/summary.json").exists()
    driver.terminate(machine.id, machine.pool)
    wait_until(lambda: driver.machines({})[0].state == "terminated")


def test_an_error_in_the_supervision_is_no_success(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    run = open_run(light_job(folder, steps=500), driver, store, None, "light")

    def break_the_cloud() -> None:
        def broken(*_: Any) -> Any:
            driver.machines = type(driver).machines.__get__(driver)  # type: ignore[method-assign]
            raise ValueError("an answer that makes no sense")

        driver.machines = broken  # type: ignore[method-assign]

    thread = when_step(20, driver, break_the_cloud)
    with pytest.raises(ValueError, match="makes no sense"):
        story_of(run)()
    thread.join()
    assert run.state.state == "failed"
    assert [attempt.outcome for attempt in run.state.attempts] == ["cancelled"]
    assert run.state.usd_total > 0
    assert_nothing_left(driver)
    _, summary = carry(light_job(folder, steps=500), driver, store, "light")  # and it can be taken up again
    assert summary["state"] == "finished"
    assert_lost_steps_were_trained_again(summary, folder, "light")


def test_a_machine_that_the_cloud_does_not_show_any_more_does_not_hold_the_run_up(
    folder: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.supervision.watch.SILENT_SECONDS", 2.0)
    monkeypatch.setattr("holdfast.supervision.watch.SILENT_WALL_SECONDS", 2.0)
    driver = cloud(folder, [])
    shown, hidden = driver.machines, set[str]()
    driver.machines = lambda *asked, **more: [m for m in shown(*asked, **more) if m.id not in hidden]  # type: ignore[method-assign]

    def hide() -> None:
        [machine] = shown({})
        hidden.add(machine.id)
        driver.terminate(machine.id, machine.pool)

    thread = when_step(20, driver, hide)
    _, summary = carry(light_job(folder, fallback=Fallback(after_failed_spot_attempts=10)), driver, store, "light")
    thread.join()
    assert outcomes(summary) == [("spot", "preempted"), ("spot", "finished")]  # it had said so in the store
    assert summary["attempts"][0]["billed_seconds"] >= 60
    assert_lost_steps_were_trained_again(summary, folder, "light")


@pytest.mark.parametrize("shown_as", ["nothing", "a machine of which nobody knows why it ended"])
def test_a_machine_that_the_cloud_has_forgotten_is_neither_launched_again_nor_billed_until_today(
    shown_as: str, folder: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.supervision.watch.SILENT_SECONDS", 2.0)
    monkeypatch.setattr("holdfast.supervision.watch.SILENT_WALL_SECONDS", 2.0)
    job, driver = light_job(folder, steps=2000), cloud(folder, [], clock_speed=60.0)
    dying = open_run(job, driver, store, None, "light")
    with pytest.raises(Killed), dying:
        dying.reserve(dying.decide())  # type: ignore[arg-type]
        dying.launch()
        for update in dying.supervise():
            if (update.fields["step"] or 0) > 20:
                raise Killed
    [machine] = driver.machines({})
    driver.terminate(machine.id, machine.pool)
    wait_until(lambda: driver.machines({})[0].state == "terminated")
    ended_at = driver.machines({})[0].terminated_at
    assert ended_at
    driver.clock.sleep(600)
    forgotten = dataclasses.replace(machine, state="terminated", terminated_at=driver.clock.now(), reason="")
    driver.machines = lambda *_, **__: [forgotten] if shown_as != "nothing" else []  # type: ignore[method-assign]
    driver.launch = None  # type: ignore[assignment]
    with open_run(job, driver, store, None, "light") as run:
        assert run.launch().id == machine.id
        list(run.supervise())
        [attempt] = run.state.attempts
        assert attempt.outcome in ("lost", "preempted")
        assert attempt.committed_step
        assert attempt.terminated_at
        assert abs((attempt.terminated_at - ended_at).total_seconds()) < 300


def test_a_run_that_is_cancelled_in_the_middle_of_a_launch_ends_a_machine_that_is_shown_later(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [])
    launch, machines = driver.launch, driver.machines
    shown_at = None

    def interrupted(request: LaunchRequest) -> Machine:
        nonlocal shown_at
        launch(request)
        shown_at = time.monotonic() + 1.5
        raise KeyboardInterrupt

    driver.launch = interrupted  # type: ignore[method-assign]
    driver.machines = lambda *asked, **more: (  # type: ignore[method-assign]
        machines(*asked, **more) if shown_at and time.monotonic() > shown_at else []
    )
    run = open_run(light_job(folder, steps=2000), driver, store, None, "light")
    with run:
        run.reserve(run.decide())  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            run.launch()
        run.end("cancelled", "Ctrl-C")
    assert run.state.state == "cancelled"
    assert [attempt.outcome for attempt in run.state.attempts] == ["cancelled"]
    assert run.state.attempts[0].machine
    assert run.state.usd_total > 0
    assert_nothing_left(driver)


@pytest.mark.parametrize("problem", [ConfigError("you may not"), TransientError("not now")], ids=["refused", "away"])
def test_an_end_is_written_down_though_neither_console_nor_prices_are_to_be_had(
    problem: HoldfastError, folder: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.supervision.watch.CONSOLE_WALL_SECONDS", 1.0)
    monkeypatch.setattr("holdfast.supervision.run.CLOUD_PATIENCE_WALL_SECONDS", 1.0)
    driver = cloud(folder, [])

    def refused(*_: Any) -> Any:
        raise problem

    driver.console = refused  # type: ignore[method-assign]
    driver.price_history = refused  # type: ignore[method-assign]
    _, summary = carry(light_job(folder, steps=30), driver, store, "light")
    assert outcomes(summary) == [("spot", "finished")]
    assert summary["steps_total"] == 30
    assert summary["usd_total"] > 0
    assert sum(str(problem) in warning for warning in summary["warnings"]) == 2


def test_a_run_that_is_taken_up_again_asks_anew_for_what_a_quota_refused(folder: Path, store: DirectoryStore) -> None:
    job = light_job(folder, steps=30, provisioning="spot", resources=Resources(instance_types=["c7i.large"]))
    driver = cloud(folder, [])
    launch = driver.launch

    def refused(_: LaunchRequest) -> Machine:
        raise QuotaError("the account may have no more")

    driver.launch = refused  # type: ignore[method-assign]
    with pytest.raises(OverBudgetError, match="may have no more"):
        carry(job, driver, store, "light")
    driver.launch = launch  # type: ignore[method-assign]
    _, summary = carry(job, driver, store, "light")
    assert summary["state"] == "finished"
    assert {outcome for _, outcome in outcomes(summary)[:-1]} == {"quota"}


def test_an_attempt_s_end_does_not_read_the_whole_budget_again(folder: Path, store: DirectoryStore) -> None:
    class Counting(DirectoryStore):
        reads = 0

        def get(self, key: str) -> bytes:
            self.reads += key.startswith("budgets/")
            return super().get(key)

    counted, ledger = Counting(folder / ".holdfast"), BudgetLedger(store, BUDGET)
    driver = cloud(folder, [Fate(refuse=True)] * 20)
    for number in range(10):  # of other runs
        ledger.reserve(f"other-{number}", 0.01, driver.clock.now())
        ledger.settle(f"other-{number}", 0.01, driver.clock.now())
    run = open_run(light_job(folder, provisioning="spot"), driver, counted, BUDGET, "light")
    with run:
        for _ in range(6):
            run.reserve(run.decide())  # type: ignore[arg-type]
            with pytest.raises(CapacityError):
                run.launch()
        run.close("cancelled")
    entries = len(store.list("budgets/"))
    assert entries == 32
    assert counted.reads <= 2 * entries  # open_run has a ledger of its own


def test_a_termination_that_came_to_nothing_is_repeated(
    folder: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.supervision.watch.STOP_GRACE_SECONDS", 0.5)
    driver = cloud(folder, [])
    terminate, asked = driver.terminate, list[str]()

    def forgets_the_first(machine_id: str, pool: CapacityPool) -> None:
        asked.append(machine_id)
        if len(asked) > 1:
            terminate(machine_id, pool)

    driver.terminate = forgets_the_first  # type: ignore[method-assign]
    with open_run(light_job(folder, steps=3000), driver, store, None, "light") as run:
        run.reserve(run.decide())  # type: ignore[arg-type]
        run.launch()
        next(iter(run.supervise()))
        run.end("cancelled", "Ctrl-C")
    assert len(asked) > 1
    assert_nothing_left(driver)
    assert run.state.attempts[0].last_step is None or run.state.attempts[0].last_step < 1000


def test_a_run_whose_training_has_finished_buys_no_machine_to_be_closed(folder: Path, store: DirectoryStore) -> None:
    job, driver = light_job(folder, steps=30), cloud(folder, [])
    dying = open_run(job, driver, store, None, "light")
    killed_at(dying, "closed", before=True)
    with pytest.raises(Killed), dying:
        dying.reserve(dying.decide())  # type: ignore[arg-type]
        dying.launch()
        list(dying.supervise())
        dying.close("finished")
    _, summary = carry(job, driver, store, "light")
    assert summary["state"] == "finished"
    assert outcomes(summary) == [("spot", "finished")]
    assert len(driver.machines({})) == 1


def test_a_run_that_has_used_another_cloud_is_not_taken_up_without_its_account(
    folder: Path, store: DirectoryStore
) -> None:
    job, driver = light_job(folder), cloud(folder, [])
    dying = open_run(job, driver, store, None, "light")
    with pytest.raises(Killed), dying:
        launch = dying.decide()
        assert isinstance(launch, Launch)
        pool = dataclasses.replace(launch.offer.pool, cloud="gcp")
        dying.reserve(dataclasses.replace(launch, offer=dataclasses.replace(launch.offer, pool=pool)))
        raise Killed
    with pytest.raises(ConfigError, match="has used gcp"):
        open_run(job, driver, store, None, "light")


def test_refusals_by_every_pool_are_not_asked_again_at_once(folder: Path, store: DirectoryStore) -> None:
    only = Resources(zones=["local-1a"], instance_types=["c7i.large"])
    job = light_job(folder, steps=20, provisioning="spot", resources=only)
    driver = cloud(folder, [Fate(refuse=True)] * 2, clock_speed=20.0)
    run, summary = carry(job, driver, store, "light")
    assert outcomes(summary) == [("spot", "no-capacity"), ("spot", "no-capacity"), ("spot", "finished")]
    first, second, third = run.state.attempts
    assert (second.reserved_at - first.detected_at).total_seconds() >= 30  # type: ignore[operator]
    assert (third.reserved_at - second.detected_at).total_seconds() >= 60  # type: ignore[operator]


BUDGET = Budget(name="team", max_usd=1, max_machines=1)


def killed_at(run: TrainingRun, kind: str, before: bool) -> None:
    """The run's process dies at the journal entry of that kind."""
    append = run._journal.append

    def dies(written: str, *arguments: Any, **fields: Any) -> Any:
        if written != kind:
            return append(written, *arguments, **fields)
        if not before:
            append(written, *arguments, **fields)
        raise Killed

    run._journal.append = dies  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "kind, before", [("reserved", True), ("reserved", False), ("launched", True), ("ended", False)]
)
def test_a_budget_forgets_nothing_wherever_the_orchestrator_is_killed(
    kind: str, before: bool, folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [Fate(at_step=30, notice=False)])
    job = light_job(folder, steps=60)
    dying = open_run(job, driver, store, BUDGET, "light")
    killed_at(dying, kind, before)
    with pytest.raises(Killed), dying:
        dying.reserve(dying.decide())  # type: ignore[arg-type]
        dying.launch()
        list(dying.supervise())
    run = open_run(job, driver, store, BUDGET, "light")
    summary = story_of(run)()
    assert summary["state"] == "finished"
    assert len(driver.machines({})) == len(summary["attempts"]) == 2
    standing = BudgetLedger(store, BUDGET).standing()
    assert standing.reserved_usd == {}
    assert standing.spent_usd == summary["usd_total"]


def test_a_reservation_without_an_attempt_goes_when_the_run_is_closed(folder: Path, store: DirectoryStore) -> None:
    run = open_run(light_job(folder), cloud(folder, []), store, BUDGET, "light")
    killed_at(run, "reserved", before=True)
    with run:
        with pytest.raises(Killed):
            run.reserve(run.decide())  # type: ignore[arg-type]
        run.end("cancelled", "Ctrl-C")
    assert BudgetLedger(store, BUDGET).standing().reserved_usd == {}


def test_a_machine_ends_at_once_even_when_its_end_cannot_be_written_yet(folder: Path, store: DirectoryStore) -> None:
    driver, shaky = cloud(folder, []), Outage(folder / ".holdfast")
    run = open_run(light_job(folder, steps=2000), driver, shaky, None, "light")
    with run:
        run.reserve(run.decide())  # type: ignore[arg-type]
        run.launch()
        shaky.begin(8)
        ending = threading.Thread(target=run.end, args=("cancelled", "Ctrl-C"))
        ending.start()
        wait_until(lambda: driver.machines({})[0].state == "terminated", 7)
        assert ending.is_alive()  # it waits for the store
        ending.join(30)
    assert [attempt.outcome for attempt in run.state.attempts] == ["cancelled"]
    assert run.state.state == "cancelled"


@pytest.mark.parametrize("run_id", ["My_Run", "../x", "a b", "ä", "-x", "x" * 81])
def test_a_run_id_that_is_no_name_is_refused(run_id: str, folder: Path, store: DirectoryStore) -> None:
    with pytest.raises(ConfigError, match="run_id"):
        open_run(light_job(folder), cloud(folder, []), store, None, run_id)


@pytest.mark.parametrize("status", ["0", "1"])
def test_a_program_that_saves_on_sigterm_and_leaves_with_any_status_was_preempted(
    status: str, folder: Path, store: DirectoryStore
) -> None:
    job = light_job(folder, "graceful").model_copy(update={"script": "graceful.py", "args": ["60", status]})
    summary = summary_of(folder, job, [Fate(after_seconds=1.5, notice=True)], store)
    assert outcomes(summary) == [("spot", "preempted"), ("spot", "finished")]
    assert trained_again(folder, "graceful") == 0


def test_a_loop_that_is_left_by_break_is_said(folder: Path, store: DirectoryStore) -> None:
    job = light_job(folder, "breaking").model_copy(update={"script": "breaking.py", "args": []})
    summary = summary_of(folder, job, [], store)
    assert any("run.stop(), not with break" in warning for warning in summary["warnings"]), summary["warnings"]


def test_ranks_that_would_overwrite_each_other_are_refused(folder: Path, store: DirectoryStore) -> None:
    job = tiny_job(folder, "ranks", script="light.py")
    job = job.model_copy(update={"env": {**job.env, "WORLD_SIZE": "2"}})
    with pytest.raises(HoldfastError, match="WORLD_SIZE is 2"):
        carry(job, cloud(folder, []), store, "ranks")


def test_an_over_budget_run_says_so(folder: Path, store: DirectoryStore) -> None:
    job = light_job(folder, steps=3000, max_run_hours=0.05)
    driver = cloud(folder, [], clock_speed=20.0)
    with pytest.raises(OverBudgetError, match="max_run_hours"):
        carry(job, driver, store, "light")
    assert_nothing_left(driver)
