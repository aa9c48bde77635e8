"""Do the simulator and the local cloud agree? `python -m benchmarks.agreement`: real runs of the flow, and the same ones simulated.

Every run meets a market of its own: spot capacity for some minutes of the cloud's clock, then none for some. It runs under one
of the policies, with a deadline; its machines are real processes, its steps last so many seconds of the cloud's clock. Then
the same run is simulated: the same market, the same policy, the same work. Nothing of a real run's course is told to the
simulation but its start on the market's clock. Of all runs together it is told the times that pass between steps
(`holdfast.ledger.times`): boots, stops, decisions, refusals. Every run is simulated many times, each time with others of these,
and held against the mean: whether a machine is asked for a second before or after the market takes it changes the whole course.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.local.config import Outage, TimedMarket
from holdfast.drivers.protocol import Offer
from holdfast.ledger.billing import TERMS
from holdfast.ledger.journal import Entry, Journal
from holdfast.ledger.profiles import JobProfile, Measurement, write_profile
from holdfast.ledger.run_state import read_run_state
from holdfast.ledger.times import Times, times_of
from holdfast.market.traces import Trace
from holdfast.model import Checkpointing, Fallback, Resources, TrainingJob
from holdfast.placement.policies import Terms, policy_named
from holdfast.placement.situation import reserve_seconds_for, tick_seconds_for
from holdfast.runtime.contract import journal_prefix
from holdfast.simulation.engine import SimulatedPool, Workload, simulate
from holdfast.simulation.outcomes import Outcome
from holdfast.storage import DirectoryStore

RESULT = Path(__file__).parent / "results" / "agreement.json"
PROGRAMS = Path(__file__).parents[1] / "tests" / "programs"
POLICIES = ("uniform-progress", "greedy", "spot-then-on-demand")
STEPS, STEP_SECONDS, COMMIT_STEPS = 144, 5.0, 6
DEADLINE_HOURS = 0.55
NOTICE_SECONDS = 120.0
UP_SECONDS, DOWN_SECONDS, TRACE_SECONDS, GAP_SECONDS = (250.0, 700.0), (100.0, 350.0), 6000, 1.0
PLACE = Resources(instance_types=["c7i.large"], zones=["local-1a"])
GUESSED_BOOT_SECONDS = 60.0
SIMULATIONS, TRIES = 200, 5
TIMES = (
    "begin", "launch", "boot", "stop", "refusal", "detect", "obey", "unused_notice", "short_life", "told_restart"
)  # fmt: skip
"""Of `holdfast.ledger.times.Times`, that a `Workload` has too, as ..._seconds."""
CLOCK_SPEED = 12.0
"""A tenth of a second of the wall, which a busy computer is soon late by, is then a 600th of the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealRun:
    number: int
    policy: str
    outages: Sequence[Outage]
    journal: Sequence[Entry]
    usd: float
    seconds: float
    """From its start to its end."""
    lateness_seconds: float
    way: str
    began_seconds: float
    """From the beginning of the cloud's clock to the run's start."""


def outages_of(draw: random.Random) -> list[Outage]:
    outages, at = [], draw.uniform(*UP_SECONDS)
    while at < TRACE_SECONDS:
        until = at + draw.uniform(*DOWN_SECONDS)
        outages.append(Outage(start_seconds=at, end_seconds=until))
        at = until + draw.uniform(*UP_SECONDS)
    return outages


def trace_of(outages: Sequence[Outage]) -> Trace:
    available = bytearray(b"\x01" * int(TRACE_SECONDS / GAP_SECONDS))
    for outage in outages:
        for second in range(round(outage.start_seconds), min(len(available), round(outage.end_seconds))):
            available[second] = 0
    return Trace(GAP_SECONDS, bytes(available), "scripted")


# -- real -------------------------------------------------------------------------------------------------------------


def job_of(number: int, policy: str) -> TrainingJob:
    return TrainingJob(
        name=f"agreement-{number}",
        script="paced.py",
        args=[str(STEPS), str(STEP_SECONDS)],
        code=str(PROGRAMS),
        resources=PLACE,
        deadline_hours=DEADLINE_HOURS,
        policy=policy,  # type: ignore[arg-type]
        checkpointing=Checkpointing(every=f"{COMMIT_STEPS} steps"),
        fallback=Fallback(),
        notice_poll_seconds=1.0,
        max_run_hours=5,
        max_attempts=50,
    )


def real_run(folder: Path, number: int, seed: int, clock_speed: float) -> RealRun:
    """A run of the flow on a cloud of its own, in a folder of its own."""
    from prefect import flow

    from flows.train import carry_out
    from holdfast.supervision.opening import open_run

    policy, outages = market_of(number, seed)
    for left_over in (folder / f"cloud-{number}", folder / "store" / "runs" / f"agreement-{number}"):
        shutil.rmtree(left_over, ignore_errors=True)
    market = TimedMarket(outages=outages, notice_seconds=NOTICE_SECONDS)
    driver = LocalDriver(LocalCloudConfig(root=folder / f"cloud-{number}", clock_speed=clock_speed, market=market))
    store, job = DirectoryStore(folder / "store"), job_of(number, policy)
    known = Measurement(
        cloud="local",
        instance_type="c7i.large",
        step_seconds=STEP_SECONDS,
        boot_seconds=GUESSED_BOOT_SECONDS,
        steps=STEPS,
    )
    write_profile(store, JobProfile(job.name, STEPS).with_measurements([known], None))
    run = open_run(job, driver, store, None, job.name)
    flow(name="agreement")(lambda: carry_out(run) and None)()
    told = told_of(folder, number, seed)
    assert told, "a flow that has ended has finished"
    return told


def market_of(number: int, seed: int) -> tuple[str, list[Outage]]:
    """The run's policy, and when there is no spot capacity."""
    return POLICIES[number % len(POLICIES)], outages_of(random.Random(f"{seed}-{number}"))


def told_of(folder: Path, number: int, seed: int) -> RealRun | None:
    """What its journal says of a finished run; None: it is not."""
    policy, outages = market_of(number, seed)
    run_id = f"agreement-{number}"
    journal = Journal(DirectoryStore(folder / "store"), journal_prefix(run_id)).read()
    state = read_run_state(run_id, journal)
    if state.state != "finished":
        return None
    began_at = datetime.fromisoformat(json.loads((folder / f"cloud-{number}" / "clock.json").read_text())["origin"])
    last = state.attempts[-1]
    assert state.started_at and last.last_step_at, "the program told when its last step was complete"
    seconds = (last.last_step_at - state.started_at).total_seconds()
    return RealRun(
        number=number,
        policy=policy,
        outages=outages,
        journal=journal,
        usd=state.usd_total,
        seconds=seconds,
        lateness_seconds=seconds - DEADLINE_HOURS * 3600,
        way=" ".join(
            f"{one.pool.provisioning_model[0]}:{one.outcome}:{one.billed_seconds:.0f}"
            for one in state.attempts
            if one.launched_at
        ),
        began_seconds=(state.started_at - began_at).total_seconds(),
    )


# -- simulated --------------------------------------------------------------------------------------------------------


def workload_of() -> Workload:
    work = STEPS * STEP_SECONDS
    return Workload(
        work_seconds=work,
        deadline_seconds=DEADLINE_HOURS * 3600,
        notice_seconds=NOTICE_SECONDS,
        checkpoint_seconds=COMMIT_STEPS * STEP_SECONDS,
        noticed_share=1.0,
        reserve_seconds=reserve_seconds_for(work),
    )


def with_times(workload: Workload, times: Times, draw: random.Random) -> Workload:
    """One of the seen ones for each; as the workload has it where nothing was seen."""
    drawn = {f"{name}_seconds": draw.choice(getattr(times, name)) for name in TIMES if getattr(times, name)}
    begin_seconds = max(0.0, drawn["begin_seconds"] - drawn.get("launch_seconds", 0.0))
    return replace(workload, **{**drawn, "begin_seconds": begin_seconds})


def offers() -> list[Offer]:
    with tempfile.TemporaryDirectory() as folder:
        sold = LocalDriver(LocalCloudConfig(root=Path(folder), market=TimedMarket(outages=[]))).offers()
    return [one for one in sold if (one.pool.zone, one.pool.instance_type) == ("local-1a", "c7i.large")]


def simulated(run: RealRun, times: Times, sold: Sequence[Offer]) -> list[Outcome]:
    pools = [
        SimulatedPool(
            str(one.pool),
            one.pool.provisioning_model == "spot",
            one.usd_per_hour,
            trace_of(run.outages) if one.pool.provisioning_model == "spot" else None,
        )
        for one in sold
    ]
    draw, tick = random.Random(run.number), tick_seconds_for(DEADLINE_HOURS * 3600)
    return [
        simulate(
            with_times(workload_of(), times, draw),
            pools,
            policy_named(run.policy, Terms(offers=sold)),
            tick,
            TERMS["local"],
            run.began_seconds,
        )
        for _ in range(SIMULATIONS)
    ]


def compare(runs: Sequence[RealRun]) -> dict[str, Any]:
    times, sold = times_of(run.journal for run in runs), offers()
    rows = []
    for run in runs:
        said = simulated(run, times, sold)
        usd = sum(one.usd for one in said) / len(said)
        nearest = min(said, key=lambda one: abs(one.usd - run.usd))
        rows.append(
            {
                "run": run.number,
                "policy": run.policy,
                "real_usd": run.usd,
                "simulated_usd": round(usd, 6),
                "difference": round(usd / run.usd - 1, 4),
                "simulated_usd_from": round(min(one.usd for one in said), 6),
                "simulated_usd_to": round(max(one.usd for one in said), 6),
                "real_seconds": round(run.seconds),
                "simulated_seconds": round(sum(one.finish_seconds for one in said) / len(said)),
                "late": run.lateness_seconds > 0,
                "machines": run.way,
                "simulated_machines": " ".join(
                    f"{'s' if spot else 'o'}:{how}:{ran:.0f}" for spot, how, ran in nearest.way
                ),
            }
        )
    real, told = sum(row["real_usd"] for row in rows), sum(row["simulated_usd"] for row in rows)
    differences = [row["difference"] for row in rows]
    spread = math.sqrt(sum(one * one for one in differences) / len(rows))
    return {
        "runs": len(rows),
        "real_usd": round(real, 4),
        "simulated_usd": round(told, 4),
        "difference": round(told / real - 1, 4),
        "mean_difference": round(sum(differences) / len(rows), 4),
        "root_mean_square_difference": round(spread, 4),
        "late": sum(row["late"] for row in rows),
        "mean_seconds": times.means(),
        "rows": rows,
    }


def words(told: dict[str, Any]) -> str:
    lines = [
        f"{row['run']:3} {row['policy']:20} real ${row['real_usd']:.4f} {row['real_seconds']:5} s, simulated "
        f"${row['simulated_usd']:.4f} ({row['simulated_usd_from']:.4f} to {row['simulated_usd_to']:.4f}) "
        f"{row['simulated_seconds']:5} s ({row['difference']:+.1%})  {row['machines']}  |  {row['simulated_machines']}"
        for row in told["rows"]
    ]
    return "\n".join(
        [
            *lines,
            "mean seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in told["mean_seconds"].items()),
            f"{told['runs']} runs: real ${told['real_usd']:.4f}, simulated ${told['simulated_usd']:.4f}: "
            f"{told['difference']:+.2%}; mean of the differences {told['mean_difference']:+.2%}, "
            f"root mean square {told['root_mean_square_difference']:.2%}; {told['late']} late",
        ]
    )


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=4, help="runs beside each other (default 4): they mostly sleep")
    parser.add_argument("--clock-speed", type=float, default=CLOCK_SPEED, help=f"default {CLOCK_SPEED:g}")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are here already are not run again")
    parser.add_argument("--numbers", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.numbers:
        os.chdir(options.folder)
        for number in options.numbers.split(","):
            for _ in range(TRIES):
                try:
                    real_run(options.folder, int(number), options.seed, options.clock_speed)
                    break
                except Exception:  # Prefect's server may be too busy to make a flow run
                    traceback.print_exc()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        missing = [number for number in range(options.runs) if told_of(folder, number, options.seed) is None]
        if missing:
            carry_out_all(folder, missing, options.seed, options.at_once, options.clock_speed)
        runs = [run for number in range(options.runs) if (run := told_of(folder, number, options.seed))]
    if len(runs) < options.runs:
        raise SystemExit(f"{options.runs - len(runs)} runs did not finish; see {folder}/worker-*.log, and begin again")
    told = compare(runs)
    print(words(told))
    told |= {
        "seed": options.seed,
        "clock_speed": options.clock_speed,
        "at_once": options.at_once,
        "wall_seconds": round(time.monotonic() - began),
        "cores": os.cpu_count(),
    }
    told |= {"python": platform.python_version()}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(told, indent=2) + "\n")


def carry_out_all(folder: Path, missing: Sequence[int], seed: int, at_once: int, clock_speed: float) -> None:
    from flows.server import prefect_server

    os.environ.pop("PREFECT_API_URL", None)
    here = Path.cwd()
    os.chdir(folder)
    with prefect_server():
        os.chdir(here)
        workers = []
        for first in range(min(at_once, len(missing))):
            numbers = ",".join(str(number) for number in missing[first::at_once])
            command = [sys.executable, "-m", "benchmarks.agreement", "--folder", str(folder), "--numbers", numbers]
            environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here / 'src'}"}
            log = open(folder / f"worker-{first}.log", "wb")  # noqa: SIM115 (the worker writes to it)
            command += ["--seed", str(seed), "--clock-speed", str(clock_speed)]
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        for worker in workers:
            worker.wait()


if __name__ == "__main__":
    main()
