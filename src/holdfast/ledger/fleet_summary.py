"""What a fleet's run did and what it cost, as numbers that add up and as text that a person believes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from holdfast.ledger.billing import add_usd, round_usd
from holdfast.ledger.fleet_state import TAKEN, FleetState, Member, Round

MODELS = ("spot", "on-demand")
SHOWN_MEMBERS = 40


def summarise_fleet(state: FleetState) -> dict[str, Any]:
    """The content of summary.json. Seconds are the cloud's; `usd_total` is exactly the sum over the members.

    `usd_on_demand_equivalent`: what the same work would have cost on demand. Of an instant fleet only members that
    finished count, of a maintained one every second that was billed: no time that was lost flatters the saving.
    """
    members = list(state.members.values())
    total, equivalent = state.usd_total, _on_demand_equivalent(state)
    seconds = {model: sum(one.billed_seconds for one in members if one.model == model) for model in MODELS}
    launched = Counter(one.model for one in members)
    return {
        "run_id": state.run_id,
        "job": state.job.get("name"),
        "kind": state.job.get("kind"),
        "state": state.state,
        "detail": state.detail,
        "started_at": state.started_at.isoformat() if state.started_at else None,
        "closed_at": state.closed_at.isoformat() if state.closed_at else None,
        "clock_speed": state.clock_speed,
        "machines_wanted": state.job.get("machines"),
        "spot_share_wanted": state.job.get("spot_share"),
        "machines_launched": len(members),
        "outcomes": {
            model: dict(sorted(Counter(str(one.outcome) for one in members if one.model == model).items()))
            for model in MODELS
        },
        "finished": len(state.ended("finished")),
        "interruptions": len(state.ended(*TAKEN)),
        "refusals": sum(one.refusal in ("no-capacity", "quota") for one in state.rounds),
        "spot_share_of_machines": _share(launched["spot"], launched.total()),
        "spot_share_of_hours": _share(seconds["spot"], sum(seconds.values())),
        "seconds_to_all_launched": _seconds_to_all_launched(state),
        "billed_seconds": round(state.billed_seconds, 3),
        "machine_hours": {model: round(seconds[model] / 3600, 4) for model in MODELS},
        "usd_total": total,
        "usd_on_demand_equivalent": equivalent,
        "saving_usd": round_usd(equivalent - total),
        "saving_fraction": round(1 - total / equivalent, 4) if equivalent else None,
        "orchestrator_recoveries": state.recoveries,
        "fallbacks": [reason for _, reason in state.fallbacks],
        "warnings": state.warnings,
        "rounds": [_round_row(one) for one in state.rounds],
        "members": [_member_row(one) for one in members],
    }


def fleet_headline(summary: dict[str, Any]) -> str:
    """One sentence: state, machines, dollars, saving, interruptions."""
    equivalent, fraction = summary["usd_on_demand_equivalent"], summary["saving_fraction"]
    if not equivalent:
        saving = "no machine finished"
    else:
        saving = f"{abs(fraction):.0%} {'less' if fraction >= 0 else 'more'} than ${equivalent:.4f} on demand"
    wanted = summary["machines_wanted"]
    done = (
        f"{summary['finished']} of {wanted} machines finished" if summary["kind"] == "instant" else f"{wanted} machines"
    )
    taken = summary["interruptions"]
    return (
        f"{summary['state'].capitalize()}: {done}, ${summary['usd_total']:.4f}, {saving}; "
        f"{taken} interruption{'s' * (taken != 1)}."
    )


def fleet_to_markdown(summary: dict[str, Any], headline: str = "") -> str:
    """The cost summary for people: the verdict, machines by outcome and model, the rounds, and the members."""
    rows = [f"**{headline or fleet_headline(summary)}**", ""]
    if summary["detail"]:
        rows += ["```", summary["detail"], "```", ""]
    outcomes = sorted({outcome for of_model in summary["outcomes"].values() for outcome in of_model})
    rows += [
        f"| model | {' | '.join(outcomes)} | machines | hours | $ |",
        f"| --- |{' ---: |' * (len(outcomes) + 3)}",
    ]
    usd = {
        model: add_usd(one["usd"] for one in summary["members"] if one["provisioning_model"] == model)
        for model in MODELS
    }
    for model in MODELS:
        of_model = summary["outcomes"][model]
        counts = " | ".join(str(of_model.get(outcome, 0)) for outcome in outcomes)
        hours = summary["machine_hours"][model]
        rows.append(f"| {model} | {counts} | {sum(of_model.values())} | {hours:.3f} | {usd[model]:.4f} |")
    totals = " | ".join(str(sum(of.get(outcome, 0) for of in summary["outcomes"].values())) for outcome in outcomes)
    rows += [
        f"| **total** | {totals} | {summary['machines_launched']} | {sum(summary['machine_hours'].values()):.3f} | "
        f"**{summary['usd_total']:.4f}** |",
        "",
        f"- Spot share: {_percent(summary['spot_share_wanted'])} wanted, {_percent(summary['spot_share_of_machines'])} of "
        f"the machines, {_percent(summary['spot_share_of_hours'])} of the hours",
        f"- From the request to all machines launched: {_seconds(summary['seconds_to_all_launched'])}",
        f"- Rounds: {len(summary['rounds'])}, of which {summary['refusals']} were refused",
    ]
    rows += [f"- Fell back to on-demand: {reason}" for reason in summary["fallbacks"]]
    if summary["clock_speed"] != 1:
        rows.append(
            f"- Clock: this cloud's ran {summary['clock_speed']:g} times as fast as the wall's; every second, hour and "
            "dollar here is the cloud's"
        )
    if summary["orchestrator_recoveries"]:
        rows.append(f"- The orchestrator died {summary['orchestrator_recoveries']} times and went on from the journal")
    rows += [f"- Warning: {text}" for text in summary["warnings"]]
    rows += [
        "",
        "| machine | round | pool | model | outcome | billed s | $ |",
        "| --- | ---: | --- | --- | --- | ---: | ---: |",
    ]
    for one in summary["members"][:SHOWN_MEMBERS]:
        rows.append(
            f"| {one['machine']} | {one['round']} | {one['zone']} {one['instance_type']} | {one['provisioning_model']} | "
            f"{one['outcome']} | {one['billed_seconds']:.1f} | {one['usd']:.4f} |"
        )
    if (more := len(summary["members"]) - SHOWN_MEMBERS) > 0:
        rows.append(f"\n{more} more are in summary.json.")
    return "\n".join(rows)


def _on_demand_equivalent(state: FleetState) -> float:
    counted = state.members.values() if state.job.get("kind") == "maintained" else state.ended("finished")
    return round_usd(sum(one.billed_seconds / 3600 * one.priced.on_demand_usd_per_hour for one in counted))


def _seconds_to_all_launched(state: FleetState) -> float | None:
    """From the first question to the answer that filled the last place; None when it never was."""
    launched = 0
    for one in state.rounds:
        launched += len(one.members)
        if one.answered_at and launched >= state.job["machines"]:
            return round((one.answered_at - state.rounds[0].asked_at).total_seconds(), 3)
    return None


def _round_row(one: Round) -> dict[str, Any]:
    return {
        "number": one.number,
        "cloud": one.cloud,
        "region": one.region,
        "pools": [str(priced.pool) for priced in one.pools],
        "spot": one.spot,
        "on_demand": one.on_demand,
        "launched": len(one.members),
        "refusal": one.refusal,
        "detail": one.detail,
        "reason": one.reason,
        "asked_at": one.asked_at.isoformat(),
    }


def _member_row(one: Member) -> dict[str, Any]:
    return {
        "machine": one.machine,
        "round": one.round,
        "cloud": one.pool.cloud,
        "region": one.pool.region,
        "zone": one.pool.zone,
        "instance_type": one.pool.instance_type,
        "provisioning_model": one.model,
        "outcome": one.outcome,
        "detail": one.detail,
        "launched_at": one.launched_at.isoformat(),
        "terminated_at": one.terminated_at.isoformat() if one.terminated_at else None,
        "billed_seconds": one.billed_seconds,
        "usd_per_hour": one.priced.usd_per_hour,
        "usd": one.usd,
    }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.0%}"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f} s"
