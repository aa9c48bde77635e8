"""What the person who answers for machines and money relies on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock

from blocks.accounts import LocalAccount
from blocks.budget import SpendingBudget
from flows.reap_orphans import reap_orphans
from flows.train import train
from holdfast.drivers.local.config import Fate, ScriptedMarket
from holdfast.errors import OverBudgetError, RunTakenError
from holdfast.ledger.budget import Budget, BudgetLedger
from holdfast.model import TrainingJob
from holdfast.runtime.contract import lease_key
from holdfast.storage import DirectoryStore
from tests.chaos.runs import assert_nothing_left, carry, cloud, light_job, trained_again, wait_until

REPOSITORY = Path(__file__).parents[2]


class Orchestrator:
    """`python -m flows train` in a process of its own, on the account that is saved under the run's name."""

    def __init__(self, folder: Path, api: str, job: TrainingJob, **account: Any) -> None:
        block = LocalAccount(root=folder / "cloud", market=ScriptedMarket(), **account)
        block.save(job.name, overwrite=True)
        self.driver = block.driver()
        (folder / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows", "train", "job.yaml", "--run-id", job.name, "--account", job.name],
            cwd=folder,
            env={**os.environ, "PREFECT_API_URL": api, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_step(self, step: int) -> None:
        def trained() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            return any(
                f"holdfast: step {step} " in self.driver.console(machine.id, machine.pool)
                for machine in self.driver.machines({})
            )

        wait_until(trained)

    def end(self, number: int) -> str:
        os.kill(self.process.pid, number)
        return self.process.communicate(timeout=180)[0]


@pytest.fixture
def orchestrator(folder: Path, prefect_api: str) -> Iterator[Orchestrator]:
    """A run of 3,000 steps that is on its way."""
    started = Orchestrator(folder, prefect_api, light_job(folder, "operated", 3000))
    try:
        started.wait_for_step(20)
        yield started
    finally:
        if started.process.poll() is None:
            started.end(signal.SIGKILL)
        for machine in started.driver.machines({}):
            started.driver.terminate(machine.id, machine.pool)
        wait_until(lambda: all(machine.state == "terminated" for machine in started.driver.machines({})))


def summary(folder: Path, run_id: str) -> dict[str, Any]:
    return json.loads((folder / ".holdfast/runs" / run_id / "summary.json").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_its_machine_settles_and_publishes(
    number: int, orchestrator: Orchestrator, folder: Path
) -> None:
    output = orchestrator.end(number)
    assert orchestrator.process.returncode not in (0, None), output
    assert "Traceback" not in output, output
    assert_nothing_left(orchestrator.driver)
    written = summary(folder, "operated")
    assert written["state"] == "cancelled"
    assert [attempt["outcome"] for attempt in written["attempts"]] == ["cancelled"]
    assert written["usd_total"] > 0
    assert (folder / ".holdfast/runs/operated/timeline.png").exists()


def test_a_second_flow_run_for_a_run_is_refused_and_the_first_goes_on(
    orchestrator: Orchestrator, folder: Path, store: DirectoryStore
) -> None:
    with pytest.raises(RunTakenError, match=f"process {orchestrator.process.pid} "):
        train(light_job(folder, "operated", 3000), account="operated", run_id="operated")
    orchestrator.wait_for_step(60)
    assert len(orchestrator.driver.machines({})) == 1


def test_the_reaper_ends_what_no_live_run_owns_and_nothing_else(
    orchestrator: Orchestrator, store: DirectoryStore
) -> None:
    assert reap_orphans("operated") == 0  # its run is alive
    orchestrator.end(signal.SIGKILL)
    assert reap_orphans("operated") == 0  # its run may be taken up again: the lease lasts
    lease = json.loads(store.get(lease_key("operated")))
    over = orchestrator.driver.clock.now().isoformat()
    store.put(lease_key("operated"), json.dumps({**lease, "expires_at": over}).encode())
    assert reap_orphans("operated") == 1
    wait_until(lambda: orchestrator.driver.machines({})[0].state == "terminated")
    assert_nothing_left(orchestrator.driver)


def test_a_machine_that_nobody_supervises_commits_and_ends_itself(
    folder: Path, prefect_api: str, store: DirectoryStore
) -> None:
    job = light_job(folder, "alone", 1500, lease_seconds=120)
    orchestrator = Orchestrator(folder, prefect_api, job, clock_speed=20.0)
    orchestrator.wait_for_step(20)
    orchestrator.end(signal.SIGKILL)
    wait_until(lambda: orchestrator.driver.machines({})[0].state == "terminated")
    assert_nothing_left(orchestrator.driver)
    end = json.loads(store.get("runs/alone/attempts/0001/end.json"))
    assert end["report"]["notice"]["kind"] == "lease"
    assert end["report"]["committed_step"] == end["report"]["step"]

    _, again = carry(job, orchestrator.driver, store, "alone")
    assert again["lost_steps"] == trained_again(folder, "alone") == 0
    assert [attempt["outcome"] for attempt in again["attempts"]] == ["lost", "finished"]


def test_a_budget_is_reserved_before_the_launch_and_settled_after(folder: Path, store: DirectoryStore) -> None:
    SpendingBudget(max_usd=5, max_machines=1).save("team", overwrite=True)
    market = ScriptedMarket(spot=[Fate(at_step=30, notice=False)])
    LocalAccount(root=folder / "cloud", market=market).save("capped", overwrite=True)
    result = train(light_job(folder, "capped"), account="capped", budget="team", run_id="capped")
    standing = BudgetLedger(store, Budget(name="team", max_usd=5, max_machines=1)).standing()
    assert standing.reserved_usd == {}
    assert standing.spent_usd == result["usd_total"] > 0


def test_a_budget_that_others_have_used_up_stops_a_run_before_its_next_machine(
    folder: Path, store: DirectoryStore
) -> None:
    SpendingBudget(max_usd=5, max_machines=1).save("shared", overwrite=True)
    LocalAccount(root=folder / "cloud").save("others", overwrite=True)
    ledger = BudgetLedger(store, Budget(name="shared", max_usd=5, max_machines=1))
    driver = cloud(folder, [])
    ledger.reserve("another-run-0001", 1.0, driver.clock.now())
    with pytest.raises(OverBudgetError, match="1 machines live, which is max_machines"):
        train(light_job(folder, "late"), account="others", budget="shared", run_id="late")
    assert summary(folder, "late")["state"] == "over-budget"
    assert summary(folder, "late")["usd_total"] == 0


def test_the_summary_is_sent_to_a_notification_block(folder: Path, store: DirectoryStore) -> None:
    received: list[dict[str, Any]] = []

    class Inbox(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    inbox = HTTPServer(("127.0.0.1", 0), Inbox)
    threading.Thread(target=inbox.serve_forever, daemon=True).start()
    try:
        CustomWebhookNotificationBlock(
            name="inbox",
            url=f"http://127.0.0.1:{inbox.server_address[1]}/",
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        ).save("inbox", overwrite=True)
        LocalAccount(root=folder / "cloud", market=ScriptedMarket()).save("notifying", overwrite=True)
        job = light_job(folder, "notifying", 20)
        result = train(job, account="notifying", run_id="notifying", notify="custom-webhook/inbox")
    finally:
        inbox.shutdown()
    [message] = received
    assert message["subject"] == "Holdfast run notifying: finished"
    assert f"**{result['usd_total']:.4f}**" in message["body"]
