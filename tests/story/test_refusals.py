"""What can never work is refused before anything is launched: field, value and remedy in one message."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from blocks.budget import SpendingBudget
from blocks.store import CheckpointStore
from flows.__main__ import main
from tests.conftest import PROGRAMS

REFUSED = 2


@pytest.fixture(autouse=True)
def nothing_was_launched(folder: Path, prefect_api: str) -> Iterator[None]:
    yield
    assert not list(folder.glob(".holdfast/clouds/*/launches/*"))
    assert not list(folder.glob(".holdfast/runs/*/journal/*"))


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *options: str, **fields: Any) -> str:
    """What the command line says of a job that is good but for `fields`."""
    shutil.copytree(PROGRAMS, folder / "code", dirs_exist_ok=True)
    job = {"name": "bad", "script": "light.py", "code": "code", "args": ["10", "0"], **fields}
    (folder / "job.yaml").write_text(yaml.safe_dump({name: value for name, value in job.items() if value is not None}))
    capsys.readouterr()
    assert main(["train", "job.yaml", *options]) == REFUSED
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.err.startswith("refused: ")
    return said.err


BAD_FIELDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a missing script": ({"script": "lihgt.py"}, ["script", "'lihgt.py'", "did you mean 'light.py'"]),
    "a script outside the code": ({"script": "../job.yaml"}, ["script", "outside", "name one below it"]),
    "a script that is no Python": ({"script": "broken.py"}, ["script", "'broken.py'", "line 1"]),
    "a module that does not import": ({"script": None, "module": "nowhere.at_all"}, ["module", "'nowhere.at_all'"]),
    "a script whose import is missing": ({"script": "importing.py"}, ["'importing.py' line 1", "'no_such_package'"]),
    "a command that is not there": ({"script": None, "command": ["no-such-tool"]}, ["command", "'no-such-tool'"]),
    "no code folder": ({"code": "nowhere"}, ["code", "nowhere", "no folder"]),
    "an unknown instance type": (
        {"resources": {"instance_types": ["g5.xlarg"]}},
        ["resources.instance_types", "'g5.xlarg'", "did you mean 'g5.xlarge'"],
    ),
    "an unknown zone": ({"resources": {"zones": ["local-9z"]}}, ["resources.zones", "'local-9z'"]),
    "resources that no machine has": (
        {"resources": {"instance_types": ["c7i.large"], "gpus": 4}},
        ["resources", "'gpus': 4", "ask for less"],
    ),
    "resources that contradict each other": (
        {"resources": {"gpu_name": "H100"}},
        ["gpu_name", "'H100'", "gpus is 0", "set gpus to at least 1"],
    ),
    "an interval of zero": (
        {"checkpointing": {"every": "0 steps"}},
        ["checkpointing.every", "'0 steps'", "above zero"],
    ),
    "a negative interval": ({"checkpointing": {"every": "-5 s"}}, ["checkpointing.every", "'-5 s'", "above zero"]),
    "a negative lease": ({"lease_seconds": -1}, ["lease_seconds", "-1", "greater than 0"]),
    "a misspelt key": ({"scirpt": "light.py"}, ["'scirpt'", "did you mean 'script'"]),
    "a misspelt key further in": (
        {"checkpointing": {"max_to_kep": 2}},
        ["checkpointing", "'max_to_kep'", "did you mean 'max_to_keep'"],
    ),
    "two programs": ({"module": "light"}, ["exactly one of script, module and command", "script and module"]),
    "a reserved variable": ({"env": {"HOLDFAST_RUN": "x"}}, ["env.HOLDFAST_RUN", "choose another"]),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_bad_field_is_refused(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "code").mkdir()
    (folder / "code/broken.py").write_text("def (:\n")
    (folder / "code/importing.py").write_text("import no_such_package\n")
    fields, words = BAD_FIELDS[case]
    said = refusal(folder, capsys, **fields)
    assert [word for word in words if word not in said] == [], said


def test_code_that_leads_out_of_its_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "secret").write_text("not yours")
    (folder / "code").mkdir()
    (folder / "code/link").symlink_to(folder / "secret")
    said = refusal(folder, capsys)
    assert "code: link is a link to" in said and "copy the file" in said


def test_every_problem_is_said_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(folder, capsys, script="nowhere.py", resources={"zones": ["local-9z"]})
    assert "'nowhere.py'" in said and "'local-9z'" in said


def test_a_job_file_that_is_missing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.yaml"]) == REFUSED
    assert "nowhere.yaml" in capsys.readouterr().err


def test_an_unknown_account_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "account" in refusal(folder, capsys, "--account", "nobodys")


def test_a_store_that_cannot_be_written_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("a file is no folder")  # no mode bits: they do not stop an administrator
    CheckpointStore(url=str(folder / "file" / "store")).save("unwritable", overwrite=True)
    said = refusal(folder, capsys, "--store", "unwritable")
    assert "store" in said and str(folder / "file") in said and "make it writable" in said


def test_a_store_with_another_jobs_checkpoints_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = folder / ".holdfast/runs/taken/checkpoints/0001-000000000010/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    said = refusal(folder, capsys, "--run-id", "taken")
    assert "'taken'" in said and "another run_id" in said


def test_a_budget_below_the_worst_case_of_the_first_attempt_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    SpendingBudget(max_usd=0.5).save("small", overwrite=True)
    resources = {"instance_types": ["g5.xlarge"]}
    said = refusal(folder, capsys, "--budget", "small", resources=resources, max_run_hours=2)
    assert "'small'" in said and "$0.50" in said and "$2.01" in said and "raise max_usd" in said


def test_a_notification_block_that_does_not_exist_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(folder, capsys, "--notify", "slack-webhook/nobody")
    assert "notify" in said and "'slack-webhook/nobody'" in said
