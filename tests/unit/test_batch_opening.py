"""What a batch job can have wrong is said before a machine is asked for, and before anything is planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.errors import ConfigError
from holdfast.ledger.budget import Budget
from holdfast.model import BatchJob
from holdfast.storage import DirectoryStore
from holdfast.supervision.batch_opening import open_batch_run
from holdfast.supervision.batch_places import machines_of_use, reached_as_the_store, results_prefix
from holdfast.supervision.batch_run import BatchRun
from tests.conftest import PROGRAMS


def job_of(folder: Path, **changes: Any) -> BatchJob:
    path = folder / "in.jsonl"
    path.write_text('{"n": 1}\n')
    fields = {
        "name": "double",
        "inputs": [str(path)],
        "function": "mapping:double",
        "code": str(PROGRAMS / "batch"),
        "machines": 2,
    }
    return BatchJob(**{**fields, **changes})


def opened(folder: Path, job: BatchJob, run_id: str = "double", budget: Budget | None = None) -> BatchRun:
    driver = LocalDriver(LocalCloudConfig(root=folder / "cloud"))
    return open_batch_run(job, driver, DirectoryStore(folder / "store"), budget, run_id)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"function": "maping:double"}, ["function: no module 'maping'", "did you mean 'mapping'?"]),
        ({"function": "mapping:doubel"}, ["mapping.py defines no 'doubel'", "did you mean 'double'?"]),
        ({"setup": "mapping:beginn"}, ["setup:", "did you mean 'begin'?"]),
        ({"inputs": ["nowhere/*.jsonl"]}, ["inputs: 'nowhere/*.jsonl' names no file", "correct it"]),
        ({"queue": "kafka://host"}, ["no broker speaks 'kafka'", "use sqlite:///PATH"]),
        ({"queue": "redis://127.0.0.1:1/0"}, ["queue redis://127.0.0.1:1/0", "no answer", "name another"]),
        ({"results": "runs/mine"}, ["results: 'runs/mine' is no prefix for results"]),
        ({"results": "s3://elsewhere/out"}, ["results: 's3://elsewhere/out' lies outside the store"]),
        ({"resources": {"instance_types": ["c7i.larg"]}}, ["did you mean 'c7i.large'?"]),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        opened(tmp_path, job_of(tmp_path, **changes))
    assert [word for word in words if word not in str(refused.value)] == [], str(refused.value)
    assert not (tmp_path / "store/runs").exists() and not list(tmp_path.glob("cloud/machines/*"))


def test_inputs_without_a_byte_are_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    Path(job.inputs[0]).write_text("")
    with pytest.raises(ConfigError, match="names only empty files"):
        opened(tmp_path, job)


def test_a_place_with_the_results_of_another_job_is_refused(tmp_path: Path) -> None:
    opened(tmp_path, job_of(tmp_path, results="out"), "first")
    opened(tmp_path, job_of(tmp_path, results="out", machines=9), "second")  # the same job, with more machines
    with pytest.raises(ConfigError, match=r"'out' in .* holds the results of another job, 'double'"):
        opened(tmp_path, job_of(tmp_path, results="out", batch_size=7), "third")
    DirectoryStore(tmp_path / "store").put("taken/file", b"")
    with pytest.raises(ConfigError, match="holds something that is no batch job's"):
        opened(tmp_path, job_of(tmp_path, results="taken"), "fourth")


def test_a_budget_that_the_fleet_might_break_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget 'team'.*is left of max_usd"):
        opened(tmp_path, job_of(tmp_path, max_run_hours=100), budget=Budget(name="team", max_usd=1, max_machines=5))
    with pytest.raises(ConfigError, match="machines: 9 are more than max_machines of budget 'team', 5"):
        job = job_of(tmp_path, max_run_hours=1, machines=9)
        opened(tmp_path, job, budget=Budget(name="team", max_usd=500, max_machines=5))


def test_there_are_no_more_machines_than_batches_to_take() -> None:
    assert machines_of_use(8, living=0, at_work=0, waiting=2, workers_per_machine=1) == 2
    assert machines_of_use(8, living=2, at_work=0, waiting=2, workers_per_machine=1) == 2  # they boot
    assert machines_of_use(8, living=2, at_work=2, waiting=2, workers_per_machine=1) == 4
    assert machines_of_use(8, living=2, at_work=2, waiting=900, workers_per_machine=4) == 8
    assert machines_of_use(8, living=3, at_work=3, waiting=0, workers_per_machine=1) == 3
    assert machines_of_use(8, living=0, at_work=0, waiting=5, workers_per_machine=4) == 2


def test_inputs_in_the_store_s_bucket_are_reached_as_the_store_is(tmp_path: Path) -> None:
    class Store:
        url = "s3://bucket/team?region=eu-west-1"

    named = ["s3://bucket/in/*.jsonl", "s3://other/in", "s3://bucket/a?region=x", "/here"]
    assert reached_as_the_store(named, Store()) == ["s3://bucket/in/*.jsonl?region=eu-west-1", *named[1:]]  # type: ignore[arg-type]
    assert results_prefix(job_of(tmp_path), Store(), "x") == "results/x"  # type: ignore[arg-type]
    assert results_prefix(job_of(tmp_path, results="s3://bucket/team/a/b"), Store(), "x") == "a/b"  # type: ignore[arg-type]
