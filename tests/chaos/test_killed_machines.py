"""Machines are killed at random instants, again and again; the result is the uninterrupted run's, to the bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from holdfast.checkpoint.reader import read_metrics, tensor_digest
from holdfast.drivers.local.config import Fate
from holdfast.storage import DirectoryStore
from tests.chaos.runs import assert_lost_steps_were_trained_again, assert_nothing_left, carry, cloud, tiny_job

STEPS = 150


def random_fates(seed: int) -> list[Fate]:
    """Ten ways to die, in a drawn order, at drawn instants: in a step, a snapshot, a commit, a resume; warned or not."""
    draw = random.Random(seed)
    kinds = ["notice"] * 2 + ["step"] * 3 + ["snapshot", "commit", "commit", "resume", "boot"]
    draw.shuffle(kinds)
    fates = []
    for number, kind in enumerate(kinds, 1):
        step = max(1, STEPS * number // (len(kinds) + 2) + draw.randint(-4, 4))
        delay = draw.uniform(0, 0.012)
        if kind in ("notice", "step"):
            fates.append(Fate(at_step=step, delay_seconds=delay, notice=kind == "notice"))
        elif kind == "boot":
            fates.append(Fate(after_seconds=draw.uniform(0, 2), notice=False))
        elif kind == "resume":
            fates.append(Fate(in_phase="resume", delay_seconds=delay / 3, notice=False))
        else:
            fates.append(Fate(in_phase=kind, after_step=step, delay_seconds=delay / 4, notice=False))  # type: ignore[arg-type]
    return fates


@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_at_random_instants_change_no_bit_of_weights_or_losses(
    seed: int, folder: Path, prefect_api: str
) -> None:
    store = DirectoryStore(folder / ".holdfast")
    steady_job, killed_job = tiny_job(folder, "steady", STEPS), tiny_job(folder, "killed", STEPS)
    carry(steady_job, cloud(folder, [], "steady-cloud"), store, "steady")

    fates = random_fates(seed)
    driver = cloud(folder, fates, "killed-cloud")
    run, summary = carry(killed_job, driver, store, "killed")

    context = f"seed {seed}: {fates}"
    assert summary["state"] == "finished", context
    assert summary["interruptions"] >= 8, context
    assert tensor_digest(store, "killed") == tensor_digest(store, "steady"), context
    steady_losses, killed_losses = read_metrics(store, "steady"), read_metrics(store, "killed")
    assert list(steady_losses) == list(range(1, STEPS + 1))
    assert killed_losses == steady_losses, context
    assert_lost_steps_were_trained_again(summary, folder, "killed")
    for attempt in run.state.attempts:
        noticed = (attempt.report.get("notice") or {}).get("kind") == "preemption"
        # Without notice at most one interval, and the one commit that was under way, by a process of low priority.
        assert attempt.lost_steps <= (0 if noticed else 40), (attempt.number, context)
    assert_nothing_left(driver)
