"""`holdfast offers`: where a job would run, and what it would cost there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.server import prefect_server
from holdfast.errors import ConfigError
from holdfast.market.catalogue import fitting, parse_gpus, read_catalogue
from holdfast.market.plots import draw_offers
from holdfast.market.table import Row, cells
from holdfast.model import load_any_job


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "offers", help="the pools that fit a job: prices, interruptions, expected dollars; launches nothing"
    )
    parser.add_argument("job", type=Path, nargs="?", help="YAML file of a job of any kind")
    parser.add_argument(
        "--gpus", metavar="A100:8", help="without a job or an account: which machine types have these, by list prices"
    )
    parser.add_argument("--traces", type=Path, help="a spot trace, or a folder of them, as further evidence")
    parser.add_argument("--records-per-second", type=float, help="of one machine: prices a million records")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the table, and spot prices of the last days"
    )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.set_defaults(command=offers_command)
    return parser


def offers_command(options: argparse.Namespace) -> int:
    if options.gpus:
        return catalogue_command(options)
    if not options.job:
        raise ConfigError("offers: name a job's YAML file, or --gpus such as A100:8")
    job = load_any_job(options.job)
    with prefect_server():
        from blocks import load_driver, load_store
        from tasks.market import Wanted, find_offers, price_histories

        driver = load_driver(options.account or ["local"])
        wanted = Wanted(
            resources=job.resources,
            job=job.name,
            traces=options.traces,
            records_per_second=options.records_per_second,
        )
        rows = find_offers(driver, load_store(options.store).store(), wanted)
        if options.plot:
            options.plot.write_bytes(draw_offers(rows, price_histories(driver, rows)))
    show(rows, options)
    return 0


def show(rows: Sequence[Row], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = cells(rows)
    for name in shown[0]:
        table.add_column(name, overflow="fold", justify="right" if "$" in name or name == "#" else "left")
    for one in shown:
        table.add_row(*one.values())
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(f"[bold]{rows[0].why}[/]\n")
    console.print(table)
    if options.plot:
        print(f"\nThe picture:  {options.plot}")


def catalogue_command(options: argparse.Namespace) -> int:
    found = fitting(read_catalogue(), parse_gpus(options.gpus))
    if not found:
        raise ConfigError(
            f"gpus {options.gpus!r}: the catalogue knows no such machine; make a newer one: python -m holdfast.market.catalogue"
        )
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=2, default=str))
        return 0
    from rich.console import Console
    from rich.table import Table

    dated = min(one.as_of for one in found)
    table = Table(title=f"List prices on demand, of {dated}; what spot costs, an account tells", title_justify="left")
    for name in ("cloud", "region", "type", "vCPUs", "GiB", "GPUs", "GPU GiB", "$/h"):
        table.add_column(name)
    for one in found:
        gpus = f"{one.gpus} {one.gpu_name}"
        numbers = (one.vcpus, f"{one.memory_gib:g}", gpus, f"{one.gpu_memory_gib:g}", f"{one.usd_per_hour:.4f}")
        table.add_row(one.cloud, one.region, one.instance_type, *map(str, numbers))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0
