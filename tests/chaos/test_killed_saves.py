"""The training, the process that makes its snapshots durable, or both are killed at random instants of a save.

HOLDFAST_TEST_KILLS: how many times, 45 if unset. `HOLDFAST_TEST_KILLS=300 pytest -s tests/chaos/test_killed_saves.py`
does more of them and shows its figures; on two busy cores that takes twelve minutes.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.support import s3_clients
from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.reader import read_metrics, tensor_digest
from holdfast.errors import DamagedCheckpointError, NotFoundError
from holdfast.runtime.contract import PERSISTING_LOCK
from holdfast.storage import DirectoryStore, ObjectStore, open_store
from tests.programs.saves import EVERY, train

KILLS = int(os.environ.get("HOLDFAST_TEST_KILLS", "45"))
SEED = int(os.environ.get("HOLDFAST_TEST_SEED", "1"))
KEEP, ENDLESS = 3, 10**9
LOOK_SECONDS = 0.0005
AWS_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload(["pytest", "tests.programs.saves"])


class Attempt:
    """One life of the training, with what it and its persist process told."""

    def __init__(
        self, folder: Path, store: ObjectStore, run_id: str, number: int, width: int, steps: int = ENDLESS
    ) -> None:
        self.number, self.folder = number, folder / f"{run_id}-{number}"
        self.folder.mkdir()
        (self.folder / "console").touch()
        surroundings = {
            "STORE": store.url,
            "RUN": run_id,
            "ATTEMPT": str(number),
            "CHECKPOINT": json.dumps({"every_steps": EVERY if steps == ENDLESS else steps, "max_to_keep": KEEP}),
            "TELEMETRY": str(self.folder / "telemetry"),
            "CONSOLE": str(self.folder / "console"),
        }
        self.enough = folder / f"{run_id}-is-enough"
        environment = {f"HOLDFAST_{name}": value for name, value in surroundings.items()}
        environment |= AWS_KEYS
        self.process = fork_server.Process(target=train, args=(steps, environment, self.enough, width))
        self.process.start()

    def events(self, kind: str) -> list[dict[str, Any]]:
        try:
            records = [json.loads(line) for line in (self.folder / "telemetry").read_text().splitlines()]
        except FileNotFoundError:
            return []
        return [record for record in records if record["kind"] == kind]

    def reported(self) -> list[CheckpointId]:
        return [CheckpointId(self.number, event["step"]) for event in self.events("committed")]

    def phases(self) -> list[tuple[str, int]]:
        lines = [line.split() for line in (self.folder / "console").read_text().splitlines()]
        return [(line[2], int(line[3])) for line in lines if line[:2] == ["holdfast:", "phase"]]

    def follow(self) -> Iterator[tuple[str, int]]:
        """Phases from now on, as they are told; ends when the training has."""
        with open(self.folder / "console") as console:
            console.seek(0, os.SEEK_END)
            line = ""
            while self.process.is_alive():
                line += console.readline()
                if not line.endswith("\n"):  # not yet there, or not all of it
                    time.sleep(LOOK_SECONDS)
                    continue
                if line.startswith("holdfast: phase"):
                    _, _, name, step = line.split()
                    yield name, int(step)
                line = ""

    def persist_processes(self) -> list[psutil.Process]:
        try:
            return [
                child
                for child in psutil.Process(self.process.pid).children()
                if "holdfast.checkpoint.persist" in child.cmdline()
            ]
        except psutil.NoSuchProcess:
            return []

    def wait_for_the_last_commit(self) -> None:
        """As the machine's agent does: the persist process finishes what it has begun."""
        with open(self.folder / PERSISTING_LOCK, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


@dataclass
class Watch:
    """Of the store: what was ever reported durable, and what became of it."""

    store: ObjectStore
    reported: set[CheckpointId] = field(default_factory=set)
    verified: int = 0

    def look(self, attempt: Attempt) -> None:
        """Everything there is whole; everything reported is there, or as many newer ones as are kept."""
        checkpoints = Checkpoints(self.store, "killed")
        self.reported.update(attempt.reported())
        there = checkpoints.committed()
        for checkpoint in self.reported:
            newer = [one for one in there if one > checkpoint]
            assert checkpoint in there or len(newer) >= KEEP, f"{checkpoint} is lost; there are {there}"
        for checkpoint in there:
            try:
                checkpoints.verify(checkpoint, checkpoints.manifest(checkpoint))
                self.verified += 1
            except (DamagedCheckpointError, NotFoundError):
                assert not checkpoints.exists(checkpoint)  # pruned meanwhile by the persist process that lives


def kill_at_a_random_instant(attempt: Attempt, whom: str, save_seconds: float, draw: random.Random) -> str | None:
    """Of one of the next saves; in which phase it was. None: the training had ended."""
    passed_over = draw.randint(0, 2)
    for phase, _ in attempt.follow():
        if phase != "snapshot":
            continue
        passed_over -= 1
        if passed_over < 0 and (helpers := attempt.persist_processes()):
            time.sleep(draw.uniform(0, save_seconds))
            victims = {
                "trainer": [attempt.process.pid],
                "persist": [helpers[0].pid],
                "both": draw.sample([attempt.process.pid, helpers[0].pid], 2),
            }
            for pid in victims[whom]:
                os.kill(pid, 9)
            return attempt.phases()[-1][0]
    return None


def test_kills_at_random_instants_of_a_save_damage_nothing_and_lose_nothing_reported(tmp_path: Path) -> None:
    kill_and_look(tmp_path, DirectoryStore(tmp_path / "store"), KILLS, 1000)


def test_nor_do_they_where_snapshots_are_written_while_they_are_copied(tmp_path: Path, aws_keys: None) -> None:
    with s3_clients.server() as endpoint:  # a quick one: what is copied is written at once
        kill_and_look(tmp_path, open_store(f"s3://{s3_clients.BUCKET}/saves?endpoint={endpoint}"), KILLS // 3, 2000)


@pytest.fixture
def aws_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWS_KEYS.items():
        monkeypatch.setenv(name, value)


def kill_and_look(folder: Path, store: ObjectStore, kills: int, width: int) -> None:
    draw = random.Random(SEED)
    watch, killed, in_phase = Watch(store), Counter(), Counter()
    attempt, began = Attempt(folder, store, "killed", 1, width), time.monotonic()
    save_seconds = [0.3]
    for _ in range(kills):
        whom = draw.choice(["trainer", "persist", "both"])
        # A little longer than a save: what comes after it, the removal of old ones, is part of it.
        longest = 1.25 * statistics.median(save_seconds[-20:])
        phase = kill_at_a_random_instant(attempt, whom, longest, draw)
        assert phase, f"the training ended: {attempt.process.exitcode}"
        killed[whom] += 1
        in_phase[phase] += 1
        save_seconds += [event["wall_durable_seconds"] for event in attempt.events("committed")][-20:]
        if whom == "persist":
            watch.look(attempt)
            assert attempt.process.is_alive()
            continue
        attempt.process.join()
        attempt.wait_for_the_last_commit()
        watch.look(attempt)
        newest = Checkpoints(store, "killed").committed()[-1:]
        attempt = Attempt(folder, store, "killed", attempt.number + 1, width)
        while not (resumed := attempt.events("resumed")):
            time.sleep(0.005)
        assert resumed[0]["checkpoint"] == (str(newest[0]) if newest else "")
        assert attempt.events("damaged") == []
    attempt.enough.touch()
    attempt.process.join()
    attempt.wait_for_the_last_commit()
    watch.look(attempt)
    assert attempt.process.exitcode == 0
    seconds, steps = time.monotonic() - began, Checkpoints(store, "killed").committed()[-1].step
    steady = Attempt(folder, store, "steady", 1, width, steps)
    steady.process.join()
    assert steady.process.exitcode == 0
    print(
        f"\n{kills} kills and {steps} steps in {seconds:.0f} s (seed {SEED}): {dict(killed)}, during {dict(in_phase)}; "
        f"{attempt.number} attempts, {len(watch.reported)} checkpoints reported durable, {watch.verified} verifications, "
        f"a save {statistics.median(save_seconds):.3f} s"
    )
    assert tensor_digest(store, "killed") == tensor_digest(store, "steady")
    assert read_metrics(store, "killed") == read_metrics(store, "steady")
