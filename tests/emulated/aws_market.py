"""The emulated AWS market: prices by type, zone and time, placement scores, quotas. moto has none of these."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from xml.sax.saxutils import escape

from moto.ec2.models.instance_types import INSTANCE_TYPES

USD_PER_HOUR = {
    "c7i.large": 0.0893,
    "c7i.xlarge": 0.1785,
    "m7i.2xlarge": 0.4032,
    "g5.xlarge": 1.006,
    "g5.12xlarge": 5.672,
    "p4d.24xlarge": 21.9576,
    "p5.48xlarge": 55.04,
}
SPOT_SHARE = 0.3
PRICE_HOURS = 4
XMLNS = 'xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"'


def on_demand_usd(instance_type: str, region: str) -> float:
    kind = INSTANCE_TYPES.get(instance_type, {})
    usd = USD_PER_HOUR.get(instance_type) or 0.05 * kind.get("VCpuInfo", {}).get("DefaultVCpus", 2)
    return round(usd * (1.0 if region == "us-east-1" else 1.1), 6)


def spot_usd(instance_type: str, zone: str, at: datetime) -> float:
    """It changed every four hours, by up to a tenth, in every zone by itself; now zone a is the cheapest, then b.

    Drawn by how long ago it was, not by the date: a test chooses the same pool on any day.
    """
    usd = on_demand_usd(instance_type, zone[:-1]) * SPOT_SHARE
    periods_ago = _period(datetime.now(UTC)) - _period(at)
    if periods_ago <= 0:
        return round(usd * (1 + 0.02 * (ord(zone[-1]) - ord("a"))), 6)
    drawn = hashlib.sha256(f"{instance_type} {zone} {periods_ago}".encode()).digest()[0] / 255
    return round(usd * (0.9 + 0.2 * drawn), 6)


def _period(at: datetime) -> int:
    return int(at.timestamp() // (PRICE_HOURS * 3600))


def spot_price_history(form: Mapping[str, str], offered: Sequence[Mapping[str, str]], page_size: int) -> str:
    """As EC2: newest first, the price that held at StartTime included, no time of the future."""
    now = datetime.now(UTC)
    end = min(_time(form.get("EndTime")) or now, now)
    start = max(_time(form.get("StartTime")) or now - timedelta(days=90), now - timedelta(days=90))
    start = min(start, end)
    types = [value for key, value in form.items() if key.startswith("InstanceType.")]
    zone = form.get("AvailabilityZone") or form.get("Filter.1.Value.1")
    records: list[tuple[datetime, str, str]] = []
    for one in offered:
        if (types and one["InstanceType"] not in types) or (zone and one["Location"] != zone):
            continue
        for period in range(_period(start), _period(end) + 1):
            at = datetime.fromtimestamp(period * PRICE_HOURS * 3600, UTC)
            records.append((at, one["Location"], one["InstanceType"]))
    records.sort(reverse=True)
    begin = int(form.get("NextToken") or 0)
    page = records[begin : begin + page_size]
    items = "".join(
        f"<item><instanceType>{kind}</instanceType><productDescription>Linux/UNIX</productDescription>"
        f"<spotPrice>{spot_usd(kind, where, at):.6f}</spotPrice><timestamp>{at:%Y-%m-%dT%H:%M:%S}.000Z</timestamp>"
        f"<availabilityZone>{where}</availabilityZone></item>"
        for at, where, kind in page
    )
    more = f"{begin + page_size}" if begin + page_size < len(records) else ""
    return (
        f"<DescribeSpotPriceHistoryResponse {XMLNS}><requestId>r</requestId>"
        f"<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken>{more}</nextToken>"
        "</DescribeSpotPriceHistoryResponse>"
    )


def placement_scores(form: Mapping[str, str], zone_ids: Mapping[str, Sequence[str]]) -> str:
    """Scores fall from zone to zone: 9, 8, 7 ..."""
    regions = [value for key, value in form.items() if key.startswith("RegionName.")]
    items = "".join(
        f"<item><region>{region}</region><availabilityZoneId>{escape(zone_id)}</availabilityZoneId>"
        f"<score>{max(1, 9 - number)}</score></item>"
        for region in regions
        for number, zone_id in enumerate(zone_ids[region])
    )
    return (
        f"<GetSpotPlacementScoresResponse {XMLNS}><requestId>r</requestId>"
        f"<spotPlacementScoreSet>{items}</spotPlacementScoreSet></GetSpotPlacementScoresResponse>"
    )


def products(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of the Price List to GetProducts, for filters that name one type of one region."""
    wanted = {one["Field"]: one["Value"] for one in asked["Filters"]}
    kind, region = wanted["instanceType"], wanted["regionCode"]
    if kind not in INSTANCE_TYPES:
        return {"FormatVersion": "aws_v1", "PriceList": []}
    dimension = {"unit": "Hrs", "pricePerUnit": {"USD": f"{on_demand_usd(kind, region):.10f}"}}
    product = {
        "product": {"productFamily": "Compute Instance", "attributes": wanted},
        "serviceCode": asked["ServiceCode"],
        "terms": {"OnDemand": {"SKU.TERM": {"priceDimensions": {"SKU.TERM.RATE": dimension}}}},
    }
    return {"FormatVersion": "aws_v1", "PriceList": [json.dumps(product)]}


def quota(asked: Mapping[str, Any], quotas: Mapping[str, float]) -> dict[str, Any]:
    code = asked["QuotaCode"]
    return {"Quota": {"ServiceCode": "ec2", "QuotaCode": code, "Value": quotas.get(code, 640.0), "Adjustable": True}}


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
