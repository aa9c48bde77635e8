"""What a batch job may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from holdfast.errors import ConfigError
from holdfast.model import BatchJob, FleetJob, load_any_job, load_batch_job, load_fleet_job, validation_message

GOOD: dict[str, Any] = {"name": "reviews", "inputs": ["data/*.jsonl"], "function": "embed:embed", "machines": 5}


def complaint(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        BatchJob.model_validate({**GOOD, **fields})
    return validation_message(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machines", 0),
        ("spot_share", 1.5),
        ("batch_size", 0),
        ("inputs", []),
        ("function", "embed"),
        ("function", "embed.py:embed"),
        ("setup", "embed:"),
        ("results_format", "csv"),
        ("visibility_seconds", 0),
        ("batch_time_limit_seconds", 0),
        ("max_deliveries", 0),
        ("max_failed_share", 1.1),
        ("max_usd", 0),
    ],
)
def test_a_bad_value_is_named_with_its_field(field: str, value: Any) -> None:
    message = complaint(**{field: value})
    assert message.startswith(f"{field}: ") and f"(got {value!r})" in message


def test_what_the_machines_run_is_not_for_the_job_to_say() -> None:
    assert "'script' is no key of BatchJob" in complaint(script="embed.py")
    assert "HOLDFAST_STORE" in complaint(env={"HOLDFAST_STORE": "elsewhere"})
    assert "more than all of max_run_hours, 1" in complaint(batch_time_limit_seconds=7200, max_run_hours=1)


def test_one_input_needs_no_list() -> None:
    assert BatchJob.model_validate({**GOOD, "inputs": "s3://bucket/data"}).inputs == ["s3://bucket/data"]


def test_code_and_inputs_are_taken_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "{name: a, inputs: [data, 's3://b/c', /d], function: 'e:f', machines: 2, code: code}"
    )
    job = load_batch_job(tmp_path / "job.yaml")
    assert job.inputs == [str(tmp_path / "data"), "s3://b/c", "/d"] and job.code == str(tmp_path / "code")
    assert isinstance(load_any_job(tmp_path / "job.yaml"), BatchJob)


def test_a_file_of_another_kind_names_the_command_for_it(tmp_path: Path) -> None:
    (tmp_path / "batch.yaml").write_text("{name: a, inputs: [data], function: 'e:f', machines: 2}")
    (tmp_path / "fleet.yaml").write_text("{name: a, script: a.py, machines: 2, spot_share: 1}")
    assert isinstance(load_any_job(tmp_path / "fleet.yaml"), FleetJob)
    with pytest.raises(ConfigError, match=r"one of inputs, function, .* is a BatchJob, for python -m flows batch"):
        load_fleet_job(tmp_path / "batch.yaml")
    with pytest.raises(ConfigError, match=r"none of inputs, function, .* is a FleetJob, for python -m flows fleet"):
        load_batch_job(tmp_path / "fleet.yaml")
