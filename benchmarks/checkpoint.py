"""What a checkpoint costs and how soon it is durable: `python -m benchmarks.checkpoint` (`--quick`: local disk only).

A GPT of 100 M parameters trains with AdamW on one thread, so one core is free: 1.2 GB of state. The steps are real ones,
made about 2 ms and about 300 ms long by training fewer of the parameters or more tokens; on a CPU no step of 2 ms could
change a gigabyte, so a short one leaves most of the state as it is, and Holdfast's hook waits for the rest alone.
Saves by Holdfast, saves by `torch.distributed.checkpoint.async_save` (DCP) and stretches without a save follow each
other in one loop, next to one memcpy of the state and a direct write of as many bytes, round after round, in an order that
lets none always bear what another has left the disk to do. The loop's process keeps the memory it frees, as on a GPU: page
faults made long steps differ more from each other than a save costs. Holdfast is
used as a machine's program uses it: the environment, `holdfast.attach`, `run.steps`. Everything is timed from outside.
Shared memory has huge pages meanwhile, where this user may allow them, as it has on the clouds' machines.

| key | what |
| --- | --- |
| stall_over_memcpy | what the loop takes longer for a save, from the save until 0.1 s after it is durable, over one memcpy |
| limit_... | the same of a loop that waits for one memcpy, and a raw write by another process: nothing to resume |
| dcp_async_over_ours | the same of DCP over Holdfast's, which is taken for a tenth of a memcpy at least |
| persist_slowdown_percent | the median step after the one that waits for the copy, until the save is durable, over that without |
| durable_over_raw_write | from the save to durable, less one memcpy (`durable_from_save_...`: with it), over write and fsync |
| dcp_durable_over_ours | from the save to durable, DCP's over Holdfast's |
| upload_over_raw | the same in S3, over the fastest client's upload in parts; the loop sleeps meanwhile |
| upload_over_checksummed | the same over obstore's with a checksum that S3 verifies, as it does one of Holdfast's |
| upload_..._at_10_gbit | upload_over_raw where the server lets through no more than a link of 10 Gbit/s would |
| load_over_raw | attach() with a fresh model and optimizer over the read and one memcpy into a fresh state; no page cached |

A fresh optimizer's moments are memory that no one has touched, and the first touch takes longer than the copy;
`load_over_raw_into_warm_memory` has it over a memcpy into a state that was there. Where a figure has several cases (the
two lengths of a step, DCP's two ways of writing, disk and S3), a key is the case that is worst for Holdfast, and `cases`
has them all. Ratios are of medians. `--quick` is to be over in a minute: half the parameters, DCP's threads beside short
steps only, no `limit_...`, and on a slow disk fewer rounds (at least three); windows share the quiet steps between them then.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
CPU_PARAMETERS, CUDA_PARAMETERS = 100_000_000, 1_000_000_000
BYTES_PER_PARAMETER = 12  # itself and AdamW's two moments, four bytes each
QUICK_SHARE, QUICK_LOW_MEMORY_SHARE = 2, 8
"""With --quick: one parameter in so many, and of those one in so many for `low_memory`."""
COPIES_ON_DISK, COPIES_IN_MEMORY = 10, 11
LINK_BYTES_PER_SECOND = 1.25e9
"""10 Gbit/s, as cloud machines of a few cores have it; loopback has several times as much."""
DCP_KINDS = ("threads", "process")
QUICK_LOADS, QUICK_SECONDS = 3, 38.0
"""With --quick: after so many seconds, that many loads are enough, and one by DCP."""

TARGETS: dict[str, tuple[str, float]] = {
    "stall_over_memcpy": ("at most", 1.3),
    "dcp_async_over_ours": ("at least", 6.0),
    "persist_slowdown_percent": ("at most", 5.0),
    "durable_over_raw_write": ("at most", 1.3),
    "dcp_durable_over_ours": ("at least", 2.5),
    "upload_over_raw": ("at most", 1.15),
    "load_over_raw": ("at most", 1.3),
    "shared_memory_copies": ("at most", 2.02),
    "low_memory_shared_copies": ("at most", 1.02),
}
"""The header and what pads it come on top of the copies: 2 %."""


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="the local disk's rows only, in about a minute")
    options.add_argument("--rounds", type=int, default=9, help="how often each is measured (default 9)")
    options.add_argument(
        "--parameters", type=int, help="of the model (default 100 M, 1,000 M on a GPU; with --quick half)"
    )
    options.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: the temporary one's)")
    options.add_argument("--result", type=Path, default=RESULT, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.rounds < 1:
        options.error(f"--rounds is {given.rounds}; it must be at least 1")
    if given.parameters is not None and given.parameters < 100_000:
        options.error(f"--parameters is {given.parameters}; it must be at least 100000")
    if given.folder and not given.folder.is_dir():
        options.error(f"--folder {given.folder} is no folder")
    began = time.monotonic()
    result = measure(given.parameters, given.rounds, given.quick, given.folder)
    result |= {"seconds": round(time.monotonic() - began, 1)}
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    print(f"Written to {given.result}")


# -- measuring it -----------------------------------------------------------------------------------------------------


def measure(parameters: int | None, rounds: int, quick: bool, parent: Path | None) -> dict[str, Any]:
    began = time.monotonic()
    print("importing torch", flush=True)
    # Before anything is forked: each process would import them again. Nothing is computed here, so nothing is held.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a process that has asked CUDA itself can't be forked
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint

    from benchmarks.support import limits, phases

    cuda = torch.cuda.is_available()
    parameters = parameters or (CUDA_PARAMETERS if cuda else CPU_PARAMETERS) // (QUICK_SHARE if quick else 1)
    torch.set_num_threads(1)
    with workplace(parent, parameters * BYTES_PER_PARAMETER) as folder, limits.shared_huge_pages() as huge_pages:
        setting = phases.Setting(
            parameters=parameters,
            device="cuda" if cuda else "cpu",
            rounds=rounds,
            folder=folder,
            peers=DCP_KINDS,
            began=began,
        )
        trained, loaded = measure_local(setting, quick)
        # How many copies it holds does not depend on how large they are.
        small = replace(setting, parameters=parameters // QUICK_LOW_MEMORY_SHARE) if quick else setting
        low = run(small, "low_memory", "a save with low_memory")
        found: dict[str, Any] = {"train": trained, "load": loaded, "low_memory": low, "huge_pages": huge_pages}
        if not quick:
            found |= measure_s3(setting)
        return report(setting, found, quick)


def measure_local(setting: Any, quick: bool) -> tuple[dict[str, Any], list[dict[str, float]]]:
    from benchmarks.support.phases import SHORT

    hurried = {"peers": DCP_KINDS[:1], "peers_lengths": (SHORT,), "in_a_hurry": True} if quick else {}
    setting = replace(setting, **hurried)
    trained = run(setting, "train", "training, and saving to the local disk")
    return trained, measure_loads(setting, (setting.folder / "store").as_uri(), trained["dcp_path"], "")


def measure_s3(setting: Any) -> dict[str, Any]:
    from benchmarks.support import s3_clients

    with s3_clients.server() as endpoint:
        url = f"s3://{s3_clients.BUCKET}/holdfast?region={s3_clients.REGION}&endpoint={endpoint}"
        uploaded = run(setting, "upload", "uploads to an S3 server on loopback", endpoint, url)
        loaded = measure_loads(setting, url, "", endpoint)
    with s3_clients.server(LINK_BYTES_PER_SECOND) as endpoint:
        url = f"s3://{s3_clients.BUCKET}/holdfast?region={s3_clients.REGION}&endpoint={endpoint}"
        title = "uploads to an S3 server behind a link of 10 Gbit/s"
        over_link = run(setting, "upload", title, endpoint, url, s3_clients.FASTEST)
    return {"upload": uploaded, "load_s3": loaded, "upload_over_link": over_link}


def measure_loads(setting: Any, url: str, dcp_path: str, endpoint: str) -> list[dict[str, float]]:
    loaded: list[dict[str, float]] = []
    for number in range(1, setting.rounds + 1):
        if setting.in_a_hurry and number > 1:
            dcp_path = ""
            if number > QUICK_LOADS and time.monotonic() - setting.began > QUICK_SECONDS:
                break
        loaded.append(run(setting, "load", "" if number > 1 else "loads into fresh objects", url, dcp_path, endpoint))
        seconds = ", ".join(f"{name.replace('_', ' ')} {value:.3f} s" for name, value in loaded[-1].items())
        print(f"  round {number} of {setting.rounds}: {seconds}", flush=True)
    return loaded


def run(setting: Any, phase: str, title: str, *arguments: Any) -> Any:
    from benchmarks.support import phases
    from benchmarks.support.processes import in_a_process

    if title:
        print(title, flush=True)
    return in_a_process(setting.folder / "log.txt", getattr(phases, phase), setting, *arguments)


@contextmanager
def workplace(parent: Path | None, state_bytes: int) -> Iterator[Path]:
    """A folder with room for all of it; nothing of it is left afterwards."""
    import psutil

    parent = parent or Path(tempfile.gettempdir())
    rooms = (
        (f"free on the disk of {parent}", shutil.disk_usage(parent).free, COPIES_ON_DISK * state_bytes),
        ("of memory available", psutil.virtual_memory().available, COPIES_IN_MEMORY * state_bytes),
    )
    for what, free, needed in rooms:
        if free < needed:
            raise SystemExit(
                f"{free / 1e9:.1f} GB are {what}, and {needed / 1e9:.1f} GB are needed; free some, name another place with "
                "--folder, or measure less with --parameters"
            )
    with tempfile.TemporaryDirectory(prefix="holdfast-checkpoint-", dir=parent, ignore_cleanup_errors=True) as name:
        yield Path(name)


# -- what it means ----------------------------------------------------------------------------------------------------


def report(setting: Any, found: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    cases = cases_of(found)
    worst = {
        name: None if name not in cases else (max if TARGETS[name][0] == "at most" else min)(cases[name].values())
        for name in TARGETS
    }
    return {
        **worst,
        "targets": {name: f"{kind} {number:g}" for name, (kind, number) in TARGETS.items()},
        "cases": cases,
        "seconds_each": {
            "limits": rounded(found["train"]["limits"]),
            **{f"steps of {length}": rounded(values) for length, values in found["train"]["lengths"].items()},
            "load": rounded(columns(found["load"])),
            **({"upload": rounded(found["upload"]["values"])} if "upload" in found else {}),
            **(
                {"upload at 10 Gbit/s": rounded(found["upload_over_link"]["values"])}
                if "upload_over_link" in found
                else {}
            ),
            **({"load from S3": rounded(columns(found["load_s3"]))} if "load_s3" in found else {}),
        },
        "step_seconds": {length: round(value, 5) for length, value in found["train"]["step_seconds"].items()},
        "steps_between_saves": found["train"]["every_steps"],
        "bookkeeping_seconds_per_step": round(found["train"]["bookkeeping_seconds"], 7),
        "failed_commits": found["train"]["failed_commits"],
        "not_measured": not_measured(setting, found, quick),
        "quick": quick,
        "rounds": len(found["train"]["limits"]["raw_write"]),
        "parameters": setting.parameters,
        "device": setting.device,
        "huge_pages_in_shared_memory": found["huge_pages"],
        "state_bytes": found["train"]["state_bytes"],
        "checkpoint_bytes": found["train"]["checkpoint_bytes"],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            **{
                name: known
                for name in ("holdfast", "torch", "obstore", "boto3", "s3torchconnector")
                if (known := version_of(name))
            },
        },
    }


def cases_of(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Key -> case -> ratio."""
    from benchmarks.support.s3_clients import CHECKSUMMED, FASTEST

    cases: dict[str, dict[str, float]] = {}

    def put(key: str, case: str, value: float) -> None:
        cases.setdefault(key, {})[case] = round(value, 3)

    limits = {name: median(values) for name, values in found["train"]["limits"].items()}
    for length, values in found["train"]["lengths"].items():
        mid = limits | {name: median(some) for name, some in values.items()}
        put("stall_over_memcpy", length, mid["holdfast_extra"] / mid["memcpy"])
        put("persist_slowdown_percent", length, mid["holdfast_slow_down_percent"])
        if "limit_extra" in mid:
            put("limit_stall_over_memcpy", length, mid["limit_extra"] / mid["memcpy"])
            put("limit_persist_slowdown_percent", length, mid["limit_slow_down_percent"])
            put("limit_durable_over_raw_write", length, (mid["limit_durable"] - mid["memcpy"]) / mid["raw_write"])
        put("durable_over_raw_write", length, (mid["holdfast_durable"] - mid["memcpy"]) / mid["raw_write"])
        put("durable_from_save_over_raw_write", length, mid["holdfast_durable"] / mid["raw_write"])
        for kind in DCP_KINDS:
            if f"{kind}_extra" in mid:
                case = f"{length}, {kind}"
                # A copy hidden behind the forward pass costs nothing measurable: the ratio would be endless or negative.
                ours = max(mid["holdfast_extra"], 0.1 * mid["memcpy"])
                put("dcp_async_over_ours", case, mid[f"{kind}_extra"] / ours)
                put("dcp_durable_over_ours", case, mid[f"{kind}_durable"] / mid["holdfast_durable"])
                put("dcp_persist_slowdown_percent", case, mid[f"{kind}_slow_down_percent"])
    put("shared_memory_copies", "2 saves", found["train"]["shared_copies"])
    put("private_memory_copies", "2 saves", found["train"]["private_copies"])
    for case, key in (("local disk", "load"), ("S3", "load_s3")):
        if key in found:
            mid = {name: median(values) for name, values in columns(found[key]).items()}
            put("load_over_raw", case, mid["holdfast_load"] / (mid["raw_read"] + mid["first_memcpy"]))
            put("load_over_raw_into_warm_memory", case, mid["holdfast_load"] / (mid["raw_read"] + mid["memcpy"]))
            if "dcp_load" in mid:
                put("dcp_load_over_ours", case, mid["dcp_load"] / mid["holdfast_load"])
    if "upload" in found:
        mid = {name: median(values) for name, values in found["upload"]["values"].items()}
        clients = {name: value for name, value in mid.items() if name not in ("holdfast_durable", "memcpy")}
        fastest = min(clients, key=lambda name: clients[name])
        put("upload_over_raw", fastest, (mid["holdfast_durable"] - mid["memcpy"]) / clients[fastest])
        if CHECKSUMMED in clients:
            put(
                "upload_over_checksummed", CHECKSUMMED, (mid["holdfast_durable"] - mid["memcpy"]) / clients[CHECKSUMMED]
            )
        put("upload_from_save_over_raw", fastest, mid["holdfast_durable"] / clients[fastest])
        for name, value in clients.items():
            put("client_upload_over_fastest", name, value / clients[fastest])
    if "upload_over_link" in found:
        mid = {name: median(values) for name, values in found["upload_over_link"]["values"].items()}
        put("upload_over_raw_at_10_gbit", FASTEST, (mid["holdfast_durable"] - mid["memcpy"]) / mid[FASTEST])
        put("upload_from_save_over_raw_at_10_gbit", FASTEST, mid["holdfast_durable"] / mid[FASTEST])
    if "shared_copies" in found["low_memory"]:
        put("low_memory_shared_copies", "2 saves", found["low_memory"]["shared_copies"])
    return cases


def not_measured(setting: Any, found: Mapping[str, Any], quick: bool) -> list[str]:
    missing = []
    if quick:
        missing += ["S3, and the limits (--quick)", "DCP but for its threads, in steps of 2 ms (--quick)"]
    if setting.device == "cpu":
        missing.append("CUDA: no GPU here")
    if "missing" in found["low_memory"]:
        missing.append(f"low_memory: {found['low_memory']['missing']}")
    for name, why in found.get("upload", {}).get("missing", {}).items():
        missing.append(f"{name}: {why}")
    return missing


def columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows if name in row] for name in rows[0]}


def rounded(values: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 4) for value in one] for name, one in values.items()}


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{result['state_bytes'] / 1e9:.2f} GB of state on {result['device']}, {result['cores']} cores, "
        f"medians of {result['rounds']}",
        title_justify="left",
    )
    for name, justify in (
        ("figure", "left"),
        ("case", "left"),
        ("measured", "right"),
        ("target", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify)
    for key, cases in result["cases"].items():
        for case, value in cases.items():
            target, verdict, style = "", "", "dim"
            if key in TARGETS:
                kind, number = TARGETS[key]
                kept = value <= number if kind == "at most" else value >= number
                target, verdict, style = f"{kind} {number:g}", "" if kept else "MISSED", "" if kept else "bold red"
            table.add_row(key, case, f"{value:.2f}", target, verdict, style=style)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for line in result["not_measured"]:
        print(f"not measured: {line}")


if __name__ == "__main__":
    main()
