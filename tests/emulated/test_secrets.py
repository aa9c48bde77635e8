"""The orchestrator's credentials stay with it: everything that a run leaves anywhere is searched for them."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter

from holdfast.drivers.local.config import Fate
from holdfast.drivers.local.processes import marked
from tests.chaos.runs import carry, outcomes
from tests.emulated.runs import ACCOUNTS, Account, assert_nothing_left, small_job

IN_THE_ENVIRONMENT = "planted-in-the-orchestrator-s-environment"
ON_PURPOSE = "not-a-secret-the-user-s-own-words"


@pytest.mark.parametrize("name", ACCOUNTS)
def test_no_credential_of_the_orchestrator_s_is_anywhere_in_a_run(
    name: str, folder: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "holdfast")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", IN_THE_ENVIRONMENT)
    monkeypatch.setenv("HUGGING_FACE_TOKEN", IN_THE_ENVIRONMENT)
    with ACCOUNTS[name](folder, [Fate(at_step=40, notice=True)]) as account:
        job = small_job(account, folder)
        job = job.model_copy(update={"env": {**job.env, "WORDS": ON_PURPOSE}})
        seen = Environments(account)
        _, summary = carry(job, account.driver(), account.open_store(), "searched")
        seen.stop()
        assert outcomes(summary) == [("spot", "preempted"), ("spot", "finished")]
        assert_nothing_left(account)
        places = {
            "objects in the store": list(objects(account)),
            "user data": [account.host.user_data(one).encode() for one in account.host.ids()],
            "consoles": [account.host.console(one).encode() for one in account.host.ids()],
            "environments of processes": seen.environments,
            "tags": [repr(machine).encode() for machine in account.driver().machines({})],
            "files of the run": list(files(folder)),
            "files of the machines while they lived": list(seen.files.values()),
            "log records": [record.getMessage().encode() for record in caplog.records],
            "prefect's artifacts, logs and flow runs": list(told_to_prefect()),
        }
    # What is searched is really there: the user's own words are found wherever the job is.
    found = {place for place, texts in places.items() if any(ON_PURPOSE.encode() in text for text in texts)}
    assert {
        "objects in the store",
        "environments of processes",
        "files of the machines while they lived",
    } <= found
    assert all(places.values()), {place: len(texts) for place, texts in places.items()}
    for secret in [*account.secrets, IN_THE_ENVIRONMENT]:
        assert [place for place, texts in places.items() if any(secret.encode() in text for text in texts)] == []


def objects(account: Account) -> Iterator[bytes]:
    """Every object, and every file in those that are archives."""
    for key, data in account.contents().items():
        yield key.encode()
        yield data
        if key.endswith(".tar.gz"):
            with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as archive:
                for member in archive:
                    if file := archive.extractfile(member):
                        yield file.read()


def files(folder: Path) -> Iterator[bytes]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_bytes()


def told_to_prefect() -> Iterator[bytes]:
    with get_client(sync_client=True) as client:
        for artifact in client.read_artifacts():
            yield artifact.model_dump_json().encode()
        for entry in client.read_logs(LogFilter()):
            yield entry.model_dump_json().encode()
        for run in client.read_flow_runs():
            yield run.model_dump_json().encode()


class Environments:
    """The environment of every process of every machine, and what lies on its disks, as long as it runs."""

    def __init__(self, account: Account) -> None:
        self.environments: list[bytes] = []
        self.files: dict[Path, bytes] = {}
        self._account, self._done = account, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        seen: set[int] = set()
        while not self._done.wait(0.2):
            for one in self._account.host.ids():
                for path in (self._account.host.folder / one / "work").rglob("*"):
                    with contextlib.suppress(OSError):
                        if path.suffix in (".json", ".jsonl", ".sh", ".txt", ".log", ".pid") and path.is_file():
                            self.files[path] = path.read_bytes()
                for process in marked(one):
                    if process.pid not in seen:
                        seen.add(process.pid)
                        try:
                            self.environments.append(repr(process.environ()).encode())
                        except (psutil.Error, OSError):
                            continue


def test_the_search_itself_finds_what_is_there(folder: Path) -> None:
    (folder / "leak.txt").write_text(f"x {IN_THE_ENVIRONMENT} y")
    texts: Sequence[bytes] = list(files(folder))
    assert any(IN_THE_ENVIRONMENT.encode() in text for text in texts)
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") != IN_THE_ENVIRONMENT
