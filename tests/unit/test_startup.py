"""The start-up script that every machine boots with, run by a real bash."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import ConfigError
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
    exports = startup_script(environment).removesuffix(files("holdfast.runtime").joinpath("startup.sh").read_text())
    script = exports + "".join(f'printf "%s\\0" "${name}"\n' for name in environment)
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


# -- the boot ---------------------------------------------------------------------------------------------------------


class Boot:
    """A start-up script run to its end. Instead of an agent: a program that says how it was started."""

    def __init__(self, tmp_path: Path, url: str, sha256: str, agent: str = "echo agent: $* in $PWD") -> None:
        (tmp_path / "python").write_text(f"#!/bin/bash\n{agent}\n")
        (tmp_path / "python").chmod(0o755)
        environment = {"HOLDFAST_BUNDLE": url, "HOLDFAST_BUNDLE_SHA256": sha256}
        self.machine = tmp_path / "machine"
        self.machine.mkdir()
        ran = subprocess.run(
            ["bash", "-c", startup_script(environment)],
            cwd=self.machine,
            env={
                "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
                "HOLDFAST_POWER_OFF": "echo power off",
                "HOLDFAST_PYTHON": str(tmp_path / "python"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        self.console = ran.stdout
        self.last_line = ran.stdout.splitlines()[-1]


def bundle() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("code/train.py")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"pass\n"))
    return buffer.getvalue()


def stored(folder: Path, data: bytes) -> tuple[str, str]:
    store = DirectoryStore(folder)
    store.put("runs/a/bundle.tar.gz", data)
    return f"{store.url}/runs/a/bundle.tar.gz", hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", ["store", "my store", "100%", "it's", "a\\nb", "$HOME", "é", "-n", "%41"])
def test_a_machine_fetches_its_bundle_from_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    boot = Boot(tmp_path, *stored(tmp_path / name, bundle()))
    work = boot.machine / "work"
    assert f"agent: -m holdfast.runtime {work} in {work}" in boot.console
    assert (work / "code" / "train.py").read_text() == "pass\n"
    assert not (work / "bundle.tar.gz").exists()
    assert boot.last_line == "power off"


def test_a_bundle_with_another_checksum_is_never_unpacked(tmp_path: Path) -> None:
    url, _ = stored(tmp_path / "store", bundle())
    boot = Boot(tmp_path, url, "0" * 64)
    assert "boot failed: the bundle's SHA-256 is" in boot.console and "0" * 64 in boot.console
    assert not (boot.machine / "work" / "code").exists()
    assert "agent:" not in boot.console
    assert boot.last_line == "power off"


def test_a_machine_without_its_bundle_powers_itself_off(tmp_path: Path) -> None:
    boot = Boot(tmp_path, f"file://{tmp_path}/nothing", "0" * 64)
    assert "agent:" not in boot.console
    assert boot.last_line == "power off"


def test_a_place_that_no_one_can_fetch_from_is_said(tmp_path: Path) -> None:
    boot = Boot(tmp_path, "ftp://example/bundle", "0" * 64)
    assert "boot failed: no way to fetch ftp://example/bundle" in boot.console
    assert boot.last_line == "power off"


def test_a_machine_powers_itself_off_however_its_agent_ends(tmp_path: Path) -> None:
    boot = Boot(tmp_path, *stored(tmp_path / "store", bundle()), agent="echo agent: dying; kill -9 $$")
    assert "agent: dying" in boot.console
    assert boot.last_line == "power off"
