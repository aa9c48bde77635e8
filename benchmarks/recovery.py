"""How long a run stands still when its machine is taken away: `python -m benchmarks.recovery`.

It trains examples/gpt.py through the flow's own story (`flows.train.carry_out`, a real Prefect server, the local cloud
at clock speed 1, a checkpoint every 10 steps) and takes the machine away at fixed steps, without notice.

**A recovery** lasts from the kill to the first new step: the first step that the next attempt trained, after its resume.
The kill is taken to be the last line that the killed machine wrote to its console, which is at most one step before
the SIGKILL: seconds are rather counted too many than too few. Its phases:

| phase      | from                | to                                                                              |
| ---------- | ------------------- | ------------------------------------------------------------------------------- |
| detect     | the kill            | the attempt's end is in the journal                                              |
| provision  | that                | the cloud has accepted the next machine                                          |
| boot       | that                | the agent has started the user's program                                         |
| load       | that                | the checkpoint is restored: the program's own start, then Holdfast's reading     |
| first step | that                | the first step is complete                                                       |

**Holdfast's own share** is all of it but two things. *The boot of the machine*: from the accepted launch to the first
line of the start-up script; on the local cloud the start of the host process, in a cloud the virtual machine and its
operating system. Fetching the bundle and starting the agent come after it, and are ours. *The import of torch*: what
`import torch` and the parts of torch that the first optimizer imports took on that very machine. The rest of the
program's start (interpreter, building the model) and the first step itself are in our share, though no doing of ours.

A bare process, without Holdfast, does the same up to the line that calls attach(), before, between and after the runs:
were the program's start slower under Holdfast than bare, beyond the noise, it would show in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.ledger.run_state import Attempt

EXAMPLES = Path(__file__).parents[1] / "examples"
RESULT = Path(__file__).parent / "results" / "recovery.json"
TARGET_SECONDS = 2.0
KILLS_PER_RUN = 4
STEPS_BETWEEN_KILLS = 30
CHECKPOINT_STEPS = 10
TRIGGER_OFFSET = 7
"""Kills come so many steps after a checkpoint: they lose work, as kills do."""

# Runs the example, and notes how long torch's import took; without an agent it ends where the example calls attach().
PROGRAM = """
import json, os, runpy, sys, time, types
began = time.time()
import torch, torch._dynamo  # the second is what the first optimizer would import
seconds = time.time() - began
attempt = os.environ.get("HOLDFAST_ATTEMPT", "bare")
with open(f"{os.environ['IMPORT_TIMES']}-{attempt}", "w") as note:
    note.write(repr(seconds))
def attach(**_):
    print(time.time())
    raise SystemExit
if attempt == "bare":
    sys.modules["holdfast"] = types.SimpleNamespace(attach=attach)
runpy.run_path("gpt.py", run_name="__main__")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Wall seconds of one recovery; the phases are in the order in which they happen."""

    killed_after_step: int
    resumed_from_step: int
    detect: float
    provision: float
    boot_of_machine: float
    boot_of_agent: float
    start_of_program: float
    torch_import: float
    """Part of the program's start."""
    restore: float
    first_step: float

    @property
    def total(self) -> float:
        return self.detect + self.provision + self.boot + self.load + self.first_step

    @property
    def boot(self) -> float:
        return self.boot_of_machine + self.boot_of_agent

    @property
    def load(self) -> float:
        return self.start_of_program + self.restore

    @property
    def without_program_start(self) -> float:
        return self.total - self.boot_of_machine - self.start_of_program

    @property
    def own(self) -> float:
        return self.total - self.boot_of_machine - self.torch_import


@dataclass(frozen=True, slots=True, kw_only=True)
class BareStart:
    """Wall seconds of the same program without Holdfast, up to the line that calls attach()."""

    start_of_program: float
    torch_import: float


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=8, help="how many machines are taken away (default 8)")
    kills = options.parse_args().kills
    if kills < 1:
        options.error(f"--kills is {kills}; it must be at least 1")
    began = time.monotonic()
    recoveries, bare = measure(kills)
    result = report(recoveries, bare, time.monotonic() - began)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def measure(kills: int) -> tuple[list[Recovery], list[BareStart]]:
    """Bare starts and interrupted runs in turn, so that both meet the same moods of the machine."""
    recoveries: list[Recovery] = []
    bare: list[BareStart] = []
    with workplace() as folder:
        code = folder / "code"
        code.mkdir()
        shutil.copy(EXAMPLES / "gpt.py", code)
        (code / "timed.py").write_text(PROGRAM)
        while len(recoveries) < kills:
            bare.append(start_bare(folder))
            of_this_run = min(KILLS_PER_RUN, kills - len(recoveries))
            print(f"run {len(bare)}: training, to lose {of_this_run} machines", flush=True)
            for recovery in interrupted_run(folder, len(bare), of_this_run):
                recoveries.append(recovery)
                print(
                    f"kill {len(recoveries)} of {kills}: after step {recovery.killed_after_step}, going on from step "
                    f"{recovery.resumed_from_step}; {recovery.total:.2f} s to the first new step, of which "
                    f"{recovery.own:.2f} s are Holdfast's",
                    flush=True,
                )
        bare.append(start_bare(folder))
    return recoveries, bare


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder with a Prefect server of its own; afterwards no process and no file of it is left."""
    from flows.server import prefect_server

    os.environ.pop("PREFECT_API_URL", None)
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="holdfast-recovery-", ignore_cleanup_errors=True) as name:
        os.chdir(name)
        try:
            print("starting a Prefect server", flush=True)
            with prefect_server():
                yield Path(name)
        finally:
            os.chdir(before)


def interrupted_run(folder: Path, number: int, kills: int) -> list[Recovery]:
    """One run on a cloud of its own, whose first `kills` machines are taken away without notice."""
    from prefect import flow

    from flows.train import carry_out
    from holdfast.drivers.local import LocalCloudConfig, LocalDriver
    from holdfast.drivers.local.config import Fate, ScriptedMarket
    from holdfast.model import Checkpointing, Fallback, TrainingJob
    from holdfast.storage import DirectoryStore
    from holdfast.supervision.opening import open_run

    steps = [STEPS_BETWEEN_KILLS * kill + TRIGGER_OFFSET for kill in range(1, kills + 1)]
    job = TrainingJob(
        name="recovery",
        script="timed.py",
        args=["--steps", str(steps[-1] + CHECKPOINT_STEPS)],
        code=str(folder / "code"),
        env={"IMPORT_TIMES": str(folder / f"import-{number}")},
        checkpointing=Checkpointing(every=f"{CHECKPOINT_STEPS} steps"),
        fallback=Fallback(after_failed_spot_attempts=1000),
        max_run_hours=1,
    )
    market = ScriptedMarket(spot=[Fate(at_step=step, notice=False) for step in steps])
    driver = LocalDriver(LocalCloudConfig(root=folder / f"cloud-{number}", market=market))
    run = open_run(job, driver, DirectoryStore(folder / f"store-{number}"), None, f"recovery-{number}")

    @flow(name="recovery", flow_run_name=f"recovery-{number}")
    def story() -> None:
        carry_out(run)

    story()
    attempts = run.state.attempts
    if [attempt.outcome for attempt in attempts] != ["preempted"] * kills + ["finished"]:
        outcomes = ", ".join(str(attempt.outcome) for attempt in attempts)
        raise SystemExit(f"run {number} was to lose {kills} machines and to finish; its attempts ended: {outcomes}")
    return [
        recovery(before, after, folder / f"cloud-{number}", folder / f"import-{number}-{after.number}")
        for before, after in pairwise(attempts)
    ]


def recovery(before: Attempt, after: Attempt, cloud: Path, import_time: Path) -> Recovery:
    """From the end of one attempt to the first step of the next."""
    if not before.detected_at or not after.launched_at:
        raise SystemExit(f"attempts {before.number} and {after.number} have no end or no launch in the journal")
    instants = [
        changed_at(cloud / "machines" / before.machine / "console.log"),
        before.detected_at,
        after.launched_at,
        changed_at(cloud / "machines" / after.machine / "startup.sh"),
        *(mark(after, name) for name in ("program-started", "attached", "resumed", "first-step")),
    ]
    names = ("detect", "provision", "boot_of_machine", "boot_of_agent", "start_of_program", "restore", "first_step")
    seconds = {
        name: (end - start).total_seconds() for name, (start, end) in zip(names, pairwise(instants), strict=True)
    }
    if backwards := [name for name, length in seconds.items() if length < 0]:
        raise SystemExit(f"attempt {after.number}: {', '.join(backwards)} ended before beginning: {instants}")
    return Recovery(
        killed_after_step=before.last_step or 0,
        resumed_from_step=after.resumed_step or 0,
        torch_import=float(import_time.read_text()),
        **seconds,
    )


def mark(attempt: Attempt, name: str) -> datetime:
    if name not in attempt.marks:
        raise SystemExit(
            f"attempt {attempt.number} on {attempt.machine} left no mark {name!r}, only {', '.join(attempt.marks)}: its "
            "recovery can't be split; did its program reach the first step?"
        )
    return attempt.marks[name]


def changed_at(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime_ns / 1e9, UTC)


def start_bare(folder: Path) -> BareStart:
    """The same program between the runs, without Holdfast, up to the line that calls attach()."""
    note = folder / "import-bare"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HOME": str(folder), "IMPORT_TIMES": str(folder / "import")}
    began = time.time()
    output = subprocess.run(
        [sys.executable, "timed.py"],
        cwd=folder / "code",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if output.returncode:
        raise SystemExit(f"the bare program failed:\n{output.stderr}")
    return BareStart(start_of_program=float(output.stdout) - began, torch_import=float(note.read_text()))


def report(recoveries: Sequence[Recovery], bare: Sequence[BareStart], seconds: float) -> dict[str, Any]:
    own = [recovery.own for recovery in recoveries]
    rows = {
        "detect": [one.detect for one in recoveries],
        "provision": [one.provision for one in recoveries],
        "boot": [one.boot for one in recoveries],
        "boot: the machine (not ours)": [one.boot_of_machine for one in recoveries],
        "boot: bundle and agent": [one.boot_of_agent for one in recoveries],
        "load": [one.load for one in recoveries],
        "load: the program's start": [one.start_of_program for one in recoveries],
        "load: of it, the import of torch (not ours)": [one.torch_import for one in recoveries],
        "load: the checkpoint": [one.restore for one in recoveries],
        "first step": [one.first_step for one in recoveries],
        "total": [one.total for one in recoveries],
        "start of the program, bare": [one.start_of_program for one in bare],
        "import of torch, bare": [one.torch_import for one in bare],
        "own share": own,
        "own share: without the program's start": [one.without_program_start for one in recoveries],
    }
    return {
        "own_seconds_median": round(median(own), 4),
        "own_seconds": [round(value, 4) for value in own],
        "target_seconds": TARGET_SECONDS,
        "kills": len(recoveries),
        "total_seconds_median": round(median(one.total for one in recoveries), 4),
        "phases": {
            name: {"median": round(median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}
            for name, values in rows.items()
        },
        "recoveries": [_rounded(asdict(one)) for one in recoveries],
        "bare_starts": [_rounded(asdict(one)) for one in bare],
        "job": f"examples/gpt.py, checkpoint every {CHECKPOINT_STEPS} steps, clock speed 1, kills without notice",
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("holdfast", "torch", "prefect")},
        },
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"\nFrom the kill to the first new step: {result['kills']} kills, {result['cores']} cores, seconds")
    table = Table()
    table.add_column("phase")
    for column in ("median", "min", "max"):
        table.add_column(column, justify="right")
    for name, values in result["phases"].items():
        indented = f"  {name.partition(': ')[2]}" if ": " in name else name
        style = "bold" if name in ("total", "own share") else "dim" if ": " in name else ""
        numbers = [f"{values[column]:.3f}" for column in ("median", "min", "max")]
        table.add_row(indented, *numbers, style=style, end_section=name in ("first step", "total"))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    own, target = result["own_seconds_median"], result["target_seconds"]
    verdict = "within" if own <= target else "ABOVE"
    print(f"Holdfast's own share: {own:.2f} s in the median, {verdict} the {target:g} s aimed at. Written to {RESULT}")


if __name__ == "__main__":
    main()
