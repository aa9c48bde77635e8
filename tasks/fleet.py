"""Fleets: machines asked for in rounds, watched together; told to Prefect as log lines, events and artifacts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from holdfast.errors import TransientError
from holdfast.ledger.batch_summary import batch_progress
from holdfast.ledger.fleet_state import Round
from holdfast.placement.fleet_policy import LaunchRound
from holdfast.placement.policy import GiveUp, Wait
from holdfast.supervision.fleet_run import FleetRun
from holdfast.supervision.updates import Update
from tasks.costs import RUNS_FOLDER, send_notification
from tasks.placement import API_RETRIES
from tasks.progress import EVENTS, PrefectWatcher, ProgressArtifact, Publisher, Watcher

log = logging.getLogger(__name__)

TABLE_COLUMNS = ("machine", "round", "zone", "instance_type", "provisioning_model", "outcome", "billed_seconds", "usd")


@task(cache_policy=NO_CACHE, **API_RETRIES)
def choose_round(run: FleetRun) -> LaunchRound | Wait | GiveUp | None:
    return run.decide()


@task(cache_policy=NO_CACHE, **API_RETRIES)
def reserve_round(run: FleetRun, launch: LaunchRound) -> Round:
    return run.reserve(launch)


@task(cache_policy=NO_CACHE, **API_RETRIES)
def launch_round(run: FleetRun) -> Round:
    return run.launch()


@task(cache_policy=NO_CACHE)
def watch_members(run: FleetRun, watchers: list[Watcher], until: datetime | None = None) -> None:
    """Until there is something to decide."""
    for update in run.supervise(until):
        for watcher in watchers:
            watcher(update)


@task(cache_policy=NO_CACHE, **API_RETRIES)
def settle_fleet(run: FleetRun) -> None:
    run.settle()


class FleetWatcher:
    """Publishes updates for one flow run: an event for every machine, a log line for all of them."""

    def __init__(self, run_id: str, job_name: str) -> None:
        self._run_id = run_id
        self._log = get_run_logger()
        self._events = PrefectWatcher(run_id, job_name)
        self._progress = ProgressArtifact(Publisher(), run_id, f"Progress of {run_id}")

    def __call__(self, update: Update) -> None:
        if update.kind == "progress":
            words = batch_progress(update.fields) if update.fields.get("batches") else ""
            self._progress.show(100.0 * fraction_done(update), words)
            return
        self._log.info("round %s: %s", update.attempt, update.text)
        fields = {name: value for name, value in update.fields.items() if name != "machines"}
        machines: dict[str, str] = update.fields.get("machines", {})
        for machine, pool in machines.items():
            payload = {**fields, "text": update.text, "machine": machine, "pool": pool}
            self._events.emit(EVENTS[update.kind], machine, payload)
        if not machines:
            self._events.emit(EVENTS[update.kind], "", {**fields, "text": update.text})


def fraction_done(update: Update) -> float:
    """Of a batch job's batches, a gang's steps, a server's replicas, or a fleet's machines."""
    if batches := update.fields.get("batches"):
        return update.fields["batches_done"] / batches
    if total := update.fields.get("total_steps"):
        return min(1.0, (update.fields["step"] or 0) / total)
    counts = update.fields["counts"]
    return min(1.0, counts.get("serving", counts["finished"]) / update.fields["wanted"])


def publish_fleet_summary(run: FleetRun, notify: str = "") -> dict[str, Any]:
    """summary.json and summary.md in the store and in the run's folder here, and Prefect's artifacts.

    A plain function: a flow that is being cancelled may start no task any more, and must publish all the same.
    """
    summary = run.summarise()
    markdown = run.to_markdown(summary)
    files = {"summary.md": markdown.encode(), "summary.json": json.dumps(summary, indent=2, allow_nan=False).encode()}
    folder = RUNS_FOLDER.absolute() / run.run_id
    folder.mkdir(parents=True, exist_ok=True)
    # The folder here first: whatever fails below must not keep the summary from its reader.
    for name, data in files.items():
        (folder / name).write_bytes(data)
    _attempt("the store", folder, lambda: _store(run, files), TransientError)
    _attempt("Prefect", folder, lambda: _publish_artifacts(run.run_id, summary, markdown), Exception)
    if notify:
        send_notification(notify, f"Holdfast fleet {run.run_id}: {run.state.state}", markdown)
    return summary


def _attempt(who: str, folder: Any, publish: Callable[[], None], forgiven: type[Exception]) -> None:
    try:
        publish()
    except forgiven as error:
        log.error("the summary is in %s, but %s did not take it: %r", folder, who, error)


def _store(run: FleetRun, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        run.store.put(f"runs/{run.run_id}/{name}", data)


def _publish_artifacts(run_id: str, summary: dict[str, Any], markdown: str) -> None:
    create_markdown_artifact(
        markdown, key=f"cost-summary-{run_id}", description=f"What fleet {run_id} did and what it cost"
    )
    rows = [{name: member[name] for name in TABLE_COLUMNS} for member in summary["members"]]
    total = dict.fromkeys(TABLE_COLUMNS) | {
        "machine": "total",
        "billed_seconds": summary["billed_seconds"],
        "usd": summary["usd_total"],
    }
    create_table_artifact([*rows, total], key=f"members-{run_id}", description=f"Machines of fleet {run_id}")
