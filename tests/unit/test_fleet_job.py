"""What a fleet may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from holdfast.errors import ConfigError
from holdfast.model import FleetJob, TrainingJob, load_fleet_job, load_job, validation_message

GOOD: dict[str, Any] = {"name": "crowd", "script": "member.py", "machines": 5}


def complaint(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        FleetJob.model_validate({**GOOD, **fields})
    return validation_message(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machines", 0),
        ("machines", 1001),
        ("spot_share", 1.5),
        ("spot_share", -0.1),
        ("kind", "eternal"),
        ("max_replacements", -1),
        ("max_run_hours", 0),
    ],
)
def test_a_bad_value_is_named_with_its_field(field: str, value: Any) -> None:
    message = complaint(**{field: value})
    assert message.startswith(f"{field}: ") and f"(got {value!r})" in message


def test_a_maintained_fleet_must_say_for_how_long() -> None:
    assert "max_run_hours" in complaint(kind="maintained")
    assert FleetJob.model_validate({**GOOD, "kind": "maintained", "max_run_hours": 10}).max_run_hours == 10


def test_what_every_job_must_say_a_fleet_must_say_too() -> None:
    assert "exactly one of script, module and command" in complaint(module="also")
    assert "names that begin with HOLDFAST_ are ours" in complaint(env={"HOLDFAST_MEMBER": "me"})
    assert "did you mean 'spot_share'" in complaint(spot_shares=0.8)
    assert "'checkpointing' is no key of FleetJob" in complaint(checkpointing={})


def test_a_job_survives_being_written_down_and_read() -> None:
    job = FleetJob.model_validate({**GOOD, "kind": "maintained", "max_run_hours": 3, "spot_share": 0.8})
    assert FleetJob.model_validate(job.model_dump(mode="json")) == job


def test_a_file_says_which_job_it_holds(tmp_path: Path) -> None:
    training, fleet = tmp_path / "training.yaml", tmp_path / "fleet.yaml"
    training.write_text("name: gpt\nscript: train.py\n")
    fleet.write_text("name: crowd\nscript: member.py\nmachines: 3\n")
    assert isinstance(load_job(training), TrainingJob)
    assert load_fleet_job(fleet).machines == 3
    assert load_fleet_job(fleet).code == str(tmp_path.resolve())
    with pytest.raises(ConfigError, match="so it is a FleetJob, for python -m flows fleet"):
        load_job(fleet)
    with pytest.raises(ConfigError, match="none of machines, spot_share, kind, so it is a TrainingJob"):
        load_fleet_job(training)


def test_every_field_of_a_fleet_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs/fleets.md").read_text()
    assert [name for name in FleetJob.model_fields if f"`{name}`" not in page] == []


def test_the_example_is_a_fleet() -> None:
    job = load_fleet_job(Path(__file__).parents[2] / "examples/fleet.yaml")
    assert (job.machines, job.spot_share, job.kind) == (5, 0.8, "instant")
