"""What 200 machines in one flow cost the orchestrator and the cloud's API: `python -m benchmarks.orchestration`.

One fleet flow of `--machines` machines (80 % spot) runs on the AWS emulator of the tests, with the driver's usual settings:
a description of the machines serves for 30 s, the store is looked at every 5 s. The orchestrator is a process of its
own, whose processor time and memory are measured from outside, Prefect's client included; the Prefect server, the
emulator and the machines are not. Its phases:

| phase    | from                               | to                                                              |
| -------- | ---------------------------------- | --------------------------------------------------------------- |
| launch   | the request is in the journal      | all machines are known to the orchestrator; their programs run  |
| steady   | that                               | `--steady-seconds` later: nothing happens, all is watched       |
| replace  | 10 % of the machines are taken     | as many new ones are known to the orchestrator                  |
| end      | the programs are told to finish    | the flow has ended, and no machine is left                      |

The API's side is the real one: boto3, HTTP, signatures, CreateFleet, DescribeInstances with 200 instances in it. The
machines are not: on this benchmark's computer every machine's host and agent would be two Python processes, together
27 MiB and 2.4 % of a core, so 200 of them would need five cores for themselves. Each is a shell script instead that was
given the same user data, and of what an agent does it does what the orchestrator reads: a heartbeat, and an end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.recovery import workplace
from holdfast.ledger.fleet_state import FleetState, read_fleet_state
from holdfast.ledger.journal import Journal
from holdfast.runtime.contract import journal_prefix, member_ends_prefix, member_run
from holdfast.storage import DirectoryStore
from tests.emulated.aws import ACCESS_KEY, INSTANCE_TYPES, PROFILE, REGIONS, SECRET_KEY, SESSION_TOKEN, AwsEmulator
from tests.emulated.machine_host import Life, MachineHost

RESULT = Path(__file__).parent / "results" / "orchestration.json"
REPOSITORY = Path(__file__).parents[1]
RUN = "orchestration"
SPOT_SHARE, TAKEN_SHARE = 0.8, 0.1
MOST_DESCRIBES_A_MINUTE = 2.0
PATIENCE_SECONDS = 600.0
EXPORT = re.compile(r"^export HOLDFAST_(?:STORE|RUN)=\S+$", re.MULTILINE)

# `put` is how the store wants to be written: complete, then named. $1 is the machine, $2 the file that ends its program.
MACHINE = """
store=${HOLDFAST_STORE#file://}/runs/$HOLDFAST_RUN
put() { mkdir -p "$(dirname "$1")"; echo "$2" > staged; mv staged "$1"; }
now() { date -u +%FT%T+00:00; }
while [ ! -e "$2" ]; do
  put "$store/members/$1/heartbeat.json" "{\\"at\\": \\"$(now)\\"}"
  for _ in 1 2 3 4 5 6 7 8 9 10; do [ -e "$2" ] || sleep 6; done
done
put "$store/member-ends/$1.json" "{\\"outcome\\": \\"finished\\", \\"exit_status\\": 0, \\"log_tail\\": \\"\\", \\"report\\": {}}"
"""


@dataclass
class LightMachines(MachineHost):
    """Machines without a host process: one shell each."""

    stop: Path = Path("stop")
    shells: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    ended_at: dict[str, datetime] = field(default_factory=dict)
    spot: list[str] = field(default_factory=list)

    def start(self, machine_id: str, *, provisioning_model: str, startup_script: str, **_: Any) -> None:
        folder = self.folder / machine_id
        folder.mkdir()
        script = "\n".join([*EXPORT.findall(startup_script), MACHINE])
        self.shells[machine_id] = subprocess.Popen(
            ["bash", "-c", script, "machine", machine_id, str(self.stop)],
            cwd=folder,
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if provisioning_model == "spot":
            self.spot.append(machine_id)

    def life(self, machine_id: str) -> Life:
        if self.shells[machine_id].poll() is None:
            return Life(state="running")
        ended_at = self.ended_at.setdefault(machine_id, datetime.now(UTC))
        return Life(state="terminated", reason=self.reasons.setdefault(machine_id, "ended-itself"), ended_at=ended_at)

    def terminate(self, machine_id: str) -> None:
        self._kill(machine_id, "terminated-by-user")

    def take(self, count: int) -> list[str]:
        """The market takes so many spot machines, without notice."""
        taken = [machine for machine in self.spot if self.life(machine).state == "running"][:count]
        for machine in taken:
            self._kill(machine, "preempted")
        return taken

    def _kill(self, machine_id: str, reason: str) -> None:
        shell = self.shells[machine_id]
        if shell.poll() is None:
            self.reasons[machine_id] = reason
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()

    def console(self, machine_id: str) -> str:
        return ""

    def ids(self) -> list[str]:
        return sorted(self.shells)

    def stop_all(self) -> None:
        for machine in self.shells:
            self._kill(machine, "terminated-by-user")


class Meter:
    """What the orchestrator's process has used."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.peak_bytes = 0

    def cpu_seconds(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


@dataclass(frozen=True, slots=True)
class Phase:
    """What was used from its beginning to its end."""

    seconds: float
    cpu_seconds: float
    calls: dict[str, int]
    """Of the cloud's API, as `region action`."""


class Bench:
    def __init__(self, folder: Path, machines: int, cloud: AwsEmulator, host: LightMachines) -> None:
        self.store = DirectoryStore(folder / "store")
        self.machines, self.cloud, self.host = machines, cloud, host
        self._journal = Journal(self.store, journal_prefix(RUN))
        self.process = start_orchestrator(folder, cloud.direct, machines)
        self.log = folder / "orchestrator.log"
        self.meter = Meter(psutil.Process(self.process.pid))

    def state(self) -> FleetState:
        return read_fleet_state(RUN, self._journal.read())

    def wait_for(self, what: str, condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> None:
        give_up_at = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                raise SystemExit(f"{what}: not reached; the orchestrator's last words:\n{self.log.read_text()[-3000:]}")
            self.meter.look()
            time.sleep(0.25)

    @contextmanager
    def phase(self, phases: dict[str, Phase], name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        requests, cpu, began = len(self.cloud.requests), self.meter.cpu_seconds(), time.monotonic()
        yield
        calls = Counter(f"{one.region} {one.action}" for one in self.cloud.requests[requests:])
        phases[name] = Phase(time.monotonic() - began, self.meter.cpu_seconds() - cpu, dict(sorted(calls.items())))

    def programs_running(self) -> int:
        prefix = f"runs/{member_run(RUN, '')}"
        return sum(info.key.endswith("/heartbeat.json") for info in self.store.list(prefix))


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description=__doc__.splitlines()[0])
    options.add_argument("--machines", type=int, default=200, help="how many machines the fleet has (default 200)")
    options.add_argument(
        "--steady-seconds", type=float, default=200.0, help="how long all is only watched (default 200)"
    )
    options.add_argument("--orchestrate", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.orchestrate:
        return orchestrate(json.loads(given.orchestrate.read_text()))
    if not 10 <= given.machines <= 1000:
        options.error(f"--machines is {given.machines}; it must lie between 10 and 1000")
    result = measure(given.machines, given.steady_seconds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


# -- the orchestrator's process ---------------------------------------------------------------------------------------


def start_orchestrator(folder: Path, endpoint: str, machines: int) -> subprocess.Popen[bytes]:
    code = folder / "code"
    code.mkdir()
    (code / "program.sh").write_text("sleep infinity\n")
    given = {"endpoint": endpoint, "store": str(folder / "store"), "code": str(code), "machines": machines}
    (folder / "orchestrator.json").write_text(json.dumps(given))
    with open(folder / "orchestrator.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.orchestration", "--orchestrate", str(folder / "orchestrator.json")],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "HOLDFAST_DISPLAY": "1",
                "AWS_ACCESS_KEY_ID": ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_SESSION_TOKEN": SESSION_TOKEN,
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def orchestrate(given: Mapping[str, Any]) -> None:
    """The fleet flow, as `python -m flows fleet` runs it."""
    import boto3
    from prefect import flow

    from flows.fleet import carry_out_fleet
    from holdfast.drivers.aws import AwsConfig, AwsDriver
    from holdfast.model import FleetJob, Resources
    from holdfast.supervision.fleet_opening import open_fleet_run

    job = FleetJob(
        name=RUN,
        command=["bash", "program.sh"],
        code=given["code"],
        resources=Resources(instance_types=["c7i.large"]),
        machines=given["machines"],
        spot_share=SPOT_SHARE,
        max_run_hours=given["machines"] * 2,
    )
    config = AwsConfig(
        regions=list(REGIONS),
        instance_types=INSTANCE_TYPES,
        instance_profile=PROFILE,
        client_parameters={"endpoint_url": given["endpoint"]},
    )
    driver = AwsDriver(config, boto3.Session(region_name=REGIONS[0]))
    run = open_fleet_run(job, driver, DirectoryStore(given["store"]), None, RUN)

    @flow(name="orchestration")
    def story() -> None:
        carry_out_fleet(run)

    story()


# -- measuring it -----------------------------------------------------------------------------------------------------


def measure(machines: int, steady_seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    with workplace() as folder:
        stop = folder / "stop"
        host = LightMachines(folder / "machines", "aws", stop=stop)
        emulator = AwsEmulator(folder)
        emulator.host = host
        with emulator:
            bench = Bench(folder, machines, emulator, host)
            try:
                return run_phases(bench, stop, steady_seconds) | {"seconds": round(time.monotonic() - began, 1)}
            finally:
                if bench.process.poll() is None:
                    bench.process.kill()
                    bench.process.wait()


def run_phases(bench: Bench, stop: Path, steady_seconds: float) -> dict[str, Any]:
    phases: dict[str, Phase] = {}
    taken_count = round(bench.machines * TAKEN_SHARE)
    bench.wait_for("a round", lambda: bench.state().rounds)
    with bench.phase(phases, "launch"):
        bench.wait_for("all launched", lambda: len(bench.state().living) == bench.machines)
        bench.wait_for("all running", lambda: bench.programs_running() == bench.machines)
    with bench.phase(phases, "steady"):
        until = time.monotonic() + steady_seconds
        bench.wait_for("steady", lambda: time.monotonic() >= until, steady_seconds + 60)
    with bench.phase(phases, "replace"):
        taken_at = datetime.now(UTC)
        taken = bench.host.take(taken_count)
        bench.wait_for("their ends known", lambda: len(bench.state().ended("preempted")) == len(taken))
        bench.wait_for("replaced", lambda: len(bench.state().living) == bench.machines)
    with bench.phase(phases, "end"):
        stop.touch()
        bench.wait_for("all finished", lambda: len(bench.state().ended("finished")) == bench.machines)
        bench.wait_for("closed", lambda: bench.state().state == "finished")
    if bench.process.wait(120):
        raise SystemExit(f"the orchestrator failed:\n{bench.log.read_text()[-3000:]}")
    if left := [one for one in bench.host.ids() if bench.host.life(one).state != "terminated"]:
        raise SystemExit(f"machines are left: {left}")
    return report(bench, phases, taken_at, steady_seconds)


def report(bench: Bench, phases: Mapping[str, Phase], taken_at: datetime, steady_seconds: float) -> dict[str, Any]:
    state = bench.state()
    summary = json.loads(bench.store.get(f"runs/{RUN}/summary.json"))
    first, *later = state.rounds
    assert first.answered_at and later and later[-1].answered_at
    steady = phases["steady"]
    minutes = steady.seconds / 60
    describes = {region: steady.calls.get(f"{region} DescribeInstances", 0) / minutes for region in REGIONS}
    known_at = max(one.detected_at for one in state.ended("preempted") if one.detected_at)
    return {
        "machines": bench.machines,
        "spot_share": SPOT_SHARE,
        "describes_per_minute_and_region": {name: round(number, 2) for name, number in describes.items()},
        "target_describes_per_minute_and_region": MOST_DESCRIBES_A_MINUTE,
        "api_calls_per_minute": round(sum(steady.calls.values()) / minutes, 2),
        "api_calls_per_machine_minute": round(sum(steady.calls.values()) / minutes / bench.machines, 5),
        "cpu_seconds_per_minute": round(steady.cpu_seconds / minutes, 3),
        "peak_memory_mib": round(bench.meter.peak_bytes / 2**20, 1),
        "seconds_to_all_launched": summary["seconds_to_all_launched"],
        "seconds_to_all_running": round(phases["launch"].seconds, 1),
        "taken": len(state.ended("preempted")),
        "seconds_to_know_of_the_taken": round((known_at - taken_at).total_seconds(), 1),
        "seconds_from_knowing_to_replaced": round((later[-1].answered_at - known_at).total_seconds(), 1),
        "rounds": len(state.rounds),
        "journal_entries": len(bench.store.list(journal_prefix(RUN))),
        "member_ends": len(bench.store.list(member_ends_prefix(RUN))),
        "outcomes": summary["outcomes"],
        "phases": {
            name: {"seconds": round(one.seconds, 1), "cpu_seconds": round(one.cpu_seconds, 2), "calls": one.calls}
            for name, one in phases.items()
        },
        "steady_seconds": steady_seconds,
        "machine": "a shell script each, in place of host and agent; see the benchmark's first lines",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("holdfast", "prefect", "boto3", "moto")},
        },
    }


def show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"One flow, {result['machines']} machines, {result['cores']} cores", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    for what, value in rows_of(result):
        table.add_row(what, value)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    worst, target = max(result["describes_per_minute_and_region"].values()), MOST_DESCRIBES_A_MINUTE
    verdict = "within" if worst <= target + 0.05 else "ABOVE"
    print(f"Descriptions: {worst:g} a minute and region, {verdict} the {target:g} aimed at. Written to {RESULT}")


def rows_of(result: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    describes = ", ".join(f"{number:g}" for number in result["describes_per_minute_and_region"].values())
    return [
        ("descriptions a minute, by region, while all run", describes),
        ("API calls a minute, of all kinds, while all run", f"{result['api_calls_per_minute']:g}"),
        ("API calls per machine-minute", f"{result['api_calls_per_machine_minute']:g}"),
        ("orchestrator: CPU seconds a minute", f"{result['cpu_seconds_per_minute']:.2f}"),
        ("orchestrator: peak memory", f"{result['peak_memory_mib']:.0f} MiB"),
        ("from the request to all launched", f"{result['seconds_to_all_launched']:.1f} s"),
        ("from the request to all programs running", f"{result['seconds_to_all_running']:.1f} s"),
        (f"{result['taken']} machines taken: until known", f"{result['seconds_to_know_of_the_taken']:.1f} s"),
        ("from there to replaced", f"{result['seconds_from_knowing_to_replaced']:.1f} s"),
        ("entries in the journal", f"{result['journal_entries']}"),
    ]


if __name__ == "__main__":
    main()
