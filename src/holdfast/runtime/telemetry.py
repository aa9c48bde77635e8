"""What the program says of itself, condensed into what the orchestrator reads."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

RECENT_EVENTS = 40


class Telemetry:
    """Follows the program's telemetry file. `report` is one JSON object, small however long the run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_EVENTS)
        self.events_total = 0
        self.attached = False
        self._late_step: int | None = None
        self.report: dict[str, Any] = {
            "phase": "starting",
            "step": None,
            "total_steps": None,
            "metrics": {},
            "resumed_step": None,
            "first_step_at": None,
            "last_step_at": None,
            "committed_step": None,
            "commits": 0,
            "bytes_per_commit": 0,
            "totals": {},
            "longest": {},
            "marks": {},
            "damaged": [],
            "commit_failures": 0,
            "late_commits": 0,
            "not_durable_step": None,
        }

    def add(self, event: dict[str, Any]) -> None:
        """Take in one event, the program's or the agent's own."""
        kind = event["kind"]
        report = self.report
        match kind:
            case "progress":
                report.update(phase="training", step=event["step"], metrics=event.get("metrics") or {})
                report.update(total_steps=event.get("total_steps"), last_step_at=event["at"])
                return
            case "attached":
                self.attached = True
                report["phase"] = "attached"
            case "resumed":
                report.update(phase="resumed", resumed_step=event["step"])
                if event["step"]:
                    report["committed_step"] = event["step"]
            case "first-step":
                report["phase"] = "training"
            case "committed":
                report.update(committed_step=event["step"], commits=report["commits"] + 1)
                report.update(bytes_per_commit=event.get("bytes", 0), not_durable_step=None)
                for name, value in event.items():
                    if name.endswith("_seconds"):
                        report["totals"][name] = report["totals"].get(name, 0.0) + value
                        report["longest"][name] = max(report["longest"].get(name, 0.0), value)
            case "commit-failed":
                report.update(commit_failures=report["commit_failures"] + 1, not_durable_step=event["step"])
            case "commit-late":
                if event["step"] == self._late_step:
                    return  # told at every further try; it is one save
                self._late_step = event["step"]
                report.update(late_commits=report["late_commits"] + 1, not_durable_step=event["step"])
            case "damaged":
                report["damaged"].append({"checkpoint": event["checkpoint"], "error": event["error"]})
            case "finished":
                report.update(phase="finished", step=event["step"], metrics=event.get("metrics") or report["metrics"])
                report["last_step_at"] = event.get("last_step_at") or report["last_step_at"]
            case "preempting":
                report.update(phase="stopping", step=event["step"])
                report["last_step_at"] = event.get("last_step_at") or report["last_step_at"]
        report["marks"].setdefault(kind, event["at"])
        self.events_total += 1
        self._recent.append({**event, "number": self.events_total})

    def read(self) -> bool:
        """Take in what the program has written since; True when there was an event worth telling at once."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return False
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        before = self.events_total
        for line in whole.splitlines():
            try:
                self.add(json.loads(line))
            except (ValueError, KeyError, TypeError):  # the program may write here too: skip what is no event
                continue
        return self.events_total > before

    def to_json(self) -> dict[str, Any]:
        return {**self.report, "events": list(self._recent), "events_total": self.events_total}
