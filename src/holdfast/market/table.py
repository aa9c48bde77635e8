"""The capacity pools that fit a job, in the order in which runs try them, with what each is expected to cost and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from holdfast.drivers.protocol import CapacityPool, Offer
from holdfast.market.history import Life
from holdfast.market.informed import estimates
from holdfast.market.interruptions import Estimate
from holdfast.market.monitor import Judgement
from holdfast.market.traces import Trace
from holdfast.placement.policy import Situation, rank, usd_per_useful_hour

FIRST_GUESS_RESTART_SECONDS, FIRST_GUESS_SAVE_SECONDS = 120.0, 1.0


class Measured(Protocol):
    """What a job is known to take on one machine type: `ledger.profiles.Measurement` is one."""

    step_seconds: float
    save_seconds: float

    @property
    def restart_seconds(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One zone's machines of one type. Dollars per hour where nothing else is said; None where it is not sold so."""

    cloud: str
    region: str
    zone: str
    instance_type: str
    vcpus: int
    memory_gib: float
    gpus: int
    gpu_name: str
    spot_usd_per_hour: float | None
    on_demand_usd_per_hour: float | None
    discount: float | None
    """Of spot against on-demand, 0.6: it costs 40 %."""
    interruptions_per_day: float | None
    interruptions_per_day_low: float | None
    interruptions_per_day_high: float | None
    evidence: str
    usd_per_unit: float
    """Expected, restarts and saves included; of spot, where it is sold."""
    on_demand_usd_per_unit: float | None
    unit: str
    cooled: str = ""
    why: str = ""
    """Of the first row: why it is."""


def offers_table(
    offers: Sequence[Offer],
    now: datetime,
    *,
    lives: Sequence[Life] = (),
    judgement: Judgement | None = None,
    traces: Sequence[Trace] = (),
    measured: Mapping[str, Measured] | None = None,
    records_per_second: float | None = None,
) -> list[Row]:
    """`measured`: by instance type; of a type that is not in it, a useful hour is priced instead of steps."""
    measured = measured or {}
    found = dict(zip([offer.pool for offer in offers], estimates(offers, lives, now, traces), strict=True))
    informed = [
        dataclasses.replace(
            offer,
            interruptions_per_hour=known.per_hour if (known := found[offer.pool]) else offer.interruptions_per_hour,
            cooled=judgement.cooled(offer.pool) if judgement else "",
        )
        for offer in offers
    ]
    spot = _ranked([offer for offer in informed if offer.pool.provisioning_model == "spot"], now)
    on_demand = {
        _place(offer.pool): offer
        for offer in _ranked([offer for offer in informed if offer.pool.provisioning_model == "on-demand"], now)
    }
    rows = [
        _row(offer, on_demand.pop(_place(offer.pool), None), found[offer.pool], measured, records_per_second)
        for offer in spot
    ]
    rows += [_row(None, offer, None, measured, records_per_second) for offer in on_demand.values()]
    if rows:
        rows[0] = dataclasses.replace(rows[0], why=_why_first(rows))
    return rows


def _ranked(offers: list[Offer], now: datetime) -> list[Offer]:
    """As a run that has tried nothing yet ranks them."""
    fresh = Situation(
        now=now,
        offers=offers,
        attempts=[],
        provisioning="spot",
        failed_spot_attempts_to_fall_back=1,
        max_attempts=1,
        restart_seconds=FIRST_GUESS_RESTART_SECONDS,
        save_seconds=FIRST_GUESS_SAVE_SECONDS,
    )
    return rank(offers, fresh)


def _place(pool: CapacityPool) -> tuple[str, str, str]:
    return pool.cloud, pool.zone, pool.instance_type


def _row(
    spot: Offer | None,
    on_demand: Offer | None,
    found: Estimate | None,
    measured: Mapping[str, Measured],
    records_per_second: float | None,
) -> Row:
    shown = spot or on_demand
    assert shown
    full = on_demand.usd_per_hour if on_demand else (spot.on_demand_usd_per_hour if spot else None)
    known = measured.get(shown.pool.instance_type)
    unit, hours = "useful hour", 1.0
    if records_per_second:
        unit, hours = "million records", 1e6 / records_per_second / 3600
    elif known:
        unit, hours = "1,000 steps", 1000 * known.step_seconds / 3600
    restart = known.restart_seconds if known else FIRST_GUESS_RESTART_SECONDS
    save = known.save_seconds if known else FIRST_GUESS_SAVE_SECONDS
    return Row(
        cloud=shown.pool.cloud,
        region=shown.pool.region,
        zone=shown.pool.zone,
        instance_type=shown.pool.instance_type,
        vcpus=shown.vcpus,
        memory_gib=shown.memory_gib,
        gpus=shown.gpus,
        gpu_name=shown.gpu_name,
        spot_usd_per_hour=spot.usd_per_hour if spot else None,
        on_demand_usd_per_hour=full,
        discount=1 - spot.usd_per_hour / full if spot and full else None,
        interruptions_per_day=found.per_day if found else None,
        interruptions_per_day_low=24 * found.low_per_hour if found else None,
        interruptions_per_day_high=24 * found.high_per_hour if found else None,
        evidence=found.evidence if found else "",
        usd_per_unit=hours * usd_per_useful_hour(shown, restart, save),
        on_demand_usd_per_unit=hours * full if full is not None else None,
        unit=unit,
        cooled=spot.cooled if spot else "",
    )


def _why_first(rows: Sequence[Row]) -> str:
    first, others = rows[0], rows[1:]
    what = f"{first.zone} {first.instance_type}: the least expected dollars per useful hour"
    if first.cooled:
        return f"{what} among pools that are all cooled; {first.cooled}"
    if first.interruptions_per_day is not None:
        what += f", {first.interruptions_per_day:.2g} interruptions a day included"
    if cheaper := [
        row for row in others if not row.cooled and (row.spot_usd_per_hour or 1e9) < (first.spot_usd_per_hour or 0)
    ]:
        row = min(cheaper, key=lambda one: one.spot_usd_per_hour or 1e9)
        what += f"; {row.zone} {row.instance_type} has the lower price (${row.spot_usd_per_hour:.4f}/h) and is taken more often"
    if cooled := [row for row in others if row.cooled]:
        what += f"; {len(cooled)} pool{'s are' if len(cooled) > 1 else ' is'} cooled: {cooled[0].cooled}"
    if first.discount is not None:
        what += f"; {first.discount:.0%} below on-demand"
    return what


COLUMNS = ("#", "cloud", "zone", "type", "spot $/h", "on-demand $/h", "discount", "taken a day (90 %)", "expected $")


def cells(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table for people, as one mapping a row; evidence is the last column."""
    return [
        dict(zip(COLUMNS, _cells(number, row), strict=True)) | {"evidence": row.cooled or row.evidence}
        for number, row in enumerate(rows, 1)
    ]


def to_markdown(rows: Sequence[Row]) -> str:
    if not rows:
        return "No pool fits."
    shown = cells(rows)
    head = list(shown[0])
    lines = [f"**{rows[0].why}**", "", f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(str(one[name]) for name in head)} |" for one in shown]
    return "\n".join(lines)


def _cells(number: int, row: Row) -> list[str]:
    taken = "–"
    if row.interruptions_per_day is not None:
        taken = f"{row.interruptions_per_day:.2f} ({row.interruptions_per_day_low:.2f}–{row.interruptions_per_day_high:.2f})"
    return [
        str(number),
        row.cloud,
        row.zone,
        row.instance_type,
        _usd(row.spot_usd_per_hour),
        _usd(row.on_demand_usd_per_hour),
        f"{row.discount:.0%}" if row.discount is not None else "–",
        taken,
        f"{row.usd_per_unit:.4f} per {row.unit}",
    ]


def _usd(usd: float | None) -> str:
    return f"{usd:.4f}" if usd is not None else "–"
