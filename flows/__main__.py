"""Holdfast's command line: `python -m flows --help`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows import DISPLAY_VARIABLE, checkpoints, offers, reconcile_command, simulate_command
from flows.server import QUIET, prefect_server
from holdfast.errors import ConfigError, HoldfastError
from holdfast.model import (
    Job,
    load_any_job,
    load_batch_job,
    load_fleet_job,
    load_gang_job,
    load_job,
    load_serve_job,
)

UI_PORT = 4200
DEMO_JOB = Path("examples/demo.yaml")
BATCH_DEMO_JOB = Path("examples/embed.yaml")


def main(arguments: list[str] | None = None) -> int:
    """0: done. 1: the run failed, or the rehearsal's verdict is bad. 2: refused before anything was launched."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault(DISPLAY_VARIABLE, "1")
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    try:
        return options.command(options)
    except ConfigError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    except HoldfastError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the machines are terminated, the run can be taken up again by its run id", file=sys.stderr)
        return 130


def train_command(options: argparse.Namespace) -> int:
    job = load_job(options.job)
    with prefect_server():
        from flows.train import train

        return carry_out(train, job, options)


def calibrate_command(options: argparse.Namespace) -> int:
    job = load_job(options.job)
    with prefect_server():
        from rich.console import Console
        from rich.markdown import Markdown

        from flows.calibrate import calibrate

        accounts = accounts_of(options)
        told = calibrate(job, options.steps, options.trace, accounts, options.store, options.budget, options.run_id)
        Console(width=None if sys.stdout.isatty() else 120).print(Markdown(told["markdown"]))
    return 0


def fleet_command(options: argparse.Namespace) -> int:
    job = load_fleet_job(options.job)
    with prefect_server():
        from flows.fleet import fleet

        return carry_out(fleet, job, options)


def gang_command(options: argparse.Namespace) -> int:
    job = load_gang_job(options.job)
    with prefect_server():
        from flows.gang import gang

        return carry_out(gang, job, options)


def batch_command(options: argparse.Namespace) -> int:
    job = load_batch_job(options.job)
    with prefect_server():
        from flows.batch_inference import batch_inference

        return carry_out(batch_inference, job, options)


def serve_command(options: argparse.Namespace) -> int:
    job = load_serve_job(options.job)
    with prefect_server():
        from flows.serve import serve

        return carry_out(serve, job, options)


def carry_out(flow: Callable[..., dict[str, Any]], job: Job, options: argparse.Namespace) -> int:
    summary = flow(
        job,
        account=accounts_of(options),
        store=options.store,
        budget=options.budget,
        run_id=options.run_id,
        notify=options.notify,
    )
    _show(summary)
    return 0


def demo_command(options: argparse.Namespace) -> int:
    print("Starting a Prefect server on loopback; then one training run on the local cloud, whose market takes its")
    print("machine away again and again. Its clock runs fast: seconds and dollars are the cloud's.\n", flush=True)
    job = load_job(options.job)
    with prefect_server():
        from blocks.accounts import LocalAccount
        from flows.demo import DEMO_ACCOUNT, demo_account
        from flows.train import train

        LocalAccount.register_type_and_schema()
        demo_account(options.seed).save(DEMO_ACCOUNT, overwrite=True)  # a cloud of its own for every demonstration
        summary = train(job, account=DEMO_ACCOUNT)
        _show(summary)
    return 0


def batch_demo_command(options: argparse.Namespace) -> int:
    print("Starting a Prefect server on loopback; then a real embedding model over every document that Python brings,")
    print(
        "on machines of the local cloud, whose market takes some of them away, with and without notice.\n", flush=True
    )
    job = load_batch_job(options.job)
    with prefect_server():
        from blocks.accounts import LocalAccount
        from flows.batch_inference import batch_inference
        from flows.demo import BATCH_DEMO_ACCOUNT, BATCH_DEMO_CHANGES, batch_demo_account, write_documents

        path, number = write_documents(options.documents)
        job = job.model_copy(update={"inputs": [str(path)], **BATCH_DEMO_CHANGES})
        LocalAccount.register_type_and_schema()
        batch_demo_account(options.seed, number).save(BATCH_DEMO_ACCOUNT, overwrite=True)
        _show(batch_inference(job, account=BATCH_DEMO_ACCOUNT))
    return 0


def rehearse_command(options: argparse.Namespace) -> int:
    job = load_job(options.job)
    with prefect_server():
        from flows.rehearse import rehearse

        verdict = rehearse(job, preemptions=options.preemptions)
        print(verdict["markdown"])
    return 0 if verdict["passed"] else 1


def reap_command(options: argparse.Namespace) -> int:
    with prefect_server():
        from flows.reap_orphans import reap_orphans

        reaped = sum(reap_orphans(account, options.store) for account in accounts_of(options))
        print(f"{reaped} orphaned machines terminated")
    return 0


def doctor_command(options: argparse.Namespace) -> int:
    job = load_any_job(options.job) if options.job else None
    with prefect_server():
        from blocks import driver_of, load_account, load_store
        from holdfast.supervision.doctor import examine, to_text

        store = load_store(options.store)
        accounts = [load_account(name) for name in accounts_of(options)]
        findings = list(examine(store.store, lambda: driver_of(accounts), job))
        print(to_text(findings))
    return 0 if all(finding.ok for finding in findings) else 1


def accounts_of(options: argparse.Namespace) -> list[str]:
    return options.account or ["local"]


def ui_command(options: argparse.Namespace) -> int:
    os.environ.pop("PREFECT_API_URL", None)
    with prefect_server(options.port) as url:
        print(f"The Prefect UI with the last runs: {url}/runs    (Ctrl-C stops it)", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


def _show(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    folder = Path(".holdfast/runs") / summary["run_id"]
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown((folder / "summary.md").read_text()))
    print(f"\nThe run's folder:  {folder}  (summary.json, journal, logs, checkpoints)")
    if (folder / "timeline.png").exists():
        print(f"The timeline:      {folder / 'timeline.png'}")
    print("The Prefect UI:    make ui")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a job to its end, on spot machines")
    train.add_argument("job", type=Path, help="YAML file of a TrainingJob")
    train.set_defaults(command=train_command)
    calibrate = commands.add_parser(
        "calibrate", help="one machine, a few hundred steps; then the full run is simulated from what they tell"
    )
    calibrate.add_argument("job", type=Path, help="YAML file of a TrainingJob")
    calibrate.add_argument("--steps", type=int, default=300, help="so many are trained (default 300)")
    calibrate.add_argument("--trace", default="", help="what the full run is simulated on, as of simulate")
    calibrate.add_argument("--budget", default="", help="name of a spending-budget block")
    calibrate.add_argument("--run-id", default="", help="name of the run, which a training may go on with")
    calibrate.set_defaults(command=calibrate_command)
    fleet = commands.add_parser("fleet", help="run a job on many machines at once, a share of them spot")
    fleet.add_argument("job", type=Path, help="YAML file of a FleetJob")
    fleet.set_defaults(command=fleet_command)
    gang = commands.add_parser(
        "gang", help="train one job on many machines at once, with fewer while some are replaced"
    )
    gang.add_argument("job", type=Path, help="YAML file of a GangJob")
    gang.set_defaults(command=gang_command)
    batch = commands.add_parser("batch", help="apply a function to every record of a data set, on a fleet")
    batch.add_argument("job", type=Path, help="YAML file of a BatchJob")
    batch.set_defaults(command=batch_command)
    serve = commands.add_parser("serve", help="keep a model server up behind haproxy, on spot machines")
    serve.add_argument("job", type=Path, help="YAML file of a ServeJob")
    serve.set_defaults(command=serve_command)
    for command in (train, fleet, gang, batch, serve):
        command.add_argument("--budget", default="", help="name of a spending-budget block")
        command.add_argument(
            "--run-id", default="", help="go on with the run of that name, or give a new one this name"
        )
        command.add_argument("--notify", default="", help="notification block, as type/name")

    rehearse = commands.add_parser("rehearse", help="run a job on the local cloud with preemptions, and judge it")
    rehearse.add_argument("job", type=Path, help="YAML file of a TrainingJob")
    rehearse.add_argument("--preemptions", type=int, default=3, help="how many, of all kinds in turn (default 3)")
    rehearse.set_defaults(command=rehearse_command)

    reap = commands.add_parser("reap", help="terminate machines that no live run owns")
    reap.set_defaults(command=reap_command)
    doctor = commands.add_parser("doctor", help="what works, what is missing, what an hour costs; launches nothing")
    doctor.add_argument(
        "job", type=Path, nargs="?", help="YAML file of a job of any kind, to see its pools and its cost"
    )
    doctor.set_defaults(command=doctor_command)
    offers_parser = offers.add_parser(commands)
    for command in (train, calibrate, fleet, gang, batch, serve, reap, doctor, offers_parser):
        command.add_argument(
            "--account",
            action="append",
            help="name of an account block (default: the local cloud); give it again for several clouds",
        )
        command.add_argument("--store", default="local", help="name of a checkpoint-store block (default: .holdfast)")

    checkpoints.add_parser(commands)
    reconcile_command.add_parser(commands)
    simulate_command.add_parser(commands)

    demo = commands.add_parser("demo", help="the main job on the local cloud, preempted again and again")
    demo.add_argument("--seed", type=int, default=1, help="seed of the demonstration's market (default 1)")
    demo.add_argument("--job", type=Path, default=DEMO_JOB, help=argparse.SUPPRESS)
    demo.set_defaults(command=demo_command)

    batch_demo = commands.add_parser("demo-batch", help="batch inference on the local cloud, with preemptions")
    batch_demo.add_argument("--seed", type=int, default=1, help="seed of the demonstration's market (default 1)")
    batch_demo.add_argument("--documents", type=int, help="only so many (default: all that there are)")
    batch_demo.add_argument("--job", type=Path, default=BATCH_DEMO_JOB, help=argparse.SUPPRESS)
    batch_demo.set_defaults(command=batch_demo_command)

    ui = commands.add_parser("ui", help="the Prefect UI, with the last runs in it")
    ui.add_argument("--port", type=int, default=UI_PORT, help=f"default {UI_PORT}")
    ui.set_defaults(command=ui_command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
