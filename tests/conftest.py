"""One real Prefect server for the whole session; a folder of its own for every test."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from holdfast.storage import DirectoryStore

PROGRAMS = Path(__file__).parent / "programs"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Before anything imports Prefect: it reads its settings then, and once.
PORT = _free_port()
os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{PORT}/api"
os.environ["OMP_NUM_THREADS"] = "1"
# A shell has what it starts in the background ignore Ctrl-C, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Prefect's log worker registers a call for the interpreter's end that raises in a forked child (3.8.8): a data loader's
# worker would exit with status 1. Programs on machines are processes without Prefect.
os.register_at_fork(after_in_child=threading._threading_atexits.clear)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prefect API that lives as long as the session."""
    from flows.server import prefect_server

    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("prefect"))
    url = os.environ.pop("PREFECT_API_URL")
    try:
        with prefect_server(PORT):
            os.chdir(before)
            from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

            with temporary_settings({PREFECT_API_URL: url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                yield url
    finally:
        os.environ["PREFECT_API_URL"] = url


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder: .holdfast goes here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(folder: Path, prefect_api: str) -> DirectoryStore:
    """The store of flows that run in this test: the folder .holdfast, and a Prefect server beside it."""
    return DirectoryStore(folder / ".holdfast")


def command_lines_with(text: str) -> list[str]:
    """Of every living process on this computer."""
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if text in line]


def command_line(process: psutil.Process) -> list[str]:
    """Empty for one that has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Where HOLDFAST_NO_SKIPS is set, everything that tests need is there: a skip is a failure."""
    report = yield
    if report.skipped and os.environ.get("HOLDFAST_NO_SKIPS"):
        report.outcome, report.longrepr = "failed", f"skipped, and HOLDFAST_NO_SKIPS is set: {report.longrepr}"
    return report
