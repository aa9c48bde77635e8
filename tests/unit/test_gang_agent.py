"""What a gang's machine does between formations and when one is over. Here `torch.distributed.run` is a program of the test's."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers.local.metadata import Facts, serve
from holdfast.runtime import contract
from holdfast.runtime.gang_agent import GangAgent
from holdfast.storage import DirectoryStore
from tests.chaos.runs import wait_until

STAND_IN = """
import os, subprocess, sys, time
attempt, here = os.environ["HOLDFAST_ATTEMPT"], os.path.dirname(__file__)
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(os.path.join(here, "ran"), "a") as file:
    file.write(f"{attempt} {rank.pid} {' '.join(sys.argv[1:])}\\n")
time.sleep(600 if attempt == "2" else 0)
"""


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    known = {"zone": "z-1a", "region": "z-1", "instance_type": "small", "user_data": "", "machine_id": "i-me"}
    server = serve(Facts(dialect="aws", **known))  # type: ignore[arg-type]
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def agent(tmp_path: Path, metadata: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GangAgent]:
    for package in ("torch", "torch/distributed"):
        (tmp_path / "code" / package).mkdir(parents=True)
        (tmp_path / "code" / package / "__init__.py").touch()
    (tmp_path / "code/torch/distributed/run.py").write_text(STAND_IN)
    orders = {"notice_poll_seconds": 60, "env": {}, "python": True, "command": ["ddp.py"], "processes_per_machine": 2}
    (tmp_path / "agent.json").write_text(json.dumps(orders))
    monkeypatch.setenv(contract.STORE, f"file://{tmp_path}/store")
    monkeypatch.setenv(contract.RUN, "together")
    monkeypatch.setenv(contract.ATTEMPT, "0")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    made = GangAgent(tmp_path)
    yield made
    for watcher in made.watchers:  # or the lease's would end the process of the tests, when it is over
        watcher.stop()
    for number, handler in before.items():
        signal.signal(number, handler)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="ranks are found through /proc")
def test_a_machine_waits_out_a_formation_without_it_and_leaves_no_rank_behind(agent: GangAgent, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")

    def told(key: str) -> dict[str, Any] | None:
        return json.loads(store.get(key)) if store.list(key) else None

    def form(number: int, *members: str) -> None:
        place = {"members": members, "host": members[0], "address": "127.0.0.1", "port": 40000}
        store.create(contract.formation_key("together", number), json.dumps(place).encode())

    def ranks() -> list[list[str]]:
        ran = tmp_path / "code/torch/distributed/ran"
        return [line.split(" ") for line in ran.read_text().splitlines()] if ran.exists() else []

    def lead() -> None:
        wait_until(lambda: told(contract.ready_key("together", 0, "i-me")))
        form(1, "i-other")
        wait_until(lambda: told(contract.ready_key("together", 1, "i-me")))
        form(2, "i-me", "i-other")
        wait_until(ranks)
        said.append(alive(int(ranks()[0][1])))
        store.create(contract.over_key("together", 2), json.dumps({"gracious": True, "why": "one joined"}).encode())
        wait_until(lambda: told(contract.ready_key("together", 2, "i-me")))
        said.append(alive(int(ranks()[0][1])))
        form(3, "i-other", "i-me")

    said: list[bool] = []
    leader = threading.Thread(target=lead)
    leader.start()
    agent.run()
    leader.join()
    assert said == [True, False]
    left = told(contract.ready_key("together", 2, "i-me"))
    assert left and left["outcome"] == "preempted" and left["address"] == "127.0.0.1"
    (second, _, *asked), (third, _, *after) = ranks()
    assert (second, third) == ("2", "3")
    assert {"--nnodes=2", "--nproc-per-node=2", "--rdzv-id=together-2", "--rdzv-endpoint=127.0.0.1:40000"} <= set(asked)
    assert any("is_host=1" in argument for argument in asked) and any("is_host=0" in argument for argument in after)
    end = told(contract.member_end_key("together", "i-me"))
    assert end and end["outcome"] == "finished" and end["report"]["formation"] == 3
