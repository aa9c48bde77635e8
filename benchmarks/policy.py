"""What deadlines cost under every policy: `python -m benchmarks.policy [--traces DIR]` (`--quick`: fewer starts).

Jobs of 48 h with deadlines of 52 h and 70 h and overheads of 0.05 h and 0.20 h, begun every 12 h of every trace whose end
lies behind the deadline. Ticks of 600 s; spot $0.9731/h, on-demand $3.06/h; whole ticks are billed; every launch and every
change of machine costs the overhead. Whether there is spot at the present tick is known, of what follows nothing: the
policies are those of runs (`holdfast.placement.policies`), and see a situation, never a trace.

The policy `least-cost` begins with a library of hazards that was fitted to the traces of `../shared/traces`: on these very
traces its figures are flattered. With `--cross-validate` every trace is met with a library fitted to the others, without
those of the same zone and type. On traces of your own the shipped library has seen nothing, and no flag is needed.

| key | what |
| --- | --- |
| mean_usd, missed | over all jobs |
| gap_closed | of what uniform progress pays more than the omniscient optimum, the share that is not paid |
| gap_closed_worst_setting, gap_closed_worst_zone | the same in the worst of the four settings, and for the worst trace |
| gap_closed_warm | the same over the jobs before which there are 7 days of the trace, which the policy is shown |
| multi | 24 h jobs, deadlines of 36 h and 48 h, in all zones of a folder at once; uniform progress stays in the first zone |
| synthetic | on traces drawn from known hazards, what is paid over the least that can be expected, exactly computed |
| speed | 48-hour jobs per second on one core: this market's, and the simulator's; tables built beforehand |
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
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.support.fit_hazards import fit
from benchmarks.support.optimum import optimal_usd
from benchmarks.support.semi_markov import KNOWN, Exact, draw, optimum
from benchmarks.support.tick_market import Setting, play
from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.errors import ConfigError
from holdfast.ledger.billing import BillingTerms
from holdfast.market.traces import Trace, read_traces
from holdfast.placement.fitted_hazards import FITTED
from holdfast.placement.hazards import Library
from holdfast.placement.least_cost import LeastCost
from holdfast.placement.policies import POLICIES, Terms, policy_named
from holdfast.placement.situation import Policy
from holdfast.simulation.engine import SimulatedPool, Workload, simulate

RESULT = Path(__file__).parent / "results" / "policy.json"
TRACES = Path(__file__).parents[2] / "shared" / "traces"
BILLING = BillingTerms(minimum_seconds=60.0)
SETTINGS = [
    Setting(deadline_hours=deadline, overhead_hours=overhead) for deadline in (52.0, 70.0) for overhead in (0.05, 0.20)
]
SPEED_ROUNDS = 7
START_HOURS, HISTORY_HOURS = 12.0, 7 * 24.0
DRAWN_DAYS = 20.0
BASELINE, OPTIMUM, OURS = "uniform-progress", "optimum", "least-cost"
MULTI_SETTINGS = [
    Setting(work_hours=24.0, deadline_hours=deadline, overhead_hours=overhead, move_usd=0.10)
    for deadline in (36.0, 48.0)
    for overhead in (0.05, 0.20)
]
"""A checkpoint of 5 GB, at $0.02 per GB between regions."""
TARGETS = {
    "missed": 0,
    "gap_closed": 0.60,
    "gap_closed_warm": 0.62,
    "gap_closed_worst_setting": 0.40,
    "multi_gap_closed": 0.60,
    "synthetic_over_optimum": 1.02,
    "simulator_default_jobs_per_second": 300,
    "simulator_least_cost_jobs_per_second": 100,
}


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
    make: Callable[[Job], Policy],
    jobs: Sequence[Job],
    traces: dict[str, Trace],
    warm: bool,
    progress: Callable[[], None] = lambda: None,
) -> Row:
    """`warm`: the policy is shown the days before the start, and jobs without such are left out (they cost nan)."""
    usd, missed = np.full(len(jobs), np.nan), np.zeros(len(jobs), bool)
    for index, job in enumerate(jobs):
        progress()
        if warm and not job.warm:
            continue
        record = traces[job.zone]
        history = (_before(record, job.start),) if warm else ()
        played = play(make(job), job.setting, [record.available], job.start, history)
        usd[index], missed[index] = played.usd, played.missed
    return Row(usd, missed)


def _before(trace: Trace, start: int) -> Trace:
    days = round(HISTORY_HOURS * 3600 / trace.gap_seconds)
    return Trace(trace.gap_seconds, trace.available[start - days : start], "")


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
    options.add_argument("--cross-validate", action="store_true", help="fit the hazards to the other zones' traces")
    options.add_argument("--result", type=Path, default=RESULT, help=argparse.SUPPRESS)
    given = options.parse_args()
    folder = given.traces or TRACES
    if given.traces and not folder.exists():
        options.error(f"there are no traces in {folder}; name a folder of them: --traces DIR")
    try:
        traces = read_all(folder) if folder.exists() else drawn()
    except ConfigError as error:
        options.error(str(error))
    began, load = time.monotonic(), os.getloadavg()
    libraries, source = {trace.name: FITTED for trace in traces}, "shipped"
    if given.cross_validate:
        libraries, source = fit_to_the_others(traces), "fitted to the other zones' traces"
    result = {"library": source, "targets": TARGETS}
    result |= measure(traces, libraries, START_HOURS * (4 if given.quick else 1))
    together = zones_together(traces, folder)
    result["multi"] = measure_multi(together, traces, given.cross_validate, START_HOURS * (8 if given.quick else 2))
    result["synthetic"] = measure_synthetic(100 if given.quick else 500)
    result["speed"] = measure_speed(traces)
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


def drawn() -> list[Trace]:
    """Where nobody has recorded any: the benchmark runs, and its figures say how it runs."""
    print(f"There are no recorded traces in {TRACES} (--traces DIR): drawn ones take their place", file=sys.stderr)
    ticks = round(DRAWN_DAYS * 86400 / SETTINGS[0].tick_seconds)
    return [Trace(600.0, draw(KNOWN, ticks, seed)[0], f"drawn-{seed}") for seed in range(1, 5)]


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


def fit_to_the_others(traces: Sequence[Trace]) -> dict[str, Library]:
    """For each trace a library of the traces of other zones or types."""
    found: dict[str, Library] = {}
    by_stem: dict[str, Library] = {}
    with progress_bar("fitting", len(traces)) as step:
        for trace in traces:
            stem = trace.name.rpartition("/")[2]
            others = [other for other in traces if other.name.rpartition("/")[2] != stem]
            if not others:
                raise SystemExit("error: --cross-validate needs traces of two zones or types at least")
            if stem not in by_stem:
                by_stem[stem] = fit(others)
            found[trace.name] = by_stem[stem]
            step()
    return found


def measure(traces: Sequence[Trace], libraries: dict[str, Library], every_hours: float) -> dict[str, Any]:
    by_name = {trace.name: trace for trace in traces}
    jobs = jobs_of(traces, SETTINGS, every_hours)
    if not jobs:
        raise SystemExit("error: no trace is as long as the longest deadline; name longer ones: --traces DIR")
    rows: dict[str, Row] = {OPTIMUM: optimum_row(jobs, by_name)}
    warm: Row | None = None
    for name in POLICIES:
        if name == OURS:
            continue
        with progress_bar(name, len(jobs)) as step:
            rows[name] = run_policy(partial(_named, name), jobs, by_name, False, step)
    with progress_bar(OURS, len(jobs)) as step:
        rows[OURS] = run_policy(lambda job: LeastCost(libraries[job.zone]), jobs, by_name, False, step)
    if any(job.warm for job in jobs):
        with progress_bar(f"{OURS}, warm", len(jobs)) as step:
            warm = run_policy(lambda job: LeastCost(libraries[job.zone]), jobs, by_name, True, step)
    return {
        "jobs": len(jobs),
        "policies": {name: figures(row, rows, jobs, warm if name == OURS else None) for name, row in rows.items()},
    }


def _named(name: str, job: Job) -> Policy:
    return policy_named(name, terms_of(job.setting))


def zones_together(traces: Sequence[Trace], folder: Path) -> dict[str, list[Trace]]:
    """Traces of one folder, one type and one length, in several zones: they are taken to be of the same time."""
    files = sorted(folder.rglob("*.json")) if folder.is_dir() else [folder]
    found: dict[str, list[Trace]] = {}
    if not folder.exists():
        return found
    for trace, file in zip(traces, files, strict=True):
        zone, _, kind = file.stem.partition("_")
        found.setdefault(f"{file.parent.name}, {kind}, {len(trace.available)} ticks", []).append(trace)
        assert zone
    return {name: zones for name, zones in found.items() if len(zones) > 1}


def measure_multi(
    groups: dict[str, list[Trace]], traces: Sequence[Trace], cross_validate: bool, every_hours: float
) -> dict[str, Any] | None:
    """None: no zones were recorded together."""
    total, first, best, missed, by_setting = 0.0, 0.0, 0.0, 0, {}
    counted = 0
    for zones in groups.values():
        records = [zone.available for zone in zones]
        others = [trace for trace in traces if trace not in zones]
        library = fit(others) if cross_validate and others else FITTED
        for setting in MULTI_SETTINGS:
            step = round(every_hours * 3600 / setting.tick_seconds)
            starts = range(0, len(records[0]) - setting.ticks + 1, step)
            ours, uniform = [], []
            with progress_bar(f"zones, {setting.name}", len(starts)) as told:
                for start in starts:
                    played = play(LeastCost(library), setting, records, start)
                    ours.append(played.usd)
                    missed += played.missed
                    uniform.append(
                        play(_named(BASELINE, Job("", setting, start, False)), setting, records[:1], start).usd
                    )
                    told()
            least = optimal_usd(setting, records, starts)
            by_setting[setting.name] = round(float((sum(uniform) - sum(ours)) / (sum(uniform) - least.sum())), 4)
            total, first, best = total + sum(ours), first + sum(uniform), best + float(least.sum())
            counted += len(starts)
    if not counted:
        return None
    return {
        "groups": {name: [zone.name for zone in zones] for name, zones in groups.items()},
        "jobs": counted,
        "missed": missed,
        "mean_usd": round(total / counted, 3),
        "uniform_progress_in_the_first_zone_usd": round(first / counted, 3),
        "optimum_usd": round(best / counted, 3),
        "gap_closed": round((first - total) / (first - best), 4),
        "gap_closed_by_setting": by_setting,
    }


def measure_synthetic(jobs: int) -> dict[str, Any]:
    """Each job has a trace of its own, of which 7 days lie before its start; the exact optimum's policy meets the same."""
    days, found = round(HISTORY_HOURS * 3600 / 600), {}
    for setting in (setting for setting in SETTINGS if setting.overhead_hours < 0.1):
        least, choices, unit = optimum(setting, KNOWN)
        paid, exact, expected = [], [], []
        with progress_bar(f"synthetic, {setting.deadline_hours:g} h", jobs) as step:
            for seed in range(jobs):
                record, ages = draw(KNOWN, days + setting.ticks, seed)
                history = Trace(600.0, record[:days], "")
                paid.append(play(LeastCost(KNOWN), setting, [record], days, (history,)).usd)
                exact.append(play(Exact(choices, unit, record[days:], ages[days:]), setting, [record], days).usd)
                expected.append(least[record[days], ages[days]])
                step()
        more = np.array(paid) - np.array(exact)
        found[setting.name] = {
            "mean_usd": round(float(np.mean(paid)), 3),
            "optimum_usd": round(float(np.mean(exact)), 3),
            "optimum_expected_usd": round(float(np.mean(expected)), 3),
            "optimum_standard_error_usd": round(float(np.std(np.array(exact) - np.array(expected)) / jobs**0.5), 3),
            "over_optimum": round(1 + float(more.mean() / np.mean(exact)), 4),
            "standard_error": round(float(more.std() / jobs**0.5 / np.mean(exact)), 4),
        }
    return {"jobs": jobs, "over_optimum": max(one["over_optimum"] for one in found.values()), "by_setting": found}


def measure_speed(traces: Sequence[Trace]) -> dict[str, float]:
    """Medians, by processor time, so that other programs on the machine count little."""
    setting = SETTINGS[2]
    jobs = jobs_of(traces, [setting], 96.0)
    by_name = {trace.name: trace for trace in traces}
    work = Workload(work_seconds=48 * 3600, deadline_seconds=70 * 3600, boot_seconds=180.0, checkpoint_seconds=600.0)
    terms = terms_of(setting)
    pools = {
        trace.name: [
            SimulatedPool("spot", True, setting.spot_usd_per_hour, trace),
            SimulatedPool("on-demand", False, setting.on_demand_usd_per_hour),
        ]
        for trace in traces
    }
    keys = {"spot-then-on-demand": "default", BASELINE: "uniform_progress", OURS: "least_cost"}

    def simulated(name: str) -> Callable[[Job], object]:
        return lambda job: simulate(work, pools[job.zone], policy_named(name, terms), 600.0, BILLING, job.start * 600.0)

    ways: dict[str, Callable[[Job], object]] = {
        "ticks_least_cost": lambda job: run_policy(lambda job: LeastCost(FITTED), [job], by_name, False),
        **{f"simulator_{key}": simulated(name) for name, key in keys.items()},
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for way in ways.values():
        way(jobs[0])  # builds the tables
    for _ in range(SPEED_ROUNDS):
        for name, way in ways.items():
            began = time.process_time()
            for job in jobs:
                way(job)
            found[name].append(len(jobs) / (time.process_time() - began))
    return {f"{name}_jobs_per_second": round(median(rates), 1) for name, rates in found.items()}


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
    ours = result["policies"][OURS]
    print(f"The library of {OURS}: {result['library']}")
    for title, key in (("setting", "gap_closed_by_setting"), ("zone", "gap_closed_by_zone")):
        for name, value in ours[key].items():
            print(f"  {title} {name:34} gap closed {share(value)}")
    if multi := result["multi"]:
        print(
            f"zones together: {multi['jobs']} jobs, {multi['missed']} missed, mean ${multi['mean_usd']:.2f}, uniform progress in "
            f"the first ${multi['uniform_progress_in_the_first_zone_usd']:.2f}, optimum ${multi['optimum_usd']:.2f}: gap closed "
            f"{share(multi['gap_closed'])}"
        )
    for name, one in result["synthetic"]["by_setting"].items():
        print(
            f"known hazards, {name}: mean ${one['mean_usd']:.2f}, the exact optimum's policy on the same traces "
            f"${one['optimum_usd']:.2f} (expected ${one['optimum_expected_usd']:.2f}): ratio {one['over_optimum']:.4f} "
            f"(standard error {one['standard_error']:.4f})"
        )
    for name, value in result["speed"].items():
        print(f"{name}: {value:.0f}")


if __name__ == "__main__":
    main()
