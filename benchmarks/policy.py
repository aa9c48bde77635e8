"""What deadlines cost under every policy: `python -m benchmarks.policy [--traces DIR]` (`--quick`: fewer starts).

Jobs of 48 h with deadlines of 52 h and 70 h and overheads of 0.05 h and 0.20 h, begun every 12 h of every trace whose end
lies behind the deadline. Ticks of 600 s; spot $0.9731/h, on-demand $3.06/h; whole ticks are billed; every launch and every
change of machine costs the overhead. Whether there is spot at the present tick is known, of what follows nothing: the
policies are those of runs (`holdfast.placement.policies`), and see a situation, never a trace.

| key | what |
| --- | --- |
| mean_usd, missed | over all jobs |
| gap_closed | of what uniform progress pays more than the omniscient optimum, the share that is not paid |
| gap_closed_worst_setting, gap_closed_worst_zone | the same in the worst of the four settings, and for the worst trace |
| gap_closed_warm | the same over the jobs before which there are 7 days of the trace, which the policy is shown |
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.optimum import optimal_usd
from benchmarks.support.tick_market import Setting, play
from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.errors import ConfigError
from holdfast.market.traces import Trace, read_traces
from holdfast.placement.policies import POLICIES, Terms, policy_named

RESULT = Path(__file__).parent / "results" / "policy.json"
TRACES = Path(__file__).parents[2] / "shared" / "traces"
SETTINGS = [
    Setting(deadline_hours=deadline, overhead_hours=overhead) for deadline in (52.0, 70.0) for overhead in (0.05, 0.20)
]
START_HOURS, HISTORY_HOURS = 12.0, 7 * 24.0
BASELINE, OPTIMUM = "uniform-progress", "optimum"


@dataclass(frozen=True, slots=True)
class Job:
    zone: str
    setting: Setting
    start: int
    """Tick."""
    warm: bool
    """There are days of history before it."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one policy paid, job by job."""

    usd: np.ndarray
    missed: np.ndarray


def jobs_of(traces: Sequence[Trace], settings: Sequence[Setting], every_hours: float) -> list[Job]:
    jobs = []
    for trace in traces:
        for setting in settings:
            step = round(every_hours * 3600 / setting.tick_seconds)
            days = round(HISTORY_HOURS * 3600 / setting.tick_seconds)
            jobs += [
                Job(trace.name, setting, start, start >= days)
                for start in range(0, len(trace.available) - setting.ticks + 1, step)
            ]
    return jobs


def run_policy(
    make: Callable[[Job], Any], jobs: Sequence[Job], traces: dict[str, Trace], warm: bool, progress: Callable[[], None]
) -> Row:
    """`warm`: the policy is shown the days before the start."""
    usd, missed = [], []
    for job in jobs:
        trace = traces[job.zone]
        history: tuple[Trace | None, ...] = ()
        if warm:
            days = round(HISTORY_HOURS * 3600 / trace.gap_seconds)
            before = trace.available[max(0, job.start - days) : job.start]
            history = (Trace(trace.gap_seconds, before, "") if before else None, None)
        played = play(make(job), job.setting, [trace.available], job.start, history)
        usd.append(played.usd)
        missed.append(played.missed)
        progress()
    return Row(np.array(usd), np.array(missed))


def optimum_row(jobs: Sequence[Job], traces: dict[str, Trace]) -> Row:
    usd = np.zeros(len(jobs))
    for zone in traces:
        for setting in dict.fromkeys(job.setting for job in jobs):
            chosen = [index for index, job in enumerate(jobs) if job.zone == zone and job.setting == setting]
            if chosen:
                starts = [jobs[index].start for index in chosen]
                usd[chosen] = optimal_usd(setting, [traces[zone].available], starts)
    return Row(usd, np.isinf(usd))


def gap_closed(row: Row, baseline: Row, optimum: Row, among: np.ndarray) -> float | None:
    """None: there is no gap."""
    gap = float(baseline.usd[among].sum() - optimum.usd[among].sum())
    return float(baseline.usd[among].sum() - row.usd[among].sum()) / gap if gap > 1e-6 else None


def figures(row: Row, rows: dict[str, Row], jobs: Sequence[Job], warm_row: Row | None) -> dict[str, Any]:
    baseline, optimum, on_demand = rows[BASELINE], rows[OPTIMUM], rows["on-demand"]
    zones = np.array([job.zone for job in jobs])
    settings = np.array([job.setting.name for job in jobs])
    warm = np.array([job.warm for job in jobs])

    def closed(among: np.ndarray, of: Row = row) -> float | None:
        share = gap_closed(of, baseline, optimum, among)
        return None if share is None else round(share, 4)

    by_setting = {name: closed(settings == name) for name in dict.fromkeys(settings.tolist())}
    by_zone = {name: closed(zones == name) for name in dict.fromkeys(zones.tolist())}
    return {
        "mean_usd": round(float(row.usd.mean()), 3),
        "saving": round(1 - float(row.usd.sum() / on_demand.usd.sum()), 4),
        "missed": int(row.missed.sum()) + (int(warm_row.missed.sum()) if warm_row else 0),
        "gap_closed": closed(zones == zones),
        "gap_closed_worst_setting": min((one for one in by_setting.values() if one is not None), default=None),
        "gap_closed_worst_zone": min((one for one in by_zone.values() if one is not None), default=None),
        "gap_closed_warm": closed(warm, warm_row or row) if warm.any() else None,
        "gap_closed_by_setting": by_setting,
        "gap_closed_by_zone": by_zone,
        "mean_usd_by_setting": {
            name: round(float(row.usd[settings == name].mean()), 3) for name in dict.fromkeys(settings.tolist())
        },
        "mean_usd_by_zone": {
            name: round(float(row.usd[zones == name].mean()), 3) for name in dict.fromkeys(zones.tolist())
        },
    }


# -- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__.splitlines()[0])
    options.add_argument(
        "--traces", type=Path, help="a folder of traces (default: ../shared/traces beside the checkout)"
    )
    options.add_argument("--quick", action="store_true", help="a start every 48 h instead of every 12 h")
    options.add_argument("--result", type=Path, default=RESULT, help=argparse.SUPPRESS)
    given = options.parse_args()
    folder = given.traces or TRACES
    if not folder.exists():
        options.error(f"there are no traces in {folder}; name a folder of them: --traces DIR")
    try:
        traces = read_all(folder)
    except ConfigError as error:
        options.error(str(error))
    began, load = time.monotonic(), os.getloadavg()
    result = measure(traces, START_HOURS * (4 if given.quick else 1))
    result |= {
        "traces": {trace.name: round(trace.seconds / 86400, 1) for trace in traces},
        "quick": given.quick,
        "seconds": round(time.monotonic() - began, 1),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {load[0]:.1f}",
    }
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    print(f"Written to {given.result}")


def read_all(folder: Path) -> list[Trace]:
    """On the benchmark's tick, each under a name of its own."""
    traces = [trace.on_ticks_of(SETTINGS[0].tick_seconds) for trace in read_traces(folder)]
    names = [trace.name for trace in traces]
    files = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
    return [
        Trace(
            trace.gap_seconds,
            trace.available,
            f"{file.parent.name}/{trace.name}" if names.count(trace.name) > 1 else trace.name,
        )
        for trace, file in zip(traces, files, strict=True)
    ]


def measure(traces: Sequence[Trace], every_hours: float) -> dict[str, Any]:
    by_name = {trace.name: trace for trace in traces}
    jobs = jobs_of(traces, SETTINGS, every_hours)
    if not jobs:
        raise SystemExit("error: no trace is as long as the longest deadline; name longer ones: --traces DIR")
    rows: dict[str, Row] = {OPTIMUM: optimum_row(jobs, by_name)}
    for name in POLICIES:
        with progress_bar(name, len(jobs)) as step:
            rows[name] = run_policy(
                lambda job, name=name: policy_named(name, terms_of(job.setting)), jobs, by_name, False, step
            )
    return {"jobs": len(jobs), "policies": {name: figures(row, rows, jobs, None) for name, row in rows.items()}}


def terms_of(setting: Setting, spot_pools: int = 1) -> Terms:
    return Terms(
        offers=[
            Offer(
                pool=CapacityPool(
                    "trace", "here", f"zone-{index}", "any", "spot" if index < spot_pools else "on-demand"
                ),
                usd_per_hour=setting.spot_usd_per_hour if index < spot_pools else setting.on_demand_usd_per_hour,
                on_demand_usd_per_hour=setting.on_demand_usd_per_hour,
                vcpus=1,
                memory_gib=1,
            )
            for index in range(spot_pools + 1)
        ]
    )


class progress_bar:
    """On stderr, when it is a terminal."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0

    def __enter__(self) -> Callable[[], None]:
        return self._step

    def _step(self) -> None:
        self._done += 1
        if sys.stderr.isatty() and (self._done % 20 == 0 or self._done == self._total):
            bar = "#" * (30 * self._done // self._total)
            print(f"\r{self._name:22} [{bar:30}] {self._done}/{self._total}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            print("\r" + " " * 79 + "\r", end="", file=sys.stderr, flush=True)


def show(result: dict[str, Any]) -> None:
    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f} %"

    print(f"{result['jobs']} jobs in {len(result['traces'])} traces")
    heads = ("mean $", "saving", "missed", "gap closed", "worst setting", "worst zone", "warm")
    print(f"{'policy':22}" + "".join(f"{head:>14}" for head in heads))
    for name, of in sorted(result["policies"].items(), key=lambda item: -item[1]["mean_usd"]):
        cells = [f"{of['mean_usd']:.2f}", share(of["saving"]), str(of["missed"])]
        cells += [
            share(of[key])
            for key in ("gap_closed", "gap_closed_worst_setting", "gap_closed_worst_zone", "gap_closed_warm")
        ]
        print(f"{name:22}" + "".join(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()
