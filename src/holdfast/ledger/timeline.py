"""The run as a picture: machines as bars over time, the loss above them. Needs matplotlib (extra `flows`)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from holdfast.ledger.run_state import INTERRUPTIONS, Attempt, RunState

COLOURS = {"spot": "#2a9d8f", "on-demand": "#e9a23b"}
LOST_COLOUR, REFUSED_COLOUR, BOOT_COLOUR, LOSS_COLOUR = "#d1495b", "#8d99ae", "#cfd8dc", "#264653"
MOST_POINTS = 2000
LOSS_INCHES, REST_INCHES = 2.1, 1.4
ROW_INCHES, DENSE_ROW_INCHES, DENSE_ROWS = 0.32, 0.19, 16


def draw_timeline(state: RunState, metrics: Mapping[int, Mapping[str, float]], now: datetime) -> bytes:
    """A PNG. `metrics`: step -> {name: value}; the first metric with 'loss' in its name is drawn, else the first."""
    from matplotlib.figure import Figure

    started = state.started_at or now
    unit, seconds_per_unit = _unit((state.closed_at or now) - started)

    def x(at: datetime) -> float:
        return (at - started).total_seconds() / seconds_per_unit

    rows = len(state.attempts)
    dense = rows > DENSE_ROWS
    machines_inches = (DENSE_ROW_INCHES if dense else ROW_INCHES) * max(3, rows)
    figure = Figure(figsize=(10, LOSS_INCHES + machines_inches + REST_INCHES), dpi=110, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[LOSS_INCHES, machines_inches + 0.2])
    _draw_loss(upper, state, metrics, x, now)
    for row, attempt in enumerate(state.attempts):
        _draw_machine(lower, row, attempt, x, now)
        if attempt.outcome in INTERRUPTIONS and attempt.terminated_at:
            upper.axvline(x(attempt.terminated_at), color=LOST_COLOUR, linewidth=0.8, linestyle=":", zorder=0)
    lower.set_xlim(0, lower.get_xlim()[1] * 1.14)  # room for the last bar's words
    labels = [_label(attempt) for attempt in state.attempts]
    lower.set_yticks(range(rows), labels, fontsize=6.5 if dense else 8)
    lower.set_ylim(max(3, rows) - 0.4, -0.6)
    faster = f", on the cloud's clock ({state.clock_speed:g} times the wall's)" if state.clock_speed != 1 else ""
    lower.set_xlabel(f"{unit} since the start{faster}")
    lower.grid(axis="x", alpha=0.25)
    lower.set_axisbelow(True)
    # Below the axes: inside them, it would hide a bar of some run.
    figure.legend(handles=_legend(state), fontsize=7.5, loc="outside lower center", ncols=6, frameon=False)
    interruptions = f"{state.interruptions} interruption{'s' * (state.interruptions != 1)}"
    title = f"{state.run_id}: {state.state}, {interruptions}, ${state.usd_total:.4f}"
    upper.set_title(title, fontsize=10, loc="left")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _unit(length: timedelta) -> tuple[str, float]:
    if length < timedelta(minutes=3):
        return "seconds", 1.0
    return ("minutes", 60.0) if length < timedelta(hours=5) else ("hours", 3600.0)


def _legend(state: RunState) -> list[Any]:
    """Only what the picture shows."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    models = {attempt.pool.provisioning_model for attempt in state.attempts if attempt.launched_at}
    handles: list[Any] = [Patch(color=colour, label=model) for model, colour in COLOURS.items() if model in models]
    handles.append(Patch(color=BOOT_COLOUR, label="start of machine and program"))
    if any(attempt.lost_steps for attempt in state.attempts):
        handles.append(Patch(color=LOST_COLOUR, label="lost work, done again"))
    if state.interruptions:
        handles.append(Line2D([], [], color=LOST_COLOUR, linewidth=0.8, linestyle=":", label="interruption"))
    if any(attempt.launched_at is None for attempt in state.attempts):
        handles.append(_cross([], [], label="refused"))
    return handles


def _cross(xs: list[float], ys: list[float], **more: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(xs, ys, linestyle="", marker="x", color=REFUSED_COLOUR, markersize=6, markeredgewidth=2, **more)


def _draw_machine(axes: Any, row: int, attempt: Attempt, x: Any, now: datetime) -> None:
    if attempt.launched_at is None:
        at = x(attempt.detected_at or attempt.reserved_at)
        axes.add_line(_cross([at], [row]))
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


def _loss_name(metrics: Mapping[int, Mapping[str, float]]) -> str:
    names = sorted({name for values in metrics.values() for name in values})
    return next((name for name in names if "loss" in name), names[0] if names else "")


def _label(attempt: Attempt) -> str:
    return f"{attempt.number}  {attempt.pool.zone}  {attempt.pool.instance_type}"
