"""The parts of the checkpoint benchmark; each runs in a process of its own and returns plain data."""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import holdfast
from benchmarks.support import s3_clients
from benchmarks.support.limits import Image, Limit, drop_pages, read_once
from benchmarks.support.processes import memory_held
from benchmarks.support.savers import Dcp, Holdfast, load_dcp
from benchmarks.support.windows import Saver, Series, Window, quiet, saving
from benchmarks.support.workload import Shape, Workload, keep_freed_memory, timed

LEAST_ROUNDS, HURRIED_ROUNDS_SECONDS, HURRIED_PEERS_SECONDS = 3, 28.0, 15.0
QUIET_SECONDS, QUIET_STEPS = 0.5, 4
RUN_SECONDS_BETWEEN_SAVES = 0.5
IDLE_STEP_SECONDS, IDLE_STEPS = 0.01, 10_000
"""A loop that only waits asks for the next step often: a copy that is done is handed on then."""
RAW = "raw"
SHORT, LONG = "2 ms", "300 ms"
STEP_SECONDS = {SHORT: 0.002, LONG: 0.3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    parameters: int
    device: str
    rounds: int
    folder: Path
    began: float
    """time.monotonic()"""
    peers: tuple[str, ...]
    """Kinds of DCP's async_save."""
    peers_lengths: tuple[str, ...] = (SHORT, LONG)
    in_a_hurry: bool = False
    """No limits; DCP is left out of rounds that begin late, and rounds beyond the third of a slow disk's."""


@dataclass(slots=True)
class Measured:
    """Named lists of seconds (or percents), one value a round."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> float:
        self.values.setdefault(name, []).append(value)
        return value


def say(text: str) -> None:
    print(f"  {text}", flush=True)


def train(setting: Setting) -> dict[str, Any]:
    """Savers and limits in turn around one training loop, `rounds` times, with steps of each length."""
    keep_freed_memory()
    workload = Workload(setting.parameters, setting.device)
    shapes = {length: workload.tune(seconds) for length, seconds in STEP_SECONDS.items()}
    state_bytes = workload.state_bytes
    say(
        f"{state_bytes / 1e9:.2f} GB of state; steps of {', '.join(f'{one.seconds * 1e3:.1f}' for one in shapes.values())} ms"
    )
    _, private_before = memory_held()
    every_steps = math.ceil(RUN_SECONDS_BETWEEN_SAVES / shapes[SHORT].seconds)
    ours = Holdfast(workload, (setting.folder / "store").as_uri(), setting.folder / "train", every_steps)
    ours.begin()
    workload.use(shapes[SHORT])
    for _ in range(2):  # both of its slots are written to before anything is timed
        saving(workload.step, ours)
        ours.catch_up()
    shared, private = memory_held()
    say(f"Holdfast holds {shared / state_bytes:.2f} copies of the state in shared memory")
    image = Image(workload)
    savers: dict[str, Saver] = {"holdfast": ours}
    if setting.device == "cpu" and not setting.in_a_hurry:
        savers["limit"] = limit = Limit(workload, setting.folder)
        saving(workload.step, limit)
    for kind in setting.peers:
        savers[kind] = peer = Dcp(workload, setting.folder, kind)
        saving(workload.step, peer)
    found = Measured()
    series = {length: {name: Series() for name in savers} for length in shapes}
    bookkeeping: list[float] = []
    for number in range(1, setting.rounds + 1):
        seconds = time.monotonic() - setting.began
        if setting.in_a_hurry and number > LEAST_ROUNDS and seconds > HURRIED_ROUNDS_SECONDS:
            break
        with_peers = number == 1 or not setting.in_a_hurry or seconds < HURRIED_PEERS_SECONDS
        raw = found.add("raw_write", image.write(setting.folder / RAW))
        for length, shape in shapes.items():
            workload.use(shape)
            memcpy = found.add("memcpy", timed(image.copy))
            found.add("memcpy", timed(image.copy))
            after: Window | None = None
            for name, saver in turns_of(number, list(savers.items())):
                if name in setting.peers and not (with_peers and length in setting.peers_lengths):
                    continue
                before = after if after and setting.in_a_hurry else _quiet(workload, shape, saver)
                window = saving(workload.step, saver)
                bookkeeping += window.between if saver is ours else []
                saver.catch_up()
                os.sync()
                after = _quiet(workload, shape, saver)
                one = series[length][name]
                one.add(window, before, after)
                say(
                    f"round {number} of {setting.rounds}, steps of {length}, {name}: {one.extra_seconds[-1]:.3f} s extra "
                    f"({memcpy:.3f} s one memcpy), durable after {one.durable_seconds[-1]:.2f} s ({raw:.2f} s raw), steps "
                    f"meanwhile {one.slow_downs[-1]:+.1f} %"
                )
    lengths = {}
    for length in shapes:
        values = lengths[length] = {"step": series[length]["holdfast"].quiet_steps}
        for name, one in series[length].items():
            if one.windows:
                values[f"{name}_extra"] = one.extra_seconds
                values[f"{name}_durable"] = one.durable_seconds
                values[f"{name}_slow_down_percent"] = one.slow_downs
    dcp_path = str(savers[setting.peers[0]].path) if setting.peers else ""  # type: ignore[attr-defined]
    for saver in savers.values():
        saver.close()
    return {
        "limits": found.values,
        "lengths": lengths,
        "step_seconds": {length: shape.seconds for length, shape in shapes.items()},
        "every_steps": every_steps,
        "state_bytes": state_bytes,
        "checkpoint_bytes": ours.committed[-1]["bytes"],
        "bookkeeping_seconds": median(bookkeeping) if bookkeeping else 0.0,
        "shared_copies": shared / state_bytes,
        "private_copies": (private - private_before) / state_bytes,
        "failed_commits": ours.failed,
        "dcp_path": dcp_path,
    }


def turns_of(number: int, turns: list[Any]) -> list[Any]:
    """The order in a round (from 1): each comes first at times, and at times after the one or the other neighbour. The disk is
    still busy for a while with what the one before has written and deleted.
    """
    first = (number - 1) % len(turns)
    turns = turns[first:] + turns[:first]
    return turns if number % 2 else [turns[0], *turns[:0:-1]]


def _quiet(workload: Workload, shape: Shape, saver: Saver) -> Window:
    return quiet(workload.step, max(QUIET_SECONDS, (QUIET_STEPS - 0.5) * shape.seconds), saver.durable_at)


def low_memory(setting: Setting) -> dict[str, Any]:
    """How many copies of the state it holds where it may hold but one."""
    if "low_memory" not in inspect.signature(holdfast.attach).parameters:
        return {"missing": "attach() has no low_memory"}
    workload = Workload(setting.parameters, setting.device)
    ours = Holdfast(
        workload, (setting.folder / "low").as_uri(), setting.folder / "low", IDLE_STEPS, {"low_memory": True}
    )
    ours.begin()
    for _ in range(2):
        saving(_sleep, ours)
        ours.catch_up()
    shared, _ = memory_held()
    ours.close()
    return {"shared_copies": shared / workload.state_bytes}


def load(setting: Setting, store_url: str, dcp_path: str, endpoint: str) -> dict[str, float]:
    """Once each, into fresh objects, nothing of it in the page cache. `endpoint`: of S3, where the store is there."""
    seconds: dict[str, float] = {}
    workload = Workload(setting.parameters, setting.device, trained=False)
    if not endpoint:
        newest = max((setting.folder / "store").rglob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        drop_pages(setting.folder / "store")
        read_once(newest)  # what a disk keeps in a cache of its own, it has for both
    ours = Holdfast(workload, store_url, setting.folder / "load", 10**6)
    if not ours.run.resumed_step:
        raise SystemExit(f"Holdfast resumed nothing from {store_url}")
    seconds["holdfast_load"] = ours.attach_seconds
    image = Image(workload)
    if endpoint:
        download = s3_clients.Download(endpoint)
        seconds["raw_read"] = timed(lambda: download(RAW, image.view))
    else:
        seconds["raw_read"] = image.read(newest)  # the very file that ours has read
    fresh = Workload(setting.parameters, setting.device, trained=False)
    fresh.allocate_moments()
    seconds["first_memcpy"] = timed(lambda: image.copy_to(fresh))
    seconds["memcpy"] = timed(lambda: image.copy_to(fresh))
    if dcp_path:
        fresh = Workload(setting.parameters, setting.device, trained=False)
        drop_pages(Path(dcp_path))
        seconds["dcp_load"] = timed(lambda: load_dcp(fresh, Path(dcp_path)))
    return seconds


def upload(setting: Setting, endpoint: str, store_url: str, only: str = "") -> dict[str, Any]:
    """The state to S3, by each client (or one) and by Holdfast in turn, while the loop only waits: two cores are few for
    three.
    """
    workload = Workload(setting.parameters, setting.device)
    image = Image(workload)
    clients, missing = s3_clients.uploads(endpoint)
    clients = {only: clients[only]} if only else clients
    found = Measured()
    ours = Holdfast(workload, store_url, setting.folder / "upload", IDLE_STEPS)
    ours.begin()
    for _ in range(2):  # with an optimizer's step in each, by which an overlapped copy is proven
        saving(workload.step, ours)
        ours.catch_up()
    turns: dict[str, Callable[[], float]] = {
        name: lambda upload=upload: timed(lambda: upload(image.view, RAW)) for name, upload in clients.items()
    }
    turns["holdfast"] = lambda: saving(_sleep, ours).durable_seconds
    for number in range(setting.rounds + 1):
        found.add("memcpy", timed(image.copy))
        for name, turn in turns.items():
            seconds = turn()
            if name == "holdfast":
                ours.catch_up()
            if number:  # the first round fills the server's memory
                found.add("holdfast_durable" if name == "holdfast" else name, seconds)
                say(f"round {number} of {setting.rounds}, upload by {name}: {seconds:.2f} s")
    ours.close()
    return {"values": found.values, "missing": missing, "failed_commits": ours.failed}


def _sleep() -> None:
    time.sleep(IDLE_STEP_SECONDS)
