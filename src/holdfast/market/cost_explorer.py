"""AWS's bill by Cost Explorer. A request costs $0.01; two are made, and one more for each further page.

https://docs.aws.amazon.com/aws-cost-management/latest/APIReference/API_GetCostAndUsage.html
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from holdfast.errors import ConfigError, CredentialsError, TransientError
from holdfast.market.bills import RUN_TAG, STORE_TAG, Asked, Bill, Part, lines_of

MACHINES = "Amazon Elastic Compute Cloud - Compute"
"""Volumes, addresses and traffic are under "EC2 - Other"."""
REDUCTIONS = [
    *("Credit", "Refund"),
    *("Enterprise Discount Program Discount", "Private Rate Card Discount", "Bundled Discount"),
]
NOT_USAGE = [*REDUCTIONS, "Tax", "Support fee", "Solution Provider Program Discount"]


def read_cost_explorer(client: Any, asked: Asked) -> Bill:
    """`client`: boto3's, of `ce`. Raises ConfigError, CredentialsError, TransientError."""
    amounts: list[tuple[str, Part, float]] = []
    reaches = None
    for day in _days(client, asked, {"Not": _record_types(NOT_USAGE)}, ["SERVICE"]):
        for group in day["Groups"]:
            tag, service = group["Keys"]
            if run := _tag_value(tag):
                amounts.append((run, "machines" if service == MACHINES else "other", _usd(group)))
                end = datetime.fromisoformat(day["TimePeriod"]["End"]).replace(tzinfo=UTC)
                reaches = max(reaches or end, end)
    for day in _days(client, asked, _record_types(REDUCTIONS), []):
        amounts += [(run, "credits", _usd(group)) for group in day["Groups"] if (run := _tag_value(group["Keys"][0]))]
    return Bill(cloud="aws", source="AWS Cost Explorer", lines=lines_of(amounts), reaches=reaches)


def _days(client: Any, asked: Asked, which: dict[str, Any], by: list[str]) -> Iterator[dict[str, Any]]:
    from botocore.exceptions import BotoCoreError, ClientError

    of_store = {"Tags": {"Key": STORE_TAG, "Values": [asked.store], "MatchOptions": ["EQUALS"]}}
    request: dict[str, Any] = {
        "TimePeriod": {"Start": f"{asked.start:%Y-%m-%d}", "End": f"{asked.end:%Y-%m-%d}"},
        "Granularity": "DAILY",
        "Metrics": ["UnblendedCost"],
        "Filter": {"And": [of_store, which]},
        "GroupBy": [{"Type": "TAG", "Key": RUN_TAG}, *({"Type": "DIMENSION", "Key": name} for name in by)],
    }
    while True:
        try:
            answer = client.get_cost_and_usage(**request)
        except ClientError as error:
            raise _translated(error) from error
        except BotoCoreError as error:
            raise TransientError(f"Cost Explorer does not answer: {error}") from error
        yield from answer["ResultsByTime"]
        if not answer.get("NextPageToken"):
            return
        request["NextPageToken"] = answer["NextPageToken"]


def _translated(error: Any) -> Exception:
    code, words = error.response["Error"]["Code"], error.response["Error"]["Message"]
    if code in ("AccessDeniedException", "AccessDenied", "UnauthorizedOperation"):
        return ConfigError(
            f"Cost Explorer refuses: {words}; give the flow's credentials deployments/aws-billing-policy.json, and let the "
            "management account open Cost Explorer to its members"
        )
    if code in ("ExpiredTokenException", "ExpiredToken", "UnrecognizedClientException", "InvalidClientTokenId"):
        return CredentialsError(f"Cost Explorer refuses the credentials ({code}): {words}; renew them")
    if code == "DataUnavailableException":
        return TransientError(f"Cost Explorer has no data yet: {words}; it has some a day after it was switched on")
    if code == "ValidationException":
        return ConfigError(
            f"Cost Explorer refuses the question: {words}; activate the tags, as docs/reconciliation.md says"
        )
    return TransientError(f"Cost Explorer failed ({code}): {words}")


def _record_types(values: list[str]) -> dict[str, Any]:
    return {"Dimensions": {"Key": "RECORD_TYPE", "Values": values}}


def _tag_value(key: str) -> str:
    """Of `holdfast-run$night-3`; empty for what carries no such tag."""
    return key.partition("$")[2]


def _usd(group: dict[str, Any]) -> float:
    amount = group["Metrics"]["UnblendedCost"]
    if amount.get("Unit", "USD") != "USD":
        raise ConfigError(
            f"Cost Explorer bills in {amount['Unit']!r}, the ledger is in USD; use a Cost and Usage Report"
        )
    return float(amount["Amount"])
