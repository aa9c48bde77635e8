"""What a batch job's run did and what it cost: a fleet's summary, and what became of every record."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from holdfast.ledger.batch_state import BatchState
from holdfast.ledger.billing import round_usd
from holdfast.ledger.fleet_state import Member
from holdfast.ledger.fleet_summary import fleet_to_markdown, summarise_fleet
from holdfast.ledger.summary import deadline_words


def summarise_batch(
    state: BatchState, store_url: str, prefix: str, batches_done: int, deadline_at: datetime | None
) -> dict[str, Any]:
    """The content of summary.json.

    `usd_on_demand_equivalent`: what the same work would have cost on demand. Machines of the first round that lived to the
    end count whole; of all others only the seconds in which their workers were busy: neither the boots of replacements nor
    what was lost flatters the saving. Records are None until they were counted.
    """
    fleet = summarise_fleet(state)
    audit, total = state.audit, fleet["usd_total"]
    busy: dict[str, float] = audit.get("busy_seconds", {})
    equivalent = round_usd(
        sum(
            _useful_seconds(one, busy, state) / 3600 * one.priced.on_demand_usd_per_hour
            for one in state.members.values()
        )
    )
    records = audit.get("records_in")
    seconds = (state.closed_at - state.started_at).total_seconds() if state.closed_at and state.started_at else None
    place = f"{store_url.partition('?')[0].rstrip('/')}/{prefix}"
    return {
        **fleet,
        "kind": "batch",
        "records_in": records,
        "records_out": audit.get("records_out"),
        "records_failed": audit.get("records_failed"),
        "missing": audit.get("missing"),
        "duplicates": audit.get("duplicates"),
        "batches": state.plan.get("batches"),
        "batches_done": state.plan["batches"] if audit.get("whole") else batches_done,
        "batches_put_again": state.put_again,
        "batches_given_up": state.given_up,
        "deadline": _deadline(state, deadline_at),
        "results": place,
        "dead_letters": f"{place}/failed.jsonl" if audit.get("records_failed") else None,
        "usd_per_million_records": _per_million(total, records),
        "usd_on_demand_equivalent": equivalent,
        "usd_on_demand_per_million_records": _per_million(equivalent, records),
        "saving_usd": round_usd(equivalent - total),
        "saving_fraction": round(1 - total / equivalent, 4) if equivalent else None,
        "records_per_second": round(records * state.clock_speed / seconds, 3) if records and seconds else None,
    }


def _deadline(state: BatchState, deadline_at: datetime | None) -> dict[str, Any] | None:
    """`kept` is None while it is not known."""
    if deadline_at is None:
        return None
    left = (deadline_at - state.closed_at).total_seconds() if state.state == "finished" and state.closed_at else None
    return {
        "deadline_at": deadline_at.isoformat(),
        "kept": None if left is None else left >= 0,
        "seconds_to_spare": None if left is None else round(left, 1),
    }


def _useful_seconds(member: Member, busy: dict[str, float], state: BatchState) -> float:
    if member.round == 1 and member.outcome == "finished":
        return member.billed_seconds
    return min(busy.get(member.machine, 0.0) * state.clock_speed, member.billed_seconds)


def _per_million(usd: float, records: int | None) -> float | None:
    return round_usd(usd * 1e6 / records) if records else None


def batch_progress(fields: dict[str, Any]) -> str:
    """Of an update's fields: records, their rate, machines by what became of them, dollars, and how long the rest takes."""
    records = f"{fields['records_done']:,}"
    total = f" of {fields['records']:,}" if fields["records"] else ""
    rate = f", {fields['records_per_second']:,.0f}/s" if fields["records_per_second"] else ""
    machines = ", ".join(f"{number} {name}" for name, number in fields["counts"].items() if number)
    eta = fields["eta_seconds"]
    left = "" if eta is None else f"  {timedelta(seconds=round(eta))} left"
    return f"{records}{total} records{rate}  {machines or 'no machine yet'}  ${fields['usd']:.4f}{left}"


def batch_headline(summary: dict[str, Any]) -> str:
    """One sentence: state, records, dollars, saving, interruptions."""
    if summary["records_in"] is None:
        done = f"{summary['batches_done']} of {summary['batches'] or 'an unknown number of'} batches done"
    else:
        done = (
            f"{summary['records_in']} records in, {summary['records_out']} out, {summary['records_failed']} failed, "
            f"{summary['missing']} missing, {summary['duplicates']} duplicates"
        )
    cost = f"${summary['usd_total']:.4f}"
    if summary["usd_per_million_records"] is not None:
        cost += f" (${summary['usd_per_million_records']:.2f} per million)"
    equivalent, fraction = summary["usd_on_demand_equivalent"], summary["saving_fraction"]
    if equivalent:
        cost += f", {abs(fraction):.0%} {'less' if fraction >= 0 else 'more'} than ${equivalent:.4f} on demand"
    taken = summary["interruptions"]
    return f"{summary['state'].capitalize()}: {done}; {cost}; {taken} interruption{'s' * (taken != 1)}."


def batch_to_markdown(summary: dict[str, Any]) -> str:
    """A fleet's text, and a table of the records in front of it."""
    rows = [f"**{batch_headline(summary)}**", ""]
    if summary["records_in"] is not None:
        rows += [
            "| records in | out | failed | missing | duplicates | $ per million | on demand |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            f"| {summary['records_in']} | {summary['records_out']} | {summary['records_failed']} | {summary['missing']} | "
            f"{summary['duplicates']} | {_usd(summary['usd_per_million_records'])} | "
            f"{_usd(summary['usd_on_demand_per_million_records'])} |",
            "",
            f"- Results: `{summary['results']}`",
        ]
        if summary["records_failed"]:
            rows.append(f"- Failed records and their errors: `{summary['dead_letters']}`")
    if deadline := summary["deadline"]:
        rows.append(f"- {deadline_words(deadline)}")
    if summary["batches_put_again"]:
        rows.append(f"- Batches put into the queue again: {summary['batches_put_again']}")
    if summary["batches_given_up"]:
        rows.append(f"- Batches given up, because their workers died too often: {summary['batches_given_up']}")
    return "\n".join(rows) + "\n\n" + fleet_to_markdown(summary, "Machines").strip() + "\n"


def _usd(usd: float | None) -> str:
    return "" if usd is None else f"{usd:.2f}"
