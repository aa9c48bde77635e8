"""On-demand prices: the account's own, else the Price List's, else a table that is shipped and says how old it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from holdfast.drivers.aws.account import Account
from holdfast.drivers.aws.cached import Cached
from holdfast.errors import HoldfastError

log = logging.getLogger(__name__)

DAY = 24 * 3600.0
REFUSED_SECONDS = 300.0
"""After which a Price List that did not answer is asked again."""
PRICE_LIST_REGION = "us-east-1"
TABLE_OF = "November 2026"
TABLE: dict[str, float] = {
    **{"c7i.large": 0.08925, "c7i.xlarge": 0.1785, "c7i.2xlarge": 0.357, "c7i.4xlarge": 0.714, "c7i.8xlarge": 1.428},
    **{"m7i.large": 0.1008, "m7i.xlarge": 0.2016, "m7i.2xlarge": 0.4032, "m7i.4xlarge": 0.8064},
    **{"g5.xlarge": 1.006, "g5.2xlarge": 1.212, "g5.4xlarge": 1.624, "g5.12xlarge": 5.672, "g5.48xlarge": 16.288},
    **{"g6.xlarge": 0.8048, "g6.2xlarge": 0.9776, "g6.12xlarge": 4.6016, "g6e.xlarge": 1.861, "g6e.12xlarge": 10.4926},
    **{"p4d.24xlarge": 21.9576, "p5.48xlarge": 55.04},
}
"""USD per hour, Linux, us-east-1. Source: https://aws.amazon.com/ec2/pricing/on-demand/"""


@dataclass(frozen=True, slots=True)
class PriceList:
    """On-demand prices of one region, and where each came from."""

    usd_per_hour: Mapping[str, float]
    from_table: tuple[str, ...] = ()
    """Types whose price is the shipped table's."""
    missing: tuple[str, ...] = ()
    refusal: str = ""
    """Why the Price List did not answer."""
    own: tuple[str, ...] = field(default=())


class Prices:
    def __init__(self, account: Account) -> None:
        self._account = account
        self._lists: Cached[str, PriceList] = Cached(
            self._ask, lambda prices: REFUSED_SECONDS if prices.refusal else DAY
        )

    def on_demand(self, region: str) -> PriceList:
        """Of the account's instance types in `region`; kept for a day."""
        return self._lists.get(region)

    def _ask(self, region: str) -> PriceList:
        config = self._account.config
        own = {name: usd for name, usd in config.usd_per_hour.items() if name in config.instance_types}
        wanted = [name for name in config.instance_types if name not in own]
        refusal, listed = "", {}
        try:
            with ThreadPoolExecutor(8) as pool:
                for name, usd in zip(wanted, pool.map(lambda name: self._listed(region, name), wanted), strict=True):
                    if usd:
                        listed[name] = usd
        except HoldfastError as error:
            refusal = str(error)
            log.warning("the AWS Price List does not answer, prices of %s are used: %s", TABLE_OF, error)
        from_table = {name: TABLE[name] for name in wanted if name not in listed and name in TABLE}
        return PriceList(
            usd_per_hour={**from_table, **listed, **own},
            from_table=tuple(from_table),
            missing=tuple(name for name in wanted if name not in listed and name not in from_table),
            refusal=refusal,
            own=tuple(own),
        )

    def _listed(self, region: str, instance_type: str) -> float | None:
        """Source: https://docs.aws.amazon.com/awsaccountbilling/latest/aboutv2/using-price-list-query-api.html"""
        wanted = {
            "regionCode": region,
            "instanceType": instance_type,
            "operatingSystem": "Linux",
            "tenancy": "Shared",
            "capacitystatus": "Used",
            "preInstalledSw": "NA",
        }
        with self._account.calling("pricing"):
            answer = self._account.client("pricing", PRICE_LIST_REGION).get_products(
                ServiceCode="AmazonEC2",
                Filters=[{"Type": "TERM_MATCH", "Field": name, "Value": value} for name, value in wanted.items()],
                FormatVersion="aws_v1",
                MaxResults=100,
            )
        found = [usd for product in answer["PriceList"] if (usd := hourly_usd(json.loads(product)))]
        return min(found, default=None)


def hourly_usd(product: Mapping[str, Any]) -> float | None:
    """The on-demand price of one product of the Price List; None where it has none by the hour."""
    if product.get("product", {}).get("attributes", {}).get("marketoption", "OnDemand") != "OnDemand":
        return None  # capacity blocks are listed under the same type
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term.get("priceDimensions", {}).values():
            if dimension.get("unit") == "Hrs" and float(dimension.get("pricePerUnit", {}).get("USD", 0)) > 0:
                return float(dimension["pricePerUnit"]["USD"])
    return None
