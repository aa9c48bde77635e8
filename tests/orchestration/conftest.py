"""The README's terminals: what it says to type is typed, into real shells, on a copy of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import _free_port, command_lines_with

REPOSITORY = Path(__file__).parents[2]
LEFT_BEHIND = shutil.ignore_patterns(
    ".venv", ".holdfast", ".git", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis"
)

# Guards against what never comes. On a crowded computer a worker alone took more than two
# minutes to start, and five flow runs more than 400 seconds.
PATIENCE_SECONDS = 300.0
TYPED_SECONDS = 900.0


@dataclass
class Platform:
    """A server and a worker, in terminals of their own."""

    folder: Path
    port: int
    blocks: list[str]
    """The README's terminals, in order."""

    @property
    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return ours | {
            "HOME": str(self.folder / "home"),
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "DO_NOT_TRACK": "1",
            "COLUMNS": "200",
        }

    def open_terminal(self, typed: str) -> subprocess.Popen[str]:
        """A shell that stops at the first command that fails, as a reader would."""
        return subprocess.Popen(
            ["bash", "-e", "-c", typed.replace("4200", str(self.port))],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def type(self, typed: str) -> tuple[int, str]:
        """Status and output of commands that end."""
        begin = "source .venv/bin/activate\nexport PREFECT_API_URL=http://127.0.0.1:4200/api\n"
        terminal = self.open_terminal(typed if typed.startswith("source") else begin + typed)
        output, _ = terminal.communicate(timeout=TYPED_SECONDS)
        return terminal.returncode, output

    def ask(self, path: str, **body: Any) -> Any:
        """The server's answer, as the UI gets it."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/{path}",
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
        )
        for patience in (0.5, 1, 2, 4, 0):
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code != 503 or not patience:  # its SQLite is busy: Prefect's own clients wait as well
                    raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from error
                time.sleep(patience)
        raise AssertionError("unreachable")

    def runs(self, flow: str) -> list[dict[str, Any]]:
        return self.ask("flow_runs/filter", flows={"name": {"any_": [flow]}})

    def run_of(self, output: str) -> dict[str, Any]:
        """The flow run that `prefect deployment run` said it made."""
        found = re.search(r"UUID: ([0-9a-f-]{36})", output)
        assert found, output
        return self.ask(f"flow_runs/{found[1]}")

    def summary(self, run_id: str) -> dict[str, Any]:
        return json.loads((self.folder / ".holdfast/runs" / run_id / "summary.json").read_text())

    def processes(self) -> list[str]:
        """Command lines of machines' processes."""
        return command_lines_with(f"{self.folder}/.holdfast/clouds")


def wait_until(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS, what: str = "") -> Any:
    """What `condition` says, as soon as it is something."""
    give_up_at = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up_at, f"timed out: {what or condition}"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="package")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("checkout") / "holdfast"
    shutil.copytree(REPOSITORY, folder, ignore=LEFT_BEHIND)
    (folder / ".venv").symlink_to(Path(sys.prefix))
    (folder / "home").mkdir()
    chapter = (folder / "README.md").read_text().split("## Through Prefect")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", chapter, re.DOTALL)
    platform = Platform(folder, _free_port(), blocks)
    terminals = []
    try:
        terminals.append(platform.open_terminal(f"exec > server.log 2>&1\n{blocks[0]}"))
        wait_until(lambda: _healthy(platform), what="the server")
        terminals.append(platform.open_terminal(f"exec > worker.log 2>&1\n{blocks[1]}"))
        wait_until(lambda: _working(platform, terminals[1]), what="the worker")
        yield platform
    finally:
        for terminal in reversed(terminals):
            end(terminal)
    assert platform.processes() == []


def end(terminal: subprocess.Popen[str]) -> None:
    """Ctrl-C; and where that is not enough, the window is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(terminal.pid, number)
            terminal.wait(10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    terminal.wait()


def _healthy(platform: Platform) -> bool:
    try:
        return platform.ask("health")
    except OSError:
        return False


def _working(platform: Platform, terminal: subprocess.Popen[str]) -> bool:
    log = platform.folder / "worker.log"
    assert terminal.poll() is None, log.read_text()
    return log.exists() and "started!" in log.read_text()
