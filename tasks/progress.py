"""What happens while an attempt lives, told to Prefect: log lines, events, a progress bar."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.states import State, StateType

from holdfast.ledger.run_state import Attempt
from holdfast.ledger.summary import plan_markdown
from holdfast.supervision.training_run import TrainingRun
from holdfast.supervision.updates import Update

Watcher = Callable[[Update], None]

EVENTS = {
    "launched": "holdfast.machine.launched",
    "refused": "holdfast.machine.refused",
    "notice": "holdfast.machine.notice",
    "preempted": "holdfast.machine.preempted",
    "ended": "holdfast.machine.ended",
    "resumed": "holdfast.run.resumed",
    "committed": "holdfast.run.committed",
    "fallback": "holdfast.run.fallback",
    "waiting": "holdfast.run.waiting",
    "formed": "holdfast.gang.formed",
    "dissolved": "holdfast.gang.dissolved",
    "registered": "holdfast.replica.registered",
    "deregistered": "holdfast.replica.deregistered",
    "planned": "holdfast.run.planned",
    "warned": "holdfast.run.warned",
}
PROGRESS_SECONDS = 2.0
PAUSE_AFTER_ERROR_SECONDS = 120.0

log = logging.getLogger(__name__)


@task(cache_policy=NO_CACHE)
def watch_machine(run: TrainingRun, attempt: Attempt, watchers: list[Watcher]) -> Attempt | State:
    """The attempt's row in the UI: one machine, from its launch (or refusal) to its outcome, which is the row's state."""
    for update in run.supervise() if attempt.outcome is None else [run.ended_update()]:
        for watcher in watchers:
            watcher(update)
    ended = run.state.attempts[-1]
    if ended.outcome == "finished":
        return ended
    # Not FAILED: a preemption is a normal ending. The state's name says which one it was.
    kind = StateType.FAILED if ended.outcome == "program-failed" else StateType.COMPLETED
    return State(type=kind, name=str(ended.outcome).capitalize(), message=ended.detail[:2000])


class PrefectWatcher:
    """Publishes updates for one flow run."""

    def __init__(self, run_id: str, job_name: str) -> None:
        self._run_id, self._job_name = run_id, job_name
        self._log = get_run_logger()
        self._progress: UUID | None = None
        self._next_progress = 0.0
        self._plan_thread: threading.Thread | None = None

    def __call__(self, update: Update) -> None:
        if update.kind == "progress":
            try:
                self._show_progress(update)
            except Exception as error:  # a server that is away must not hold up the supervision
                self._next_progress = time.monotonic() + PAUSE_AFTER_ERROR_SECONDS
                log.warning("progress not shown error=%r", error)
            return
        self._log.info("attempt %s: %s", update.attempt, update.text)
        if update.kind == "planned":
            self._show_plan(update)
        self.emit(EVENTS[update.kind], update.fields.get("machine") or "", {"text": update.text, **update.fields})

    def emit(self, event: str, machine: str, payload: dict[str, Any]) -> None:
        """One Prefect event about the run, or about one of its machines."""
        run = {
            "prefect.resource.id": f"holdfast.run.{self._run_id}",
            "prefect.resource.name": self._run_id,
            "holdfast.job": self._job_name,
        }
        related = [{**run, "prefect.resource.role": "run"}]
        if context := FlowRunContext.get():
            flow_run = context.flow_run
            if flow_run:
                related.append(
                    {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}
                )
        resource = {"prefect.resource.id": f"holdfast.machine.{machine}"} if machine else run
        emit_event(event, resource=resource, related=related, payload=payload)

    def _show_plan(self, update: Update) -> None:
        """The newest version of one artifact; the earlier ones are its history. A slow server holds up no decision."""
        if self._plan_thread and self._plan_thread.is_alive():
            return
        context = contextvars.copy_context()
        self._plan_thread = threading.Thread(
            target=lambda: context.run(self._publish_plan, plan_markdown(update.fields["plan"]), update.text),
            daemon=True,
        )
        self._plan_thread.start()

    def _publish_plan(self, markdown: str, words: str) -> None:
        try:
            create_markdown_artifact(markdown, key=f"plan-{self._run_id}", description=words[:500])
        except Exception as error:
            log.warning("plan not shown error=%r", error)

    def _show_progress(self, update: Update) -> None:
        total, step = update.fields.get("total_steps"), update.fields.get("step")
        if not total or not step or time.monotonic() < self._next_progress:
            return
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        percent = 100.0 * step / total
        if self._progress is None:
            self._progress = create_progress_artifact(  # type: ignore[assignment]
                progress=percent, key=f"progress-{self._run_id}", description=f"Steps of run {self._run_id}"
            )
        else:
            update_progress_artifact(self._progress, progress=percent)
