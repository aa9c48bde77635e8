"""What a serving run did and what it cost: a fleet's summary, and how much of the time how many replicas served."""

from __future__ import annotations

import dataclasses
from collections import Counter
from datetime import datetime
from itertools import pairwise
from typing import Any

from holdfast.ledger.fleet_summary import fleet_to_markdown, summarise_fleet
from holdfast.serving.state import ServeState


def summarise_serving(state: ServeState, now: datetime) -> dict[str, Any]:
    """The content of summary.json. Seconds are the cloud's, from the first replica's registration until the run is to end."""
    as_fleet = {**state.job, "kind": "maintained", "machines": state.job.get("replicas")}
    summary = summarise_fleet(dataclasses.replace(state, job=as_fleet))
    stays = [stay for of_machine in state.services.values() for stay in of_machine]
    end = state.leaves_off_at or state.closed_at or now
    changes = {stay.since for stay in stays} | {stay.until for stay in stays if stay.until}
    times = sorted({min(at, end) for at in changes} | {end} if changes else ())
    seconds: Counter[int] = Counter()
    for begin, until in pairwise(times):
        count = sum(stay.since <= begin and (stay.until or end) >= until for stay in stays)
        seconds[count] += (until - begin).total_seconds()  # type: ignore[assignment]
    total, wanted = sum(seconds.values()), summary["machines_wanted"] or 0
    below = sum(value for count, value in seconds.items() if count < wanted)
    return {
        **summary,
        "kind": "serving",
        "registrations": len(stays),
        "deregistered": dict(Counter(stay.why.partition(":")[0] for stay in stays if stay.until)),
        "retired": len(state.retiring),
        "seconds_served": round(total - seconds[0], 3),
        "seconds_without_a_replica": round(seconds[0], 3),
        "seconds_below_target": round(below, 3),
        "share_at_target": round(1 - below / total, 4) if total else None,
    }


def serve_headline(summary: dict[str, Any]) -> str:
    """One sentence: state, replicas, dollars, saving, interruptions, availability."""
    taken, equivalent, fraction = (
        summary["interruptions"],
        summary["usd_on_demand_equivalent"],
        summary["saving_fraction"],
    )
    saving = "no machine was billed"
    if equivalent:
        saving = f"{abs(fraction):.0%} {'less' if fraction >= 0 else 'more'} than ${equivalent:.4f} on demand"
    return (
        f"{summary['state'].capitalize()}: {summary['machines_wanted']} replicas wanted, {summary['registrations']} "
        f"registered, ${summary['usd_total']:.4f}, {saving}; {taken} interruption{'s' * (taken != 1)}, "
        f"{summary['seconds_without_a_replica']:.0f} s without a replica."
    )


def serve_to_markdown(summary: dict[str, Any]) -> str:
    share = summary["share_at_target"]
    lines = [
        "",
        f"- All replicas there: {f'{share:.2%}' if share is not None else '-'} of the time since the first served; below "
        f"target for {summary['seconds_below_target']:.0f} s, without any for {summary['seconds_without_a_replica']:.0f} s",
        f"- Left the load balancer: {', '.join(f'{number} {why}' for why, number in summary['deregistered'].items()) or 'none'}",
    ]
    return fleet_to_markdown(summary, serve_headline(summary)) + "\n".join(lines) + "\n"
