"""The orchestrator is killed again and again, in the middle of whatever it does; the run goes on from the journal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from blocks.accounts import LocalAccount
from holdfast.checkpoint.reader import read_metrics, tensor_digest
from holdfast.drivers.local import LocalDriver
from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.ledger.billing import add_usd
from holdfast.ledger.journal import Journal
from holdfast.runtime.contract import journal_prefix
from holdfast.storage import DirectoryStore
from tests.chaos.runs import assert_lost_steps_were_trained_again, assert_nothing_left, carry, cloud, tiny_job

REPOSITORY = Path(__file__).parents[2]
KILLS, STEPS, SEED = 6, 600, 4


def test_a_run_whose_orchestrator_dies_six_times_ends_as_if_nothing_had_been(folder: Path, prefect_api: str) -> None:
    store = DirectoryStore(folder / ".holdfast")
    carry(tiny_job(folder, "steady", STEPS), cloud(folder, [], "steady-cloud"), store, "steady")
    market = ScriptedMarket(spot=[Fate(at_step=200, notice=False), Fate(at_step=400, notice=True)])
    account = LocalAccount(root=folder / "killed-cloud", market=market)
    account.save("orphaning", overwrite=True)
    driver = account.driver()
    job = tiny_job(folder, "killed", STEPS)
    (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))

    draw = random.Random(SEED)
    for kill in range(KILLS):
        journal_before = len(store.list(journal_prefix("killed")))
        orchestrator = start_orchestrator(folder, prefect_api)
        wait_until(lambda: len(store.list(journal_prefix("killed"))) > journal_before, orchestrator)  # noqa: B023
        # From the first reservation on, every instant is fair game: mid-launch for the first, any time for the others.
        time.sleep(draw.uniform(0, 0.15) if kill == 0 else draw.uniform(0, 1.2))
        assert orchestrator.poll() is None, orchestrator.communicate()
        os.kill(orchestrator.pid, signal.SIGKILL)
        orchestrator.communicate()
    last = start_orchestrator(folder, prefect_api)
    output, _ = last.communicate(timeout=240)
    assert last.returncode == 0, output

    import json

    summary = json.loads((folder / ".holdfast/runs/killed/summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["orchestrator_recoveries"] == KILLS
    assert tensor_digest(store, "killed") == tensor_digest(store, "steady")
    assert read_metrics(store, "killed") == read_metrics(store, "steady")
    assert_lost_steps_were_trained_again(summary, folder, "killed")
    one_machine_per_attempt(summary, driver)
    charged_once(summary, driver, store)
    assert_nothing_left(driver)


def one_machine_per_attempt(summary: dict, driver: LocalDriver) -> None:
    attempts = [attempt["number"] for attempt in summary["attempts"] if attempt["machine"]]
    assert sorted(int(machine.tags["holdfast-attempt"]) for machine in driver.machines({})) == attempts


def charged_once(summary: dict, driver: LocalDriver, store: DirectoryStore) -> None:
    """Every machine's life, as the cloud tells it, is on the bill once."""
    lives = {machine.id: machine for machine in driver.machines({})}
    for attempt in summary["attempts"]:
        machine = lives[attempt["machine"]]
        seconds = max(60.0, (machine.terminated_at - machine.launched_at).total_seconds())
        assert abs(attempt["billed_seconds"] - seconds) < 0.01
    assert summary["usd_total"] == add_usd(attempt["usd"] for attempt in summary["attempts"])
    ended = [
        entry.fields["attempt"] for entry in Journal(store, journal_prefix("killed")).read() if entry.kind == "ended"
    ]
    assert ended == sorted(set(ended))


def start_orchestrator(folder: Path, api: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows", "train", "job.yaml", "--run-id", "killed", "--account", "orphaning"],
        cwd=folder,
        env={**os.environ, "PREFECT_API_URL": api, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_until(condition, process: subprocess.Popen[str], seconds: float = 180.0) -> None:
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up_at, "timed out"
        time.sleep(0.01)
