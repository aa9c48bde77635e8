"""What a gang may ask for, what its journal says, and the command lines that torchrun gets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from holdfast.errors import ConfigError
from holdfast.ledger.gang_state import GangState, read_gang_state
from holdfast.ledger.gang_summary import gang_headline, gang_to_markdown, summarise_gang
from holdfast.ledger.journal import Entry
from holdfast.model import GangJob, TrainingJob, load_gang_job, load_job, validation_message
from holdfast.runtime import torchrun

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
REPOSITORY = Path(__file__).parents[2]


def complaint(of: type[GangJob] | type[TrainingJob], **fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        of.model_validate({"name": "together", **fields})
    return validation_message(caught.value)


def test_a_gang_can_be_formed() -> None:
    assert "min_machines is 3, more than the 2 machines" in complaint(
        GangJob, script="ddp.py", machines=2, min_machines=3
    )
    assert "torchrun, which needs a script or a module" in complaint(GangJob, command=["sh"], machines=2)
    assert "'kind' is no key of GangJob" in complaint(GangJob, script="ddp.py", machines=2, kind="instant")


def test_torchrun_starts_no_commands_on_one_machine_either() -> None:
    assert "torchrun starts a script or a module" in complaint(TrainingJob, command=["sh"], processes_per_machine=4)
    assert TrainingJob(name="one", command=["sh"]).processes_per_machine == 1


def test_a_file_with_a_least_number_of_machines_is_a_gang(tmp_path: Path) -> None:
    gang = tmp_path / "gang.yaml"
    gang.write_text("name: together\nscript: ddp.py\nmachines: 3\nmin_machines: 2\n")
    assert load_gang_job(gang).min_machines == 2
    with pytest.raises(
        ConfigError,
        match="it has one of min_machines, checkpointing, processes_per_machine, so it is a GangJob, for python -m flows gang",
    ):
        load_job(gang)
    gang.write_text("name: together\nscript: ddp.py\nmachines: 3\n")
    assert load_gang_job(gang).min_machines == 1


def test_the_example_is_a_gang_and_every_field_is_explained() -> None:
    job = load_gang_job(REPOSITORY / "examples/gang/ddp.yaml")
    assert (job.machines, job.min_machines) == (3, 2)
    page = (REPOSITORY / "docs/gangs.md").read_text()
    assert [name for name in GangJob.model_fields if f"`{name}`" not in page] == []


def test_ranks_are_as_many_as_asked_for_or_one_per_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert torchrun.processes_here(0) == 1
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L4 (UUID: a)'\necho 'GPU 1: NVIDIA L4 (UUID: b)'\n")
    tool.chmod(0o755)
    assert torchrun.processes_here(0) == 2
    assert torchrun.processes_here(4) == 4


def entries(*told: tuple[float, str, dict[str, Any]]) -> list[Entry]:
    return [
        Entry(number=number, kind=kind, at=NOON + timedelta(seconds=seconds), fields=fields)
        for number, (seconds, kind, fields) in enumerate(told, 1)
    ]


def pool(zone: str = "us-east-1a") -> dict[str, str]:
    return {
        "cloud": "aws",
        "region": "us-east-1",
        "zone": zone,
        "instance_type": "g5.xlarge",
        "provisioning_model": "spot",
    }


def formed(number: int, members: list[str], left: dict[str, Any]) -> dict[str, Any]:
    return {
        "formation": number,
        "members": members,
        "host": members[0],
        "address": "10.0.0.1",
        "port": 40000,
        "left": left,
    }


def ended(machine: str, outcome: str, seconds: float) -> dict[str, Any]:
    at = (NOON + timedelta(seconds=seconds)).isoformat()
    return {"machine": machine, "outcome": outcome, "terminated_at": at, "billed_seconds": seconds, "usd": 0.1}


def two_then_one() -> GangState:
    """a and b train 100 steps in 1000 s; b is taken, 20 steps are lost; a trains the rest in another 1000 s."""
    priced = {"pool": pool(), "usd_per_hour": 0.36, "on_demand_usd_per_hour": 3.6}
    launched = [{"machine": name, "pool": 0, "launched_at": NOON.isoformat()} for name in "ab"]
    job = {"name": "together", "machines": 2, "min_machines": 1, "spot_share": 1.0}
    asked = {"round": 1, "token": "t", "pools": [priced], "spot": 2, "on_demand": 0, "reason": ""}
    started = {"job": job, "fingerprint": "f", "clock_speed": 1.0, "store": "s3://runs"}
    first = {"resumed_step": 0, "step": 100, "committed_step": 80, "total_steps": 200}
    second = {"resumed_step": 80, "step": 200, "committed_step": 200, "total_steps": 200}
    return read_gang_state(
        "together-1",
        entries(
            (0, "run-started", started),
            (0, "round-asked", asked),
            (0, "members-launched", {"round": 1, "members": launched}),
            (100, "gang-formed", formed(1, ["a", "b"], {})),
            (1100, "members-ended", {"members": [ended("b", "preempted", 1100)]}),
            (1100, "gang-over", {"gracious": False, "why": "b gone", "report": {"step": 90, "resumed_step": 0}}),
            (1110, "gang-formed", formed(2, ["a"], first)),
            (2110, "members-ended", {"members": [ended("a", "finished", 2110)]}),
            (2110, "gang-over", {"gracious": True, "why": "", "report": second}),
            (2111, "closed", {"state": "finished", "detail": ""}),
        ),
    )


def test_the_journal_tells_who_trained_together_and_what_was_trained_again() -> None:
    state = two_then_one()
    assert state.trained and state.newest and state.newest.number == 2
    summary = summarise_gang(state)
    first, second = summary["formations"]
    assert (first["last_step"], first["committed_step"], first["lost_steps"]) == (100, 80, 20)
    assert (second["first_step"], second["last_step"], second["lost_steps"]) == (81, 200, 0)
    assert summary["lost_steps"] == 20 and summary["steps_total"] == 200
    # 1000 s of two machines, of which a fifth was trained again, and 1000 s of one, at $3.60 an hour.
    assert summary["usd_on_demand_equivalent"] == pytest.approx(0.8 * 2 + 1.0)
    assert summary["usd_total"] == pytest.approx(0.2)


def test_the_summary_shows_formations_and_members() -> None:
    summary = summarise_gang(two_then_one())
    assert gang_headline(summary) == (
        "Finished: 200 steps on 2 machines, $0.2000, 92% less than $2.6000 on demand; 1 interruption, 2 formations, "
        "20 steps trained again."
    )
    text = gang_to_markdown(summary)
    assert "| 1 | 2 | 1000.0 | 1–100 | 80 | b gone |" in text
    assert "| 2 | 1 | 1000.0 | 81–200 | 200 | finished |" in text
    assert text.index("| formation |") < text.index("| machine |")


def test_a_failure_of_an_earlier_opening_is_forgiven() -> None:
    failed = {"formation": 1, "machine": "a", "detail": "it fails"}
    told = entries((0, "gang-failed", failed), (1, "reopened", {"after": "failed"}))
    state = read_gang_state("together-1", told)
    assert len(state.failures) == 1 and state.failures_of_opening == []
