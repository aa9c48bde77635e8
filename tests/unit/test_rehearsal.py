"""What a rehearsal says of the two clouds' windows, from what its run measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.ledger.run_state import read_run_state
from holdfast.model import TrainingJob
from holdfast.supervision.rehearsal import Evidence, Finding, judge
from tests.unit.attempts import Told, at, marks

JOB = TrainingJob(name="gpt", script="train.py", code=str(Path(__file__).parent), notice_poll_seconds=5)


def windows(*reports: dict[str, Any], steps: int = 100) -> dict[str, Finding]:
    """The findings on the windows, of a run whose attempts, 100 s long, ended with these reports."""
    told = Told()
    for number, report in enumerate(reports):
        told.attempt("preempted", number * steps, (number + 1) * steps, (number + 1) * steps, report=report)
    evidence = Evidence(state=read_run_state("run", told.entries), metrics={}, digest="same")
    verdict = judge(JOB, len(reports), evidence, evidence, "")
    questions = {finding.question: finding for finding in verdict.findings if "flush" in finding.question}
    return {cloud: finding for cloud in ("AWS", "GCP") for text, finding in questions.items() if cloud in text}


def saved(size_bytes: int, seconds: float, stall_seconds: float = 0.5, began: float = 1000.0) -> dict[str, Any]:
    """The report of a program that is attached and has saved: its slowest save took so long."""
    longest = {"stall_seconds": stall_seconds, "commit_seconds": seconds, "wall_commit_seconds": seconds}
    return {
        **marks(attached=began, resumed=began, preempting=began + 100),
        "commits": 3,
        "bytes_per_commit": size_bytes,
        "longest": longest,
    }


def test_a_state_too_large_for_a_window_is_warned_of_with_the_speed_that_was_measured() -> None:
    found = windows(saved(12_000_000_000, 12e9 / 180e6))
    assert not found["GCP"].good
    assert found["GCP"].answer.startswith(
        "12 GB at 180 MB/s does not fit 30 s; every 90 s is recommended; 68.17 s for "
    )
    assert "180 MB/s was measured with this computer's disk, and a store needs 536 MB/s for the 12 GB" in (
        found["GCP"].answer
    )
    assert not found["GCP"].decisive
    assert found["AWS"].good
    assert "a store needs 127 MB/s for the 12 GB" in found["AWS"].answer
    assert not windows(saved(12_000_000_000, 100.0))["AWS"].good


def test_a_state_that_fits_says_how_slow_a_store_may_be() -> None:
    found = windows(saved(5_200_000, 0.02, stall_seconds=0.01))
    assert found["AWS"].good and found["GCP"].good
    assert found["GCP"].answer == (
        "1.03 s for the step under way, the copy, and until it was durable, after up to 5 s until it is heard; 260 MB/s was "
        "measured with this computer's disk, and a store needs 232 kB/s for the 5.2 MB"
    )


def test_the_slowest_save_of_all_attempts_counts() -> None:
    found = windows(saved(10**9, 1), saved(10**9, 40, began=2000), saved(10**9, 2, began=3000))
    assert not found["GCP"].good
    assert found["GCP"].answer.startswith("1 GB at 25 MB/s does not fit 30 s; every 60 s is recommended")


def test_a_long_step_is_part_of_the_flush() -> None:
    found = windows(saved(10**9, 1), steps=4)  # 25 s each
    assert not found["GCP"].good and found["AWS"].good
    assert found["GCP"].answer.startswith("26.50 s for the step under way")


def test_a_program_that_writes_folders_is_measured_from_the_notice_to_its_end() -> None:
    report = {
        **marks(resumed=1000),
        "notice": {"kind": "preemption", "reclaim_at": at(1120).isoformat(), "seen_at": at(1096).isoformat()},
    }
    found = windows(report)
    assert found["AWS"].good and found["GCP"].good
    assert found["AWS"].answer == "4.00 s from hearing the notice to the end, after up to 5 s until it is heard"
