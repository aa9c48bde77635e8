"""`holdfast simulate JOB.yaml`: the study in a terminal, without a server where no block is named."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flows.server import prefect_server
from holdfast.drivers.protocol import Driver
from holdfast.model import load_job
from holdfast.storage import DirectoryStore, ObjectStore

LOCAL_STORE = Path(".holdfast")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "simulate", help="what a job will probably cost and when it ends: the policies on recorded markets"
    )
    parser.add_argument("job", type=Path, help="YAML file of a TrainingJob")
    parser.add_argument(
        "--trace", default="", help="a trace file, a folder of them, or 'history'; none: the market's rates"
    )
    parser.add_argument("--fitted", action="store_true", help="draw markets from a model fitted to the traces")
    parser.add_argument("--together", action="store_true", help="every trace is a pool of its own, all of them at once")
    parser.add_argument("--runs", type=int, default=500, help="of each policy (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="the same one again gives the same runs")
    parser.add_argument("--spot-usd", type=float, help="price of a spot hour, instead of the account's")
    parser.add_argument("--on-demand-usd", type=float, help="price of an on-demand hour, instead of the account's")
    parser.add_argument(
        "--account", action="append", help="name of an account block (default: the local cloud's prices)"
    )
    parser.add_argument("--store", default="", help="name of a checkpoint-store block (default: .holdfast)")
    parser.add_argument("--plot", type=Path, help="write the picture to this PNG file")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(command=simulate_command)


def simulate_command(options: argparse.Namespace) -> int:
    if options.account or options.store:
        with prefect_server():
            from blocks import load_driver, load_store

            driver = load_driver(options.account or ["local"])
            return _simulate(options, driver, load_store(options.store or "local").store())
    from holdfast.drivers.local import LocalCloudConfig, LocalDriver

    driver = LocalDriver(LocalCloudConfig(root=LOCAL_STORE / "clouds" / "local"))
    return _simulate(options, driver, DirectoryStore(LOCAL_STORE))


def _simulate(options: argparse.Namespace, driver: Driver, store: ObjectStore) -> int:
    from flows.simulate import picture, simulated

    job = load_job(options.job)
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=options.runs)
        told = simulated(
            job,
            driver,
            store,
            options.trace,
            options.runs,
            options.fitted,
            options.together,
            options.seed,
            (options.spot_usd, options.on_demand_usd),
            lambda runs: bar.update(task, completed=runs),
        )
    if options.plot:
        options.plot.write_bytes(picture(told))
    if options.json:
        print(json.dumps(told.to_json(), indent=2))
        return 0
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(told.to_markdown()))
    if options.plot:
        print(f"The picture:  {options.plot}")
    return 0
