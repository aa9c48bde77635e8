"""The start-up script that every machine boots with, run by a real bash."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import ConfigError, NotFoundError
from holdfast.runtime.fetch import read_times
from holdfast.runtime.startup import startup_script
from holdfast.storage import DirectoryStore

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True).map(lambda name: f"HF_{name}")
values = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60)
NASTY = [
    "it's",
    '"$HOME"',
    "`id`",
    "$(touch /tmp/x)",
    "a\nb\n",
    "\\",
    "--help",
    "",
    " ",
    "!!",
    "~",
    "é😀",
    "\r",
    "a'\\''b",
]


def seen_by_bash(environment: Mapping[str, str]) -> dict[str, str]:
    """What a program that the script starts finds in its environment; the exports alone are run."""
    before_the_boot, _, _ = startup_script(environment).partition("fetcher() {\ncat <<")
    script = before_the_boot + "".join(f'printf "%s\\0" "${name}"\n' for name in environment)
    ran = subprocess.run(["bash"], input=script.encode(), capture_output=True, check=True)
    assert ran.stderr == b""
    return dict(zip(environment, ran.stdout.decode().split("\0"), strict=False))


@given(st.dictionaries(names, values, max_size=8))
@settings(max_examples=50, deadline=None)
def test_any_value_survives_bash(environment: dict[str, str]) -> None:
    assert seen_by_bash(environment) == environment


def test_the_values_that_usually_go_wrong_survive_bash() -> None:
    environment = {f"HF_{number}": value for number, value in enumerate(NASTY)}
    assert seen_by_bash(environment) == environment


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "A=B", "A;id", "A\n", "Ä", "A\nB"])
def test_a_name_that_no_shell_takes_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits and underscores"):
        startup_script({name: "value"})


# -- what a machine can be given ---------------------------------------------------------------------------------------

USUAL = {
    "HOLDFAST_STORE": "s3://" + "a" * 63 + "/some/prefix?region=ap-southeast-2&endpoint=https%3A%2F%2Fs3.example.com",
    "HOLDFAST_RUN": "r" * 60,
    "HOLDFAST_ATTEMPT": "12",
    "HOLDFAST_BUNDLE": "s3://"
    + "a" * 63
    + "/some/prefix/runs/"
    + "r" * 60
    + "/bundles/0123456789abcdef.tar.gz?region=x",
    "HOLDFAST_BUNDLE_SHA256": "f" * 64,
    "HOLDFAST_CHECKPOINT": '{"every_steps": null, "every_seconds": 30.0, "max_to_keep": 3}',
    "HOLDFAST_MAX_RUN_SECONDS": "86400",
    "HOLDFAST_PYTHON": "/opt/pytorch/bin/python3",
}


def test_user_data_leaves_room_below_what_ec2_takes() -> None:
    assert len(startup_script(USUAL).encode()) < 14 * 1024


def test_more_than_ec2_takes_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"16384.*shorten HOLDFAST_CHECKPOINT"):
        startup_script({**USUAL, "HOLDFAST_CHECKPOINT": "x" * 6000})


@pytest.mark.parametrize("script", ["as it is written", "as it is sent"])
def test_shellcheck_finds_nothing(script: str) -> None:
    """A value may hold anything: that nothing in it expands is what the quotes are for."""
    text = files("holdfast.runtime").joinpath("startup.sh").read_text()
    if script == "as it is sent":
        text = startup_script({**USUAL, **{f"HF_{number}": value for number, value in enumerate(NASTY)}})
    shellcheck = Path(sys.executable).parent / "shellcheck"
    ran = subprocess.run([shellcheck, "--shell=bash", "-"], input=text, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# -- the boot ---------------------------------------------------------------------------------------------------------

AGENT = """
import os, sys
print("agent:", sys.argv[1], "in", os.getcwd(), flush=True)
"""


class Boot:
    """A start-up script run to its end, with an agent that says how it was started (or is `agent`)."""

    def __init__(self, tmp_path: Path, url: str, sha256: str, **changes: str) -> None:
        self.machine = tmp_path / "machine"
        self.machine.mkdir()
        self.store = DirectoryStore(tmp_path / "reports")
        environment = {
            "HOLDFAST_BUNDLE": url,
            "HOLDFAST_BUNDLE_SHA256": sha256,
            "HOLDFAST_STORE": self.store.url,
            "HOLDFAST_RUN": "run",
            "HOLDFAST_ATTEMPT": "2",
            **changes,
        }
        image = {
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "HOLDFAST_POWER_OFF": "echo power off",
            "HOLDFAST_PYTHON": sys.executable,
            "HOLDFAST_CONSOLE": str(tmp_path / "console"),
        }
        began = time.monotonic()
        ran = subprocess.run(
            ["bash", "-c", startup_script(environment)],
            cwd=self.machine,
            env=image,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        self.seconds = time.monotonic() - began
        self.console = ran.stdout
        self.last_line = ran.stdout.splitlines()[-1]

    @property
    def ending(self) -> dict[str, Any] | None:
        """What it stored of its failure, as the agent would have."""
        try:
            return json.loads(self.store.get("runs/run/attempts/0002/end.json"))
        except NotFoundError:
            return None


def bundle(agent: str = AGENT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        contents = {"code/train.py": "pass\n", "lib/holdfast/__init__.py": "", "lib/holdfast/runtime/__init__.py": ""}
        for name, text in {**contents, "lib/holdfast/runtime/__main__.py": agent}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def stored(folder: Path, data: bytes) -> tuple[str, str]:
    store = DirectoryStore(folder)
    store.put("runs/a/bundle.tar.gz", data)
    return f"{store.url}/runs/a/bundle.tar.gz", hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["store", "my store", "100%", "it's", "a\\nb", "$HOME", "é", "-n", "%41", "a?b#c"])
def test_a_machine_fetches_its_bundle_from_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    boot = Boot(tmp_path, *stored(tmp_path / name, bundle()))
    work = boot.machine / "work"
    assert f"agent: {work} in {work}" in boot.console
    assert (work / "code" / "train.py").read_text() == "pass\n"
    assert not (work / "bundle.tar.gz").exists()
    assert boot.last_line == "power off"
    assert boot.ending is None


def test_every_phase_of_a_boot_is_timed(tmp_path: Path) -> None:
    before = time.time()
    boot = Boot(tmp_path, *stored(tmp_path / "store", bundle()))
    phases = re.findall(r"^holdfast: boot (\w+) (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) ", boot.console, re.MULTILINE)
    assert [phase for phase, _ in phases] == ["boot", "fetch", "unpack", "agent"]
    times = dict(read_times(str(boot.machine / "work" / "boot.times")))
    assert before <= times["boot-started"] <= times["bundle-fetched"] <= time.time()


def test_a_bundle_with_another_checksum_is_never_unpacked(tmp_path: Path) -> None:
    url, _ = stored(tmp_path / "store", bundle())
    boot = Boot(tmp_path, url, "0" * 64)
    assert "boot failed in phase fetch: the bundle's SHA-256 is" in boot.console and "0" * 64 in boot.console
    assert not (boot.machine / "work" / "code").exists()
    assert "agent:" not in boot.console
    assert boot.last_line == "power off"


def test_a_machine_without_its_bundle_says_so_in_the_store_and_powers_itself_off(tmp_path: Path) -> None:
    boot = Boot(tmp_path, f"file://{tmp_path}/nothing", "0" * 64)
    assert "agent:" not in boot.console
    assert boot.last_line == "power off"
    assert boot.ending
    assert boot.ending["outcome"] == "program-failed" and boot.ending["exit_status"] is None
    assert f"boot failed in phase fetch: the bundle file://{tmp_path}/nothing can't be read" in boot.ending["detail"]
    assert "holdfast: boot boot 2" in boot.ending["log_tail"]
    assert datetime.fromisoformat(boot.ending["report"]["marks"]["boot-started"]) < datetime.now(UTC)


def test_a_failed_boot_never_replaces_an_ending(tmp_path: Path) -> None:
    DirectoryStore(tmp_path / "reports").put("runs/run/attempts/0002/end.json", b'{"outcome": "finished"}')
    boot = Boot(tmp_path, f"file://{tmp_path}/nothing", "0" * 64)
    assert boot.ending == {"outcome": "finished"}
    assert boot.last_line == "power off"


def test_a_boot_s_report_follows_the_cloud_s_clock(tmp_path: Path) -> None:
    origin = datetime.now(UTC)
    boot = Boot(tmp_path, f"file://{tmp_path}/nothing", "0" * 64, HOLDFAST_CLOCK=f"{origin.isoformat()} 3600.0")
    assert boot.ending
    began = datetime.fromisoformat(boot.ending["report"]["marks"]["boot-started"])
    assert origin < began <= origin + timedelta(hours=boot.seconds + 1)
    assert datetime.fromisoformat(boot.ending["at"]) > began + timedelta(seconds=30)  # 8 ms of the wall


def test_a_place_that_no_one_can_fetch_from_is_said(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "ftp://example/bundle", "0" * 64)
    assert "boot failed in phase fetch: no way to fetch ftp://example/bundle" in boot.console
    assert boot.last_line == "power off"


def test_a_machine_that_can_write_nothing_powers_itself_off_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "full").write_text("no folder")
    boot = Boot(tmp_path, *stored(tmp_path / "store", bundle()), HOLDFAST_WORK=str(tmp_path / "full"))
    assert "boot failed in phase boot" in boot.console
    assert boot.last_line == "power off"


def test_a_damaged_archive_is_said_with_the_archiver_s_words(tmp_path: Path) -> None:
    boot = Boot(tmp_path, *stored(tmp_path / "store", b"no archive at all"))
    assert "boot failed in phase unpack: " in boot.console
    assert "gzip" in boot.console
    assert boot.last_line == "power off"


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    boot = Boot(tmp_path, *stored(tmp_path / "store", bundle()), HOLDFAST_PYTHON="/opt/none/bin/python3")
    assert "boot failed in phase boot: no /opt/none/bin/python3 on this machine" in boot.console
    assert "environment.python" in boot.console
    assert boot.last_line == "power off"


def test_an_interpreter_that_is_too_old_is_refused_with_its_version(tmp_path: Path) -> None:
    """The fetcher in an interpreter that calls itself older; what it runs is otherwise this one."""
    old = tmp_path / "python"
    old.write_text(
        f"#!{sys.executable} -ES\nimport runpy, sys\nsys.version_info, sys.version = (3, 8, 10), '3.8.10 (default)'\n"
        "sys.argv = sys.argv[3:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    old.chmod(0o755)
    boot = Boot(tmp_path, *stored(tmp_path / "store", bundle()), HOLDFAST_PYTHON=str(old))
    assert "is Python 3.8.10, and Holdfast needs 3.11 or later" in boot.console
    assert "environment.python" in boot.console and "agent:" not in boot.console
    assert boot.ending and "3.8.10" in boot.ending["detail"]


def test_an_agent_that_can_t_start_is_a_failed_boot(tmp_path: Path) -> None:
    agent = "open('boot.log', 'a').write('no such store\\n')\nraise ValueError('no such store')"
    boot = Boot(tmp_path, *stored(tmp_path / "store", bundle(agent)))
    assert "ValueError: no such store" in boot.console
    assert "boot failed in phase agent" in boot.console
    assert boot.ending and "no such store" in boot.ending["log_tail"]
    assert boot.last_line == "power off"


def test_a_machine_powers_itself_off_however_its_agent_ends(tmp_path: Path) -> None:
    agent = "import os\nprint('agent: dying', flush=True)\nos.kill(os.getpid(), 9)"
    boot = Boot(tmp_path, *stored(tmp_path / "store", bundle(agent)))
    assert "agent: dying" in boot.console
    assert "boot failed" not in boot.console
    assert boot.last_line == "power off"


# -- the machine's own dead-man's switch ------------------------------------------------------------------------------


def test_a_machine_that_hangs_powers_itself_off_when_its_time_is_over(tmp_path: Path) -> None:
    agent = (
        "import os, signal, time\nopen('agent.pid', 'w').write(str(os.getpid()))\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('agent: hanging', flush=True))\ntime.sleep(600)"
    )
    store = stored(tmp_path / "store", bundle(agent))
    clock = f"{datetime.now(UTC).isoformat()} 3600.0"
    boot = Boot(tmp_path, *store, HOLDFAST_MAX_RUN_SECONDS="5400", HOLDFAST_CLOCK=clock)  # 1.5 s of the wall
    assert "agent: hanging" in boot.console
    assert "5400 s, the longest that this machine may run, are over" in boot.console
    assert boot.last_line == "power off"
    assert boot.seconds < 20


def test_the_agent_is_asked_first(tmp_path: Path) -> None:
    agent = (
        "import os, signal, sys, time\nopen('agent.pid', 'w').write(str(os.getpid()))\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('agent: saved', flush=True)))\ntime.sleep(600)"
    )
    boot = Boot(tmp_path, *stored(tmp_path / "store", bundle(agent)), HOLDFAST_MAX_RUN_SECONDS="1.5")
    assert "agent: saved" in boot.console
    assert boot.console.count("power off") == 1
    assert boot.seconds < 20


def test_the_switch_does_not_outlive_the_boot(tmp_path: Path) -> None:
    boot = Boot(tmp_path, *stored(tmp_path / "store", bundle()), HOLDFAST_MAX_RUN_SECONDS="3000")
    assert boot.console.count("power off") == 1
    assert boot.seconds < 20  # its sleep would hold the console open


def test_a_console_that_nobody_reads_any_more_does_not_disarm_it(tmp_path: Path) -> None:
    """As Google's runner of start-up scripts does after a line of 64 KiB: it closes its end, and goes on waiting."""
    agent = "import os, time\nopen('agent.pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    url, sha256 = stored(tmp_path / "store", bundle(agent))
    off = tmp_path / "off"
    environment = {
        "HOLDFAST_BUNDLE": url,
        "HOLDFAST_BUNDLE_SHA256": sha256,
        "HOLDFAST_STORE": (tmp_path / "reports").as_uri(),
        "HOLDFAST_RUN": "run",
        "HOLDFAST_ATTEMPT": "1",
        "HOLDFAST_MAX_RUN_SECONDS": "2",
    }
    machine = subprocess.Popen(
        ["bash", "-c", startup_script(environment)],
        cwd=tmp_path,
        env={
            "PATH": "/usr/bin:/bin",
            "HOLDFAST_POWER_OFF": f"touch {off}",
            "HOLDFAST_PYTHON": sys.executable,
            "HOLDFAST_CONSOLE": str(tmp_path / "console"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert machine.stdout
    while b"boot agent" not in machine.stdout.readline():
        assert machine.poll() is None
    machine.stdout.close()
    machine.wait(30)
    assert off.exists()


# -- the machine's settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "left"),
    [
        ("always within_size advise [never] deny force\n", "advise\n"),
        ("[always] within_size advise never deny force\n", None),
        ("always within_size advise never [deny] force\n", None),  # somebody's own decision
        (None, None),  # a kernel without them
    ],
)
def test_snapshots_may_have_huge_pages_where_the_image_has_not_decided(
    tmp_path: Path, found: str | None, left: str | None
) -> None:
    setting = tmp_path / "shmem_enabled"
    if found is not None:
        setting.write_text(found)
    text = files("holdfast.runtime").joinpath("startup.sh").read_text()
    function = text[text.index("allow_huge_pages() {") : text.index("# The machine's own dead-man's switch")]
    path = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    assert path in function
    script = (
        f"set -eu -o pipefail\n{function.replace(path, str(setting))}allow_huge_pages 2> /dev/null || true\necho on"
    )
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert ran.stdout == "on\n"
    assert (setting.read_text() if setting.exists() else None) == (left or found)
