"""The end of a run: what it cost, where anyone can see it."""

from __future__ import annotations

import base64
import json
import logging
from pathlib import Path
from typing import Any

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.blocks.core import Block

from holdfast.checkpoint.reader import read_metrics
from holdfast.errors import ConfigError, HoldfastError, TransientError
from holdfast.ledger.summary import summarise, to_markdown
from holdfast.ledger.timeline import draw_timeline
from holdfast.supervision.training_run import TrainingRun

log = logging.getLogger(__name__)

RUNS_FOLDER = Path(".holdfast/runs")
TABLE_COLUMNS = (
    "number",
    "cloud",
    "zone",
    "instance_type",
    "provisioning_model",
    "outcome",
    "first_step",
    "last_step",
    "last_committed_step",
    "lost_steps",
    "billed_seconds",
    "usd",
)


def publish_summary(run: TrainingRun, notify: str = "") -> dict[str, Any]:
    """summary.json, summary.md and timeline.png in the store and in the run's folder here, and Prefect's artifacts.

    A plain function: a flow that is being cancelled may start no task any more, and must publish all the same.
    """
    state = run.state
    summary = summarise(state)
    markdown = to_markdown(summary)
    picture = draw_timeline(state, _metrics(run), run.driver.clock.now())
    files = {
        "timeline.png": picture,
        "summary.md": markdown.encode(),
        "summary.json": json.dumps(summary, indent=2, allow_nan=False).encode(),
    }
    folder = RUNS_FOLDER.absolute() / run.run_id
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    # The folder here first: whatever fails below must not keep the summary from its reader.
    try:
        for name, data in files.items():
            run.store.put(f"runs/{run.run_id}/{name}", data)
    except TransientError as error:
        log.error("the summary is in %s, but the store did not take it: %s", folder, error)
    try:
        _publish_artifacts(run.run_id, summary, markdown, picture)
    except Exception as error:
        log.error("the summary is in %s, but Prefect did not take its artifacts: %r", folder, error)
    if notify:
        send_notification(notify, f"Holdfast run {run.run_id}: {state.state}", markdown)
    return summary


def _metrics(run: TrainingRun) -> dict[int, dict[str, float]]:
    try:
        return read_metrics(run.store, run.run_id)
    except HoldfastError as error:
        log.error("the picture lacks the loss: %s", error)
        return {}


def _publish_artifacts(run_id: str, summary: dict[str, Any], markdown: str, picture: bytes) -> None:
    image = "data:image/png;base64," + base64.b64encode(picture).decode()
    create_markdown_artifact(
        f"{markdown}\n\n![Machines as bars, the loss above them]({image})\n",
        key=f"cost-summary-{run_id}",
        description=f"What run {run_id} did and what it cost",
    )
    rows = [{name: attempt[name] for name in TABLE_COLUMNS} for attempt in summary["attempts"]]
    total = dict.fromkeys(TABLE_COLUMNS) | {
        "number": "total",
        "lost_steps": summary["lost_steps"],
        "billed_seconds": summary["billed_seconds"],
        "usd": summary["usd_total"],
    }
    create_table_artifact([*rows, total], key=f"attempts-{run_id}", description=f"Attempts of run {run_id}")
    create_image_artifact(image, key=f"timeline-{run_id}", description=f"Machines and loss of run {run_id}")


def load_notification(name: str) -> Block:
    """The notification block `type/name`. Raises ConfigError, so that a misspelt one is refused before any launch."""
    try:
        block = Block.load(name)
    except ValueError as error:
        raise ConfigError(
            f"notify: no block is called {name!r}; write it as type/name, for example slack-webhook/team"
        ) from error
    if not hasattr(block, "notify"):
        raise ConfigError(
            f"notify: block {name!r} can't notify; name a notification block, for example slack-webhook/team"
        )
    return block


def send_notification(name: str, subject: str, body: str) -> None:
    """A notification that can't be sent is logged; the run has ended well or badly all the same."""
    try:
        load_notification(name).notify(body, subject=subject)
    except Exception as error:
        log.warning("notification not sent block=%s error=%s", name, error)
