"""The run as a picture: machines as bars over time, the loss above them. Needs matplotlib (extra `flows`)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from holdfast.ledger.run_state import Attempt, RunState

COLOURS = {"spot": "#2a9d8f", "on-demand": "#e9a23b"}
LOST_COLOUR, REFUSED_COLOUR, BOOT_COLOUR, LOSS_COLOUR = "#d1495b", "#8d99ae", "#cfd8dc", "#264653"
MOST_POINTS = 2000


def draw_timeline(state: RunState, metrics: Mapping[int, Mapping[str, float]], now: datetime) -> bytes:
    """A PNG. `metrics`: step -> {name: value}; the first metric with 'loss' in its name is drawn, else the first."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    started = state.started_at or now
    unit, seconds_per_unit = ("min", 60.0) if (now - started) < timedelta(hours=5) else ("h", 3600.0)

    def x(at: datetime) -> float:
        return (at - started).total_seconds() / seconds_per_unit

    figure = Figure(figsize=(10, 2.9 + 0.32 * max(3, len(state.attempts))), dpi=110, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1 + 0.16 * len(state.attempts)])
    _draw_loss(upper, state, metrics, x, now)
    for row, attempt in enumerate(state.attempts):
        _draw_machine(lower, row, attempt, x, now)
    lower.set_xlim(right=lower.get_xlim()[1] * 1.1)  # room for the last bar's words
    lower.set_yticks(range(len(state.attempts)), [_label(attempt) for attempt in state.attempts], fontsize=8)
    lower.set_ylim(len(state.attempts) - 0.4, -0.6)
    faster = f" (clock {state.clock_speed:g}x)" if state.clock_speed != 1 else ""
    lower.set_xlabel(f"cloud {unit} since the start{faster}")
    lower.grid(axis="x", alpha=0.25)
    lower.legend(
        handles=[
            Patch(color=COLOURS["spot"], label="spot"),
            Patch(color=COLOURS["on-demand"], label="on-demand"),
            Patch(color=BOOT_COLOUR, label="start of machine and program"),
            Patch(color=LOST_COLOUR, label="lost work"),
        ],
        fontsize=7,
        loc="lower left",
        framealpha=0.9,
    )
    usd = f"${state.usd_total:.4f}"
    upper.set_title(
        f"{state.run_id}: {state.state}, {state.interruptions} interruptions, {usd}", fontsize=10, loc="left"
    )
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_machine(axes: Any, row: int, attempt: Attempt, x: Any, now: datetime) -> None:
    if attempt.launched_at is None:
        at = x(attempt.detected_at or attempt.reserved_at)
        axes.plot([at], [row], marker="x", color=REFUSED_COLOUR, markersize=8, markeredgewidth=2)
        axes.annotate(f"   {attempt.outcome}", (at, row), fontsize=7, va="center", color=REFUSED_COLOUR)
        return
    end = attempt.terminated_at or now
    first_step = attempt.marks.get("first-step")
    trains_from = min(first_step, end) if first_step else end
    axes.barh(row, x(trains_from) - x(attempt.launched_at), left=x(attempt.launched_at), height=0.6, color=BOOT_COLOUR)
    colour = COLOURS[attempt.pool.provisioning_model]
    axes.barh(row, x(end) - x(trains_from), left=x(trains_from), height=0.6, color=colour)
    if attempt.lost_steps and attempt.trained_steps and first_step:
        lost = (end - trains_from) * (attempt.lost_steps / attempt.trained_steps)
        axes.barh(row, x(end) - x(end - lost), left=x(end - lost), height=0.6, color=LOST_COLOUR)
    axes.annotate(f" {attempt.outcome or 'running'}  ${attempt.usd:.4f}", (x(end), row), fontsize=7, va="center")


def _draw_loss(axes: Any, state: RunState, metrics: Mapping[int, Mapping[str, float]], x: Any, now: datetime) -> None:
    name = _loss_name(metrics)
    axes.set_ylabel(name or "loss")
    axes.grid(alpha=0.25)
    if not name:
        axes.annotate("the program reported no metrics", (0.02, 0.5), xycoords="axes fraction", fontsize=8)
        return
    for attempt in state.attempts:
        first, steps = attempt.marks.get("first-step"), attempt.trained_steps
        if not first or steps <= 0 or attempt.last_step is None:
            continue
        end = attempt.marks.get("finished") or attempt.marks.get("preempting") or attempt.terminated_at or now
        start_step = (attempt.resumed_step or 0) + 1
        wanted = range(start_step, attempt.last_step + 1, max(1, steps // MOST_POINTS))
        known = [step for step in wanted if name in metrics.get(step, {})]
        pace = (end - first) / max(1, steps - 1)
        times = [x(first + pace * (step - start_step)) for step in known]
        axes.plot(times, [metrics[step][name] for step in known], color=LOSS_COLOUR, linewidth=1)
        if attempt.outcome in ("preempted", "lost") and attempt.terminated_at:
            axes.axvline(x(attempt.terminated_at), color=LOST_COLOUR, linewidth=0.8, linestyle=":")


def _loss_name(metrics: Mapping[int, Mapping[str, float]]) -> str:
    names = sorted({name for values in metrics.values() for name in values})
    return next((name for name in names if "loss" in name), names[0] if names else "")


def _label(attempt: Attempt) -> str:
    return f"{attempt.number}  {attempt.pool.zone}  {attempt.pool.instance_type}"
