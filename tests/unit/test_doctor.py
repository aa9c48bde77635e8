"""The doctor's own words: what reaches what, what it costs, and a command that is run in the wrong place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.protocol import Driver, Finding
from holdfast.errors import ConfigError
from holdfast.model import FleetJob, GangJob, Resources, TrainingJob, load_any_job
from holdfast.storage import DirectoryStore
from holdfast.supervision.doctor import examine, examine_job, examine_store, to_text
from holdfast.supervision.preflight import unreachable

REPOSITORY = Path(__file__).parents[2]
ROLE = "arn:aws:iam::123456789012:role/holdfast-machine"


class OverwritingStore(DirectoryStore):
    """Takes every condition for granted, like servers that do not know If-None-Match."""

    def create(self, key: str, data: bytes) -> None:
        self.put(key, data)


class ReadOnlyStore(DirectoryStore):
    def create(self, key: str, data: bytes) -> None:
        raise ConfigError("s3:PutObject is not granted on arn:aws:s3:::runs/*")


def by_subject(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_a_store_that_works_has_every_right_tried_and_keeps_no_probe(folder: Path) -> None:
    findings = by_subject(examine_store(lambda: DirectoryStore(folder)))
    rights = ["write", "conditional write", "read", "list", "delete"]
    assert list(findings) == ["store", *(f"store {right}" for right in rights)]
    assert all(finding.ok for finding in findings.values())
    assert DirectoryStore(folder).list("") == []


def test_a_store_without_conditional_writes_is_no_store(folder: Path) -> None:
    findings = by_subject(examine_store(lambda: OverwritingStore(folder)))
    assert [name for name, finding in findings.items() if not finding.ok] == ["store conditional write"]
    assert "has no conditional writes; use another" in findings["store conditional write"].detail


def test_what_can_not_be_written_is_said_once(folder: Path) -> None:
    findings = by_subject(examine_store(lambda: ReadOnlyStore(folder)))
    assert list(findings) == ["store", "store write"]
    assert "s3:PutObject" in findings["store write"].detail


@pytest.mark.parametrize(
    "store, driver, words",
    [
        ("file:///home/me/.holdfast", "local", ""),
        ("file:///home/me/.holdfast", "aws", "which machines of aws can't reach"),
        ("/home/me/.holdfast", "aws+gcp", "which machines of aws and gcp can't reach"),
        ("s3://runs/team?region=us-east-1", "aws", ""),
        ("s3://runs/team", "local", ""),
        ("gs://runs/team", "gcp", ""),
        ("gs://runs/team", "aws+gcp", "machines of aws can't reach gs://runs/team"),
        ("s3://runs/team", "aws+gcp", "set machine_role in the store's block"),
        (f"s3://runs/team?role={ROLE}", "aws+gcp", ""),
    ],
)
def test_a_store_that_the_machines_can_not_reach_is_named(store: str, driver: str, words: str) -> None:
    found = list(unreachable(store, driver))
    assert len(found) == bool(words)
    assert words in "".join(found)


@pytest.fixture
def driver(folder: Path) -> Driver:
    return LocalDriver(LocalCloudConfig(root=folder / "cloud"))


def job(folder: Path, **changes: object) -> TrainingJob:
    (folder / "train.py").write_text("")
    return TrainingJob.model_validate({"name": "mine", "script": "train.py", "code": str(folder), **changes})


def test_the_cost_of_an_hour_and_the_worst_case_are_told_before_anything_runs(folder: Path, driver: Driver) -> None:
    findings = by_subject(examine_job(job(folder, max_run_hours=2), driver))
    assert list(findings) == ["code", "spot pools", "on-demand pools", "cost"]
    offers = driver.offers()
    dearest = max(offers, key=lambda offer: offer.on_demand_usd_per_hour)
    assert f"${dearest.on_demand_usd_per_hour * 2:.2f} if only {dearest.pool.instance_type}" in findings["cost"].detail
    assert driver.machines({}) == []


def test_one_type_alone_has_one_worst_case(folder: Path, driver: Driver) -> None:
    kind = driver.offers()[0].pool.instance_type
    one = job(folder, resources=Resources(instance_types=[kind]), provisioning="on-demand")
    findings = by_subject(examine_job(one, driver))
    assert list(findings) == ["code", "on-demand pools", "cost"]
    assert "if only" not in findings["cost"].detail


@pytest.mark.parametrize(
    "changes, subject, words",
    [
        ({"resources": Resources(instance_types=["g5.xlarg"])}, "pools", "did you mean 'g5.xlarge'?"),
        ({"resources": Resources(gpus=64)}, "pools", "ask for less"),
        ({"code": "nowhere"}, "code", "nowhere"),
    ],
)
def test_what_is_wrong_with_a_job_is_a_line_of_its_own(
    changes: dict[str, object], subject: str, words: str, folder: Path, driver: Driver
) -> None:
    finding = by_subject(examine_job(job(folder, **changes), driver))[subject]
    assert not finding.ok and words in finding.detail


def test_what_can_not_be_opened_is_a_line_and_the_rest_is_examined_all_the_same(folder: Path, driver: Driver) -> None:
    def refused() -> DirectoryStore:
        raise ConfigError("the AWS session has no credentials; log in")

    text = to_text(examine(refused, lambda: driver, job(folder)))
    assert "MISSING  store " in text and "has no credentials; log in" in text
    assert "ok       cost " in text
    assert text.endswith(" are missing")
    text = to_text(examine(lambda: DirectoryStore(folder), lambda: driver, None))
    assert text.endswith("everything works")


def run_holdfast(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "holdfast", "--help"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")},
        capture_output=True,
        text=True,
    )


def test_the_command_outside_of_a_checkout_says_where_to_go(folder: Path) -> None:
    told = run_holdfast(folder, "-S")  # without the .pth file by which the environment of a checkout finds it
    assert told.returncode == 1
    assert "there is no folder `flows` here" in told.stderr and "Traceback" not in told.stderr


def test_the_command_of_a_python_without_prefect_says_which_to_use(folder: Path) -> None:
    (folder / "flows").mkdir()
    (folder / "flows/__init__.py").write_text("")
    told = run_holdfast(folder, "-S")
    assert told.returncode == 1
    assert "use .venv/bin/holdfast" in told.stderr and "Traceback" not in told.stderr


def test_the_command_in_a_checkout_lists_its_commands() -> None:
    told = run_holdfast(REPOSITORY)
    assert told.returncode == 0
    assert [
        name for name in ("train", "fleet", "rehearse", "reap", "doctor", "demo", "ui") if name not in told.stdout
    ] == []


def test_a_gang_s_doctor_tells_what_each_machine_costs_and_which_ports_must_be_open(folder: Path) -> None:
    (folder / "ddp.py").write_text("")
    job = GangJob(name="together", script="ddp.py", code=str(folder), machines=3, spot_share=0.5)
    driver = LocalDriver(LocalCloudConfig(root=folder / "cloud"))
    found = by_subject(examine_job(job, driver))
    assert {"spot pools", "on-demand pools"} <= found.keys()
    assert " an hour for each of 3 machines in " in found["cost"].detail
    assert "nothing is closed" in found["ports"].detail
    driver.name = "aws+gcp"
    assert by_subject(examine_job(job, driver))["ports"].detail.endswith("docs/aws.md and docs/gcp.md")


def test_a_doctor_takes_a_job_of_any_kind(folder: Path) -> None:
    kinds = {"training": "", "fleet": "machines: 2\n", "gang": "machines: 2\ncheckpointing: {every: 5 steps}\n"}
    jobs = {}
    for kind, more in kinds.items():
        (folder / f"{kind}.yaml").write_text(f"name: {kind}\nscript: a.py\n{more}")
        jobs[kind] = type(load_any_job(folder / f"{kind}.yaml"))
    assert jobs == {"training": TrainingJob, "fleet": FleetJob, "gang": GangJob}
