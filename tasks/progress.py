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


class Publisher:
    """Calls of Prefect's API in a thread: a server that is slow or away holds up no supervision.

    A locked database alone makes Prefect's server answer a minute late. Of each artifact only the newest waits.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def publish(self, what: str, call: Callable[[], object]) -> None:
        context = contextvars.copy_context()  # so that the artifact belongs to this flow run
        with self._lock:
            self._waiting[what] = lambda: context.run(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="holdfast-publisher", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                what = next(iter(self._waiting))
                call = self._waiting.pop(what)
            try:
                call()
            except Exception as error:
                log.warning("%s not shown error=%r", what, error)


class ProgressArtifact:
    """A bar in Prefect's UI, moved now and then."""

    def __init__(self, publisher: Publisher, run_id: str, description: str) -> None:
        self._publisher, self._key, self._description = publisher, f"progress-{run_id}", description
        self._id: UUID | None = None
        self._next = 0.0

    def show(self, percent: float, words: str = "") -> None:
        """`words`: to be read below the bar, after the description."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PROGRESS_SECONDS
            self._publisher.publish("progress", lambda: self._write(percent, words))

    def _write(self, percent: float, words: str) -> None:
        description = f"{self._description}: {words}" if words else self._description
        try:
            if self._id is None:
                self._id = create_progress_artifact(progress=percent, key=self._key, description=description)  # type: ignore[assignment]
            else:
                update_progress_artifact(self._id, progress=percent, description=description)
        except Exception:
            self._next = time.monotonic() + PAUSE_AFTER_ERROR_SECONDS
            raise


class PrefectWatcher:
    """Publishes updates for one flow run."""

    def __init__(self, run_id: str, job_name: str) -> None:
        self._run_id, self._job_name = run_id, job_name
        self._log = get_run_logger()
        self._publisher = Publisher()
        self._progress = ProgressArtifact(self._publisher, run_id, f"Steps of run {run_id}")

    def __call__(self, update: Update) -> None:
        if update.kind == "progress":
            total, step = update.fields.get("total_steps"), update.fields.get("step")
            if total and step:
                self._progress.show(100.0 * step / total)
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
        """The newest version of one artifact; the earlier ones are its history."""
        markdown, key, words = plan_markdown(update.fields["plan"]), f"plan-{self._run_id}", update.text[:500]
        self._publisher.publish("plan", lambda: create_markdown_artifact(markdown, key=key, description=words))
