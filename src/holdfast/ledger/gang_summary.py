"""What a gang's run did and what it cost: a fleet's summary, and the formations that did the work."""

from __future__ import annotations

from typing import Any

from holdfast.ledger.billing import round_usd
from holdfast.ledger.fleet_summary import fleet_to_markdown, summarise_fleet
from holdfast.ledger.gang_state import Formation, GangState


def summarise_gang(state: GangState) -> dict[str, Any]:
    """The content of summary.json.

    `usd_on_demand_equivalent`: what its members would have cost on demand for as long as formations trained that were not
    trained again: boots, waits and lost steps are not in it.
    """
    fleet = summarise_fleet(state)
    equivalent = round_usd(sum(_usd_on_demand(state, formation) for formation in state.formations))
    last = state.newest
    total = fleet["usd_total"]
    return {
        **fleet,
        "kind": "gang",
        "min_machines": state.job.get("min_machines"),
        "steps_total": (last.report.get("step") or 0) if last else 0,
        "lost_steps": sum(_lost_steps(state, one) for one in state.formations),
        "usd_on_demand_equivalent": equivalent,
        "saving_usd": round_usd(equivalent - total),
        "saving_fraction": round(1 - total / equivalent, 4) if equivalent else None,
        "final_metrics": last.report.get("metrics", {}) if last else {},
        "formations": [_row(state, formation) for formation in state.formations],
    }


def gang_headline(summary: dict[str, Any]) -> str:
    """One sentence: state, steps, machines, dollars, saving, interruptions."""
    equivalent, fraction = summary["usd_on_demand_equivalent"], summary["saving_fraction"]
    if not equivalent:
        saving = "nothing was trained"
    else:
        saving = f"{abs(fraction):.0%} {'less' if fraction >= 0 else 'more'} than ${equivalent:.4f} on demand"
    taken, formations = summary["interruptions"], len(summary["formations"])
    steps = f"{summary['steps_total']} steps on " if summary["steps_total"] else ""
    return (
        f"{summary['state'].capitalize()}: {steps}{summary['machines_wanted']} machines, ${summary['usd_total']:.4f}, "
        f"{saving}; {taken} interruption{'s' * (taken != 1)}, {formations} formation{'s' * (formations != 1)}, "
        f"{summary['lost_steps']} steps trained again."
    )


def gang_to_markdown(summary: dict[str, Any]) -> str:
    """A fleet's, with the formations above the members."""
    text = fleet_to_markdown(summary, gang_headline(summary))
    before, members = text.split("\n\n| machine |", 1)
    rows = [
        "| formation | machines | seconds | steps | committed | ended because |",
        "| ---: | ---: | ---: | --- | ---: | --- |",
    ]
    for one in summary["formations"]:
        steps = f"{one['first_step']}–{one['last_step']}" if one["last_step"] else "–"
        rows.append(
            f"| {one['number']} | {len(one['members'])} | {one['seconds']:.1f} | {steps} | "
            f"{one['committed_step'] or '–'} | {one['why'] or 'finished'} |"
        )
    return "\n".join([before, "", *rows, "", f"| machine |{members}"])


def _row(state: GangState, one: Formation) -> dict[str, Any]:
    report = one.report
    resumed, last = report.get("resumed_step"), report.get("step")
    return {
        "number": one.number,
        "members": one.members,
        "host": one.host,
        "formed_at": one.formed_at.isoformat(),
        "over_at": one.over_at.isoformat() if one.over_at else None,
        "seconds": round(_seconds(state, one), 3),
        "gracious": one.gracious,
        "why": one.why,
        "first_step": resumed + 1 if resumed is not None and last else None,
        "last_step": last,
        "committed_step": report.get("committed_step"),
        "lost_steps": _lost_steps(state, one),
    }


def _seconds(state: GangState, one: Formation) -> float:
    """Until it was over; the last one until its last member was."""
    ends = [state.members[name].terminated_at for name in one.members if name in state.members]
    until = one.over_at or max((end for end in ends if end), default=one.formed_at)
    return max(0.0, (until - one.formed_at).total_seconds())


def _lost_steps(state: GangState, one: Formation) -> int:
    """Trained in it, and trained again in the next one that said where it began."""
    last = one.report.get("step")
    if last is None:
        return 0
    for later in state.formations[one.number :]:
        if (resumed := later.report.get("resumed_step")) is not None:
            return max(0, last - resumed)
    return 0


def _usd_on_demand(state: GangState, one: Formation) -> float:
    last, resumed = one.report.get("step"), one.report.get("resumed_step") or 0
    trained = (last or 0) - resumed
    kept = 1 - _lost_steps(state, one) / trained if trained > 0 else float(last is None and state.state == "finished")
    hourly = sum(state.members[name].priced.on_demand_usd_per_hour for name in one.members if name in state.members)
    return max(0.0, kept) * _seconds(state, one) / 3600 * hourly
