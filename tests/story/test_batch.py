"""What happens to a batch job when some of its machines are taken away. Every machine is a real process group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import flow

from blocks.accounts import LocalAccount
from flows.batch_inference import carry_out_batch
from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.local.config import Fate, Outage, ScriptedMarket, TimedMarket
from holdfast.errors import ConfigError, OverBudgetError, ProgramFailedError
from holdfast.ledger.billing import add_usd
from holdfast.model import BatchJob, load_batch_job
from holdfast.storage import DirectoryStore
from holdfast.supervision.batch_opening import open_batch_run
from holdfast.supervision.batch_run import BatchRun
from tests.chaos.runs import cloud, wait_until
from tests.conftest import PROGRAMS, command_lines_with
from tests.story.test_fleet import REPOSITORY, SMALL, assert_adds_up, outcomes


def batch_job(folder: Path, name: str = "double", records: int = 400, seconds: float = 0.3, **changes: Any) -> BatchJob:
    """Forty batches of ten records, each of which takes 0.3 s."""
    inputs = folder / f"{name}.jsonl"
    if not inputs.exists():
        inputs.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(records)))
    fields: dict[str, Any] = {
        "name": name,
        "inputs": [str(inputs)],
        "function": "mapping:double",
        "setup": "mapping:begin",
        "code": str(PROGRAMS / "batch"),
        "env": {"BATCH_SECONDS": str(seconds), "NOTES": str(folder / f"notes-{name}")},
        "resources": SMALL,
        "batch_size": 10,
        "machines": 3,
        "spot_share": 0.67,
        "visibility_seconds": 10,
        "idle_seconds": 1,
        "notice_poll_seconds": 0.1,
        "max_run_hours": 5,
    }
    return BatchJob(**{**fields, **changes})


def carry(job: BatchJob, driver: LocalDriver, store: DirectoryStore) -> dict[str, Any]:
    return carried(open_batch_run(job, driver, store, None, job.name))


def carried(run: BatchRun) -> dict[str, Any]:
    @flow(name="test-batch")
    def story() -> dict[str, Any]:
        return carry_out_batch(run)

    return story()


def results(store: DirectoryStore, name: str) -> dict[int, Any]:
    """By number of the record; every part of the data set that its manifest names, in order."""
    manifest = json.loads(store.get(f"results/{name}/manifest.json"))
    rows = [json.loads(line) for part in manifest["parts"] for line in store.get(part["key"]).splitlines()]
    numbers = [row["record"] for row in rows]
    assert numbers == sorted(set(numbers))
    return {row["record"]: row["result"] for row in rows}


def assert_whole(summary: dict[str, Any], records: int, failed: int = 0) -> None:
    assert summary["state"] == "finished", summary["detail"]
    counted = ("records_in", "records_out", "records_failed", "missing", "duplicates")
    assert [summary[name] for name in counted] == [records, records - failed, failed, 0, 0]


def workers(folder: Path, name: str = "double") -> list[str]:
    return sorted(path.name for path in (folder / f"notes-{name}").glob("*"))


def test_machines_that_are_taken_are_replaced_in_their_share_and_every_record_has_one_result(
    folder: Path, store: DirectoryStore
) -> None:
    driver = cloud(folder, [Fate(after_seconds=6, notice=False), Fate(after_seconds=8, notice=True)])
    summary = carry(batch_job(folder, seconds=0.8), driver, store)
    assert_whole(summary, 400)
    assert results(store, "double") == {n: 2 * n for n in range(400)}
    taken = outcomes(summary)
    assert taken[("spot", "preempted")] == 2 and taken[("on-demand", "finished")] >= 1
    first, *later = summary["rounds"]
    assert (first["spot"], first["on_demand"]) == (2, 1)
    # On a slow computer all may have left before a dead machine's batches come back: a last round begins anew then.
    assert later[0]["spot"] >= 1 and later[0]["on_demand"] == 0
    assert summary["usd_per_million_records"] > 0 and summary["usd_on_demand_equivalent"] > 0
    assert_adds_up(summary, driver)
    assert json.loads((folder / ".holdfast/runs/double/summary.json").read_text()) == summary
    text = (folder / ".holdfast/runs/double/summary.md").read_text()
    assert "400 records in, 400 out, 0 failed, 0 missing, 0 duplicates" in text


def test_records_that_fail_are_in_the_dead_letter_file_with_their_errors(folder: Path, store: DirectoryStore) -> None:
    lines = [json.dumps({"n": n} | ({"poison": True} if n in (7, 33) else {})) for n in range(60)]
    lines[50] = '{"n": 50'
    (folder / "double.jsonl").write_text("\n".join(lines) + "\n")
    driver = cloud(folder, [])
    summary = carry(batch_job(folder, seconds=0, machines=1, spot_share=1.0), driver, store)
    assert_whole(summary, 60, failed=3)
    failed = [json.loads(line) for line in store.get("results/double/failed.jsonl").splitlines()]
    assert [row["record"] for row in failed] == [7, 33, 50]
    assert "this record is poison" in failed[0]["error"] and "mapping.py" in failed[0]["traceback"]
    assert summary["dead_letters"].endswith("results/double/failed.jsonl")
    assert summary["dead_letters"] in (folder / ".holdfast/runs/double/summary.md").read_text()


def test_a_short_queue_gets_few_machines_and_an_empty_one_no_replacement(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [Fate(), Fate()])
    job = batch_job(folder, records=20, seconds=2.0, machines=8, spot_share=1.0)  # two batches
    summary = carry(job, driver, store)
    assert_whole(summary, 20)
    assert summary["machines_launched"] == 2 and summary["machines_wanted"] == 8


def test_one_machine_may_have_several_workers(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    summary = carry(batch_job(folder, machines=1, spot_share=1.0, workers_per_machine=2), driver, store)
    assert_whole(summary, 400)
    [machine] = {name.partition(".")[0] for name in workers(folder)}
    assert workers(folder) == [f"{machine}.0", f"{machine}.1"]
    assert outcomes(summary) == Counter({("spot", "finished"): 1})


def test_a_function_that_never_works_ends_the_run_and_shows_why(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    job = batch_job(folder, function="mapping:fail", machines=1, spot_share=1.0, max_program_failures=0)
    with pytest.raises(ProgramFailedError, match="this function never works"):
        carry(job, driver, store)
    summary = json.loads((folder / ".holdfast/runs/double/summary.json").read_text())
    assert summary["state"] == "failed" and summary["records_in"] is None and summary["batches_done"] == 0


def test_dollars_are_capped_and_a_higher_cap_goes_on_with_what_is_left(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [], clock_speed=60.0)  # a machine's hour is a minute of the wall
    job = batch_job(folder, records=200, seconds=1.0, machines=1, spot_share=0.0, max_usd=0.012)
    with pytest.raises(OverBudgetError, match="max_usd"):
        carry(job, driver, store)
    before = json.loads((folder / ".holdfast/runs/double/summary.json").read_text())
    assert before["state"] == "over-budget" and 0 < before["usd_total"] <= 0.012
    summary = carry(job.model_copy(update={"max_usd": 5.0}), driver, store)
    assert_whole(summary, 200)
    assert results(store, "double") == {n: 2 * n for n in range(200)}


def test_spot_that_goes_for_good_is_replaced_in_time_for_the_deadline(folder: Path, store: DirectoryStore) -> None:
    market = TimedMarket(outages=[Outage(start_seconds=300, end_seconds=1e6)], notice_seconds=60.0)
    driver = LocalDriver(LocalCloudConfig(root=folder / "cloud", clock_speed=20.0, market=market))
    job = batch_job(folder, records=600, seconds=1.0, machines=2, spot_share=1.0, deadline_hours=0.5)
    summary = carry(job, driver, store)
    assert_whole(summary, 600)
    assert results(store, "double") == {n: 2 * n for n in range(600)}
    assert_adds_up(summary, driver)
    first, *later = summary["rounds"]
    assert first["spot"] == 2 and first["reason"].startswith("measures how long a batch takes")
    assert later[-1]["on_demand"] >= 1 and later[-1]["spot"] == 0
    assert summary["deadline"]["kept"] and summary["deadline"]["seconds_to_spare"] > 0
    assert "Deadline" in (folder / ".holdfast/runs/double/summary.md").read_text()


def test_a_deadline_that_is_past_is_refused_unless_the_run_has_begun(folder: Path, store: DirectoryStore) -> None:
    driver = cloud(folder, [])
    late = batch_job(folder, deadline="2020-01-01T08:00Z", records=20)
    with pytest.raises(ConfigError, match=r"deadline: 2020-01-01.* is past"):
        carry(late, driver, store)
    assert driver.machines({}) == []
    with open_batch_run(batch_job(folder, records=20), driver, store, None, late.name):
        pass
    summary = carry(late, driver, store)
    assert_whole(summary, 20)
    assert summary["deadline"]["kept"] is False and summary["deadline"]["seconds_to_spare"] < 0


def test_a_killed_orchestrator_s_successor_goes_on_from_journal_plan_and_queue(
    folder: Path, store: DirectoryStore, prefect_api: str
) -> None:
    account = LocalAccount(root=folder / "cloud", market=ScriptedMarket())
    account.save("orphaned-batch", overwrite=True)
    driver = account.driver()
    job = batch_job(folder, seconds=0.5, deadline_hours=5)
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    first = subprocess.Popen(
        [sys.executable, "-m", "flows", "batch", "job.yaml", "--run-id", "double", "--account", "orphaned-batch"],
        cwd=folder,
        env={**os.environ, "PREFECT_API_URL": prefect_api, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: len(store.list("results/double/results/")) >= 3 or first.poll() is not None, 120)
    assert first.poll() is None, first.communicate()[0]
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    run = open_batch_run(job, driver, store, None, job.name)
    summary = carried(run)
    assert run.start_seconds is None  # it launched no machine, and takes no machine's age for the time of its start
    assert_whole(summary, 400)
    assert summary["orchestrator_recoveries"] == 1 and summary["machines_launched"] == 3
    assert results(store, "double") == {n: 2 * n for n in range(400)}
    assert_adds_up(summary, driver)


@pytest.mark.timeout(400)
def test_the_demonstration_loses_machines_and_no_document(folder: Path, prefect_api: str) -> None:
    """As it is, but for the model: one that waits costs no processor's time."""
    job = load_batch_job(REPOSITORY / "examples/embed.yaml").model_copy(
        update={
            "function": "mapping:characters",
            "setup": "",
            "code": str(PROGRAMS / "batch"),
            "env": {"BATCH_SECONDS": "2"},
        }
    )
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "HOLDFAST_"))}
    environment |= {"PREFECT_API_URL": prefect_api, "PYTHONPATH": str(REPOSITORY), "HOME": str(folder)}
    command = [sys.executable, "-m", "flows", "demo-batch", "--documents", "600", "--job", "job.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob(".holdfast/runs/*/summary.json")
    summary = json.loads(path.read_text())
    assert_whole(summary, 600)
    assert summary["interruptions"] >= 2
    assert summary["usd_total"] == add_usd(member["usd"] for member in summary["members"])
    assert "600 records in, 600 out, 0 failed, 0 missing, 0 duplicates" in " ".join(done.stdout.split())
    assert "of 600 records" in done.stdout and "launched" in done.stdout
    assert command_lines_with(str(folder)) == []
