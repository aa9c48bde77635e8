"""What a run did and what it cost, as numbers that add up and as text that a person believes."""

from __future__ import annotations

import math
from datetime import datetime
from statistics import median
from typing import Any

from holdfast.ledger.billing import add_usd, round_usd
from holdfast.ledger.egress import Place, egress_usd, place_of_store
from holdfast.ledger.run_state import Attempt, RunState


def summarise(state: RunState) -> dict[str, Any]:
    """The content of summary.json. Seconds are the cloud's; `usd_total` is exactly the sum over the attempts.

    `usd_on_demand_equivalent`: what the useful work alone would have cost on an on-demand machine of the same types:
    one start, and every step once, at the step times that were measured. No restart and no repeated step is counted
    in it, so the saving is not flattered by the interruptions it was bought with. `usd_egress_estimate`: moving checkpoints
    between regions and clouds, at list prices, beside the total.
    """
    store = place_of_store(state.store)
    attempts = [_attempt_row(attempt, store) for attempt in state.attempts]
    equivalent = _on_demand_equivalent(state)
    total = state.usd_total
    useful_seconds = sum(_useful_seconds(attempt) for attempt in state.attempts)
    recoveries = recovery_seconds(state.attempts)
    return {
        "run_id": state.run_id,
        "job": state.job.get("name"),
        "state": state.state,
        "detail": state.detail,
        "started_at": state.started_at.isoformat() if state.started_at else None,
        "closed_at": state.closed_at.isoformat() if state.closed_at else None,
        "clock_speed": state.clock_speed,
        "interruptions": state.interruptions,
        "refusals": sum(attempt.outcome in ("no-capacity", "quota") for attempt in state.attempts),
        "steps_total": max((attempt.last_step or 0 for attempt in state.attempts), default=0),
        "lost_steps": sum(row["lost_steps"] for row in attempts),
        "lost_seconds": round(sum(row["lost_seconds"] for row in attempts), 3),
        "lost_usd": add_usd(row["lost_usd"] for row in attempts),
        "usd_total": total,
        "usd_egress_estimate": add_usd(row["usd_egress_estimate"] for row in attempts),
        "usd_on_demand_equivalent": equivalent,
        "saving_usd": round_usd(equivalent - total),
        "saving_fraction": round(1 - total / equivalent, 4) if equivalent else None,
        "billed_seconds": round(state.billed_seconds, 3),
        "instance_hours": {
            model: round(sum(a.billed_seconds for a in state.attempts if a.pool.provisioning_model == model) / 3600, 4)
            for model in ("spot", "on-demand")
        },
        "recovery_seconds": [round(seconds, 3) for seconds in recoveries],
        "recovery_seconds_median": round(median(recoveries), 3) if recoveries else None,
        "checkpoints": _checkpoints(state),
        "goodput": round(useful_seconds / state.billed_seconds, 4) if state.billed_seconds else None,
        "orchestrator_recoveries": state.recoveries,
        "final_metrics": _finite(
            next((a.report["metrics"] for a in reversed(state.attempts) if a.report.get("metrics")), {})
        ),
        "deadline": _deadline(state),
        "warnings": state.warnings,
        "attempts": attempts,
    }


def _deadline(state: RunState) -> dict[str, Any] | None:
    """Of a run whose policy plans: the last decision, and whether its deadline was kept."""
    if not state.plan:
        return None
    at, ended = state.plan["deadline_at"], state.attempts[-1].terminated_at if state.attempts else None
    left = None
    if at and ended and state.state == "finished":
        left = round((datetime.fromisoformat(at) - ended).total_seconds(), 1)
    return {**state.plan, "changes": state.plans, "seconds_to_spare": left, "kept": None if left is None else left >= 0}


def plan_markdown(plan: dict[str, Any]) -> str:
    """The plan of a run under way: where it is, what is left, how much slack, and why the last decision was taken."""
    rows = {
        "decision": f"run on {plan['pool']}" if plan["pool"] else "wait",
        "why": plan["reason"],
        "policy": plan["policy"],
        "deadline": plan["deadline_at"] or "none",
        "work": "not known yet"
        if plan["work_seconds"] is None
        else f"{plan['work_seconds'] / 3600:.2f} h, {plan['done_seconds'] / max(plan['work_seconds'], 1e-9):.0%} committed "
        f"({plan['estimate']})",
        "slack": "–" if plan["slack_seconds"] is None else f"{plan['slack_seconds'] / 3600:.2f} h",
        "a restart costs": f"{plan['restart_seconds']:.0f} s",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def recovery_seconds(attempts: list[Attempt]) -> list[float]:
    """For each interruption that was recovered from: from the machine's end to the next new step."""
    found: list[float] = []
    for index, attempt in enumerate(attempts):
        if attempt.outcome not in ("preempted", "lost") or not attempt.terminated_at:
            continue
        later = (following.marks.get("first-step") for following in attempts[index + 1 :])
        if first := next((at for at in later if at), None):
            found.append((first - attempt.terminated_at).total_seconds())
    return found


def headline(summary: dict[str, Any]) -> str:
    """One sentence: state, steps, dollars, saving, interruptions."""
    if not summary["usd_on_demand_equivalent"]:
        saving = "no step was trained"
    elif summary["saving_fraction"] >= 0:
        saving = f"{summary['saving_fraction']:.0%} less than ${summary['usd_on_demand_equivalent']:.4f} on demand"
    else:
        saving = f"{-summary['saving_fraction']:.0%} more than ${summary['usd_on_demand_equivalent']:.4f} on demand"
    interruptions = f"{summary['interruptions']} interruption{'s' * (summary['interruptions'] != 1)}"
    lost = f"{summary['lost_steps']} of {summary['steps_total']} steps done again"
    return f"{summary['state'].capitalize()}: ${summary['usd_total']:.4f}, {saving}; {interruptions}, {lost}."


def to_markdown(summary: dict[str, Any]) -> str:
    """The cost summary for people: the verdict, the attempts with their total, and what else is worth knowing."""
    checkpoints = summary["checkpoints"]
    rows = [f"**{headline(summary)}**", ""]
    if summary["detail"]:
        rows += ["```", summary["detail"], "```", ""]
    rows += [
        "| # | pool | model | outcome | steps | committed | lost | billed s | $ |",
        "| ---: | --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in summary["attempts"]:
        steps = f"{row['first_step']}–{row['last_step']}" if row["first_step"] else "–"
        rows.append(
            f"| {row['number']} | {row['zone']} {row['instance_type']} | {row['provisioning_model']} | {row['outcome']} | "
            f"{steps} | {_or_dash(row['last_committed_step'])} | {row['lost_steps']} | {row['billed_seconds']:.1f} | "
            f"{row['usd']:.4f} |"
        )
    rows += [
        f"| | **total** | | | {summary['steps_total']} | | **{summary['lost_steps']}** | "
        f"{summary['billed_seconds']:.1f} | **{summary['usd_total']:.4f}** |",
        "",
        f"- Instance hours: {summary['instance_hours']['spot']:.3f} spot, "
        f"{summary['instance_hours']['on-demand']:.3f} on-demand",
        f"- Lost: {summary['lost_steps']} steps, {summary['lost_seconds']:.1f} s, ${summary['lost_usd']:.4f}",
        f"- Recovery: {_seconds(summary['recovery_seconds_median'])} median over "
        f"{len(summary['recovery_seconds'])} interruptions",
        f"- Checkpoints: {checkpoints['commits']}, {checkpoints['bytes_per_commit'] / 1e6:.1f} MB each, "
        f"{checkpoints['overhead_fraction']:.2%} of the training time",
        *_troubled_saves(summary["attempts"]),
        f"- Goodput: {_percent(summary['goodput'])} of the billed time trained steps that count",
    ]
    if deadline := summary["deadline"]:
        rows.append(_deadline_line(deadline))
    if summary["usd_egress_estimate"]:
        rows.append(
            f"- Egress of checkpoints to another region or cloud: about ${summary['usd_egress_estimate']:.4f}, an estimate "
            "at list prices that is not in the total"
        )
    if summary["clock_speed"] != 1:
        rows.append(
            f"- Clock: this cloud's ran {summary['clock_speed']:g} times as fast as the wall's; every second, hour and "
            "dollar here is the cloud's"
        )
    if summary["orchestrator_recoveries"]:
        rows.append(f"- The orchestrator died {summary['orchestrator_recoveries']} times and went on from the journal")
    rows += [f"- Warning: {text}" for text in summary["warnings"]]
    return "\n".join(rows)


def deadline_words(deadline: dict[str, Any]) -> str:
    """Of `deadline_at` and `seconds_to_spare`, which is None of a run that is not finished."""
    left = deadline["seconds_to_spare"]
    if left is None:
        how = "not finished"
    else:
        how = f"kept with {left / 60:.1f} min to spare" if left >= 0 else f"MISSED by {-left / 60:.1f} min"
    return f"Deadline {deadline['deadline_at']} {how}"


def _deadline_line(deadline: dict[str, Any]) -> str:
    policy = deadline["policy"]
    said = f"{deadline_words(deadline)}, policy {policy}" if deadline["deadline_at"] else f"Policy {policy}"
    return f"- {said}; {deadline['changes']} decisions, the last: {deadline['reason']}"


def _attempt_row(attempt: Attempt, store: Place) -> dict[str, Any]:
    lost_seconds = attempt.lost_steps * (attempt.step_seconds or 0.0)
    first = (attempt.resumed_step or 0) + 1 if attempt.trained_steps > 0 else None
    return {
        "number": attempt.number,
        "cloud": attempt.pool.cloud,
        "region": attempt.pool.region,
        "zone": attempt.pool.zone,
        "instance_type": attempt.pool.instance_type,
        "provisioning_model": attempt.pool.provisioning_model,
        "outcome": attempt.outcome,
        "detail": attempt.detail,
        "reason": attempt.reason,
        "machine": attempt.machine,
        "launched_at": attempt.launched_at.isoformat() if attempt.launched_at else None,
        "terminated_at": attempt.terminated_at.isoformat() if attempt.terminated_at else None,
        "billed_seconds": attempt.billed_seconds,
        "usd_per_hour": attempt.usd_per_hour,
        "usd": attempt.usd,
        "usd_egress_estimate": egress_usd(attempt, store),
        "first_step": first,
        "last_step": attempt.last_step,
        "last_committed_step": attempt.committed_step,
        "lost_steps": attempt.lost_steps,
        "lost_seconds": round(lost_seconds, 3),
        "lost_usd": round_usd(lost_seconds / 3600 * attempt.usd_per_hour),
        "notice": (attempt.report.get("notice") or {}).get("kind"),
        "commit_failures": attempt.report.get("commit_failures", 0),
        "late_commits": attempt.report.get("late_commits", 0),
    }


def _useful_seconds(attempt: Attempt) -> float:
    return max(0, attempt.trained_steps - attempt.lost_steps) * (attempt.step_seconds or 0.0)


def _on_demand_equivalent(state: RunState) -> float:
    usd = sum(_useful_seconds(attempt) * attempt.on_demand_usd_per_hour / 3600 for attempt in state.attempts)
    if not usd:  # a program that tells no steps: every billed second counts as useful
        usd = sum(a.billed_seconds * a.on_demand_usd_per_hour / 3600 for a in state.attempts)
        return round_usd(usd)
    for attempt in state.attempts:
        if attempt.launched_at and "resumed" in attempt.marks:
            start_seconds = max(0.0, (attempt.marks["resumed"] - attempt.launched_at).total_seconds())
            return round_usd(usd + start_seconds * attempt.on_demand_usd_per_hour / 3600)
    return round_usd(usd)


def _checkpoints(state: RunState) -> dict[str, Any]:
    commits = sum(attempt.report.get("commits", 0) for attempt in state.attempts)
    sizes = [attempt.report["bytes_per_commit"] for attempt in state.attempts if attempt.report.get("bytes_per_commit")]
    totals: dict[str, float] = {}
    for attempt in state.attempts:
        for name, seconds in attempt.report.get("totals", {}).items():
            totals[name] = totals.get(name, 0.0) + seconds
    training = sum(attempt.trained_steps * (attempt.step_seconds or 0.0) for attempt in state.attempts)
    return {
        "commits": commits,
        "commit_failures": sum(attempt.report.get("commit_failures", 0) for attempt in state.attempts),
        "late_commits": sum(attempt.report.get("late_commits", 0) for attempt in state.attempts),
        "bytes_per_commit": sizes[-1] if sizes else 0,
        "seconds": {name: round(seconds, 4) for name, seconds in sorted(totals.items())},
        "overhead_fraction": round(totals.get("stall_seconds", 0.0) / training, 5) if training else 0.0,
    }


def _troubled_saves(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kind of trouble that there was."""
    lines = []
    for name, words in (
        ("commit_failures", "Tries to make a checkpoint durable that failed"),
        ("late_commits", "Checkpoints that were not durable within their budget"),
    ):
        if total := sum(row[name] for row in rows):
            by_attempt = ", ".join(f"attempt {row['number']}: {row[name]}" for row in rows if row[name])
            lines.append(f"- {words}: {total} ({by_attempt})")
    return lines


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity: a loss that exploded is null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _or_dash(value: object) -> object:
    return "–" if value is None else value


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.0%}"
