"""What the user asks for is refused completely and helpfully, or accepted, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from holdfast.errors import ConfigError
from holdfast.model import TrainingJob, load_job, parse_interval, validation_message

GOOD: dict[str, Any] = {"name": "gpt", "script": "train.py"}


def complaint(**fields: Any) -> str:
    """What a user is told about a job that is good but for `fields`."""
    with pytest.raises(ValidationError) as caught:
        TrainingJob.model_validate({**GOOD, **fields})
    return validation_message(caught.value)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("auto", ("auto", 0.0)),
        (" auto ", ("auto", 0.0)),
        ("100 steps", ("steps", 100.0)),
        ("1 step", ("steps", 1.0)),
        ("30 s", ("seconds", 30.0)),
        ("30s", ("seconds", 30.0)),
        ("0.5 seconds", ("seconds", 0.5)),
        ("5 minutes", ("seconds", 300.0)),
        ("1.5 min", ("seconds", 90.0)),
    ],
)
def test_an_interval_is_read_as_written(text: str, meaning: tuple[str, float]) -> None:
    assert parse_interval(text) == meaning


@pytest.mark.parametrize(
    "every", ["0 steps", "-5 steps", "0 s", "-1 s", "1.5 steps", "100", "steps", "", "often", "1e3 s", "1.2.3 s", "5 h"]
)
def test_an_interval_that_means_nothing_is_refused_with_field_and_value(every: str) -> None:
    message = complaint(checkpointing={"every": every})
    assert f"checkpointing.every is {every!r}" in message
    assert "write '100 steps'" in message or "must be above zero" in message


# -- misspelt keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "key", "meant"),
    [
        ({"scirpt": "a.py"}, "scirpt", "script"),
        ({"max_attemps": 3}, "max_attemps", "max_attempts"),
        ({"checkpoint": {}}, "checkpoint", "checkpointing"),
        ({"resources": {"vcpu": 4}}, "vcpu", "vcpus"),
        ({"checkpointing": {"evry": "10 s"}}, "evry", "every"),
        ({"fallback": {"progress_to_rest": 4}}, "progress_to_rest", "progress_to_reset"),
    ],
)
def test_a_misspelt_key_is_named_with_the_right_one(fields: dict[str, Any], key: str, meant: str) -> None:
    message = complaint(**fields)
    assert repr(key) in message
    assert f"did you mean {meant!r}?" in message


def test_a_key_like_no_other_is_answered_with_the_known_ones() -> None:
    message = complaint(resources={"zzz": 1})
    assert "resources: 'zzz' is no key" in message
    assert "known keys: instance_types, zones, regions, vcpus, memory_gib, gpus, gpu_name, disk_gib" in message


# -- contradictions and bad values ------------------------------------------------------------------------------------


def test_a_gpu_by_name_on_a_machine_without_gpus_is_a_contradiction() -> None:
    message = complaint(resources={"gpu_name": "A100"})
    assert "resources.gpu_name is 'A100' but resources.gpus is 0" in message
    assert "set gpus to at least 1, or drop gpu_name" in message
    TrainingJob.model_validate({**GOOD, "resources": {"gpu_name": "A100", "gpus": 1}})


@pytest.mark.parametrize(
    ("program", "named"),
    [
        ({"script": ""}, "none"),
        ({"script": "a.py", "module": "a"}, "script and module"),
        ({"script": "a.py", "module": "a", "command": ["./a"]}, "script and module and command"),
    ],
)
def test_a_job_names_exactly_one_program(program: dict[str, Any], named: str) -> None:
    assert f"this one names {named}" in complaint(**program)


def test_going_back_to_spot_contradicts_never_using_it() -> None:
    message = complaint(provisioning="on-demand", fallback={"return_to_spot_after_seconds": 60})
    assert "return_to_spot_after_seconds contradicts provisioning 'on-demand'" in message


def test_our_own_environment_variables_are_not_the_users_to_set() -> None:
    assert "env.HOLDFAST_STORE" in complaint(env={"A": "1", "HOLDFAST_STORE": "elsewhere"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Big Model"),
        ("name", "-x"),
        ("name", "x" * 42),
        ("name", "x\n"),
        ("resources.vcpus", -1),
        ("resources.gpus", -1),
        ("resources.memory_gib", -0.5),
        ("checkpointing.max_to_keep", 0),
        ("fallback.after_failed_spot_attempts", 0),
        ("fallback.progress_to_reset", 0),
        ("fallback.return_to_spot_after_seconds", 0),
        ("fallback.return_to_spot_after_seconds", -60),
        ("provisioning", "cheap"),
        ("max_attempts", 0),
        ("max_program_failures", -1),
        ("max_run_hours", 0),
        ("max_run_hours", float("nan")),
        ("max_run_hours", float("inf")),
        ("lease_seconds", 0),
        ("lease_seconds", -900),
        ("notice_poll_seconds", 0),
        ("env.EPOCHS", 3),
    ],
)
def test_a_bad_value_is_named_with_its_field(field: str, value: Any) -> None:
    outer, _, inner = field.partition(".")
    message = complaint(**{outer: {inner: value} if inner else value})
    assert message.startswith(f"{field}: ")
    assert f"(got {value!r})" in message


def test_every_complaint_comes_in_one_message() -> None:
    message = complaint(max_attempts=0, lease_seconds=-1, resources={"vcpus": -2})
    assert [part.partition(":")[0] for part in message.split("; ")] == [
        "resources.vcpus",
        "max_attempts",
        "lease_seconds",
    ]


def test_the_defaults_are_the_ones_that_are_promised() -> None:
    job = TrainingJob.model_validate(GOOD)
    assert (job.checkpointing.every, job.checkpointing.max_to_keep) == ("auto", 3)
    assert (job.fallback.after_failed_spot_attempts, job.fallback.progress_to_reset) == (3, None)
    assert (job.provisioning, job.max_program_failures, job.notice_poll_seconds) == ("spot-then-on-demand", 0, 5.0)


# -- job files --------------------------------------------------------------------------------------------------------


def test_a_job_files_code_is_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    job = load_job(written(tmp_path / "jobs", "name: gpt\nscript: train.py\ncode: ../src\n"))
    assert job.code == str(tmp_path / "src")
    assert load_job(written(tmp_path, "name: gpt\nscript: train.py\n")).code == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [unclosed", "is not YAML"),
        ("just words", "expected keys and values"),
        ("", "expected keys and values"),
        ("name: gpt\nscript: a.py\nmax_attempts: many\n", "max_attempts"),
        ("name: gpt\nscirpt: a.py\n", "did you mean 'script'?"),
        ("1: 2\n", "1 is no key"),
        ("name: \xff", "name"),
    ],
)
def test_a_bad_job_file_is_a_config_error_that_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_a_job_file_that_is_missing_or_binary_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00name")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary"):
        with pytest.raises(ConfigError, match=str(path)):
            load_job(path)
