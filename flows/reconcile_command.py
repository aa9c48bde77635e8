"""`holdfast reconcile`: the ledger against the provider's own bill."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from flows.server import prefect_server


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("reconcile", help="the ledger against the provider's own bill, run by run")
    parser.add_argument("--account", required=True, help="name of an AWS or GCP account block")
    parser.add_argument("--store", required=True, help="name of a checkpoint-store block")
    parser.add_argument("--bill", default="cost-explorer", help="cost-explorer (default), s3://..., or bigquery://...")
    parser.add_argument("--days", type=int, default=14, help="whole days, the last two left out (default 14)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(command=reconcile_command)


def reconcile_command(options: argparse.Namespace) -> int:
    """0: no difference beyond the tolerance. 1: there is one."""
    with prefect_server():
        from flows.reconcile import reconcile

        state = reconcile(options.account, options.store, options.bill, options.days, return_state=True)
        told = state.result(raise_on_failure=False)
    if isinstance(told, Exception):
        raise told
    if options.json:
        print(json.dumps(told, indent=2))
        return 1 if state.is_failed() else 0
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(told["markdown"]))
    return 1 if state.is_failed() else 0
