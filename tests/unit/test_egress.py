"""What checkpoints cost on their way: each byte pays where it leaves, and only when it leaves a region."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from holdfast.drivers.protocol import CapacityPool
from holdfast.ledger.egress import egress_usd, place_of_store
from holdfast.ledger.run_state import Attempt, read_run_state
from holdfast.ledger.summary import summarise, to_markdown
from tests.unit.attempts import STARTED_FIELDS, Told

AWS = CapacityPool("aws", "us-east-1", "us-east-1a", "g5.xlarge", "spot")
GCP = CapacityPool("gcp", "us-central1", "us-central1-a", "g2-standard-4", "spot")
LOCAL = CapacityPool("local", "local-1", "local-1a", "g5.xlarge", "spot")


def attempt(pool: CapacityPool, commits: int, resumed: int | None) -> Attempt:
    told = Told().attempt(
        "finished", resumed, 100, 100, report={"commits": commits, "bytes_per_commit": 10_000_000_000}
    )
    [one] = read_run_state("run", told.entries).attempts
    return dataclasses.replace(one, pool=pool)


@pytest.mark.parametrize(
    ("pool", "store", "commits", "resumed", "usd"),
    [
        (AWS, "s3://bucket?region=us-east-1", 5, 40, 0.0),
        (AWS, "s3://bucket", 5, 40, 0.0),  # no region told: taken for the machine's own
        (AWS, "s3://bucket?region=eu-west-1", 5, 40, 0.02 * 10 * 6),
        (AWS, "s3://bucket?region=eu-west-1", 5, 0, 0.02 * 10 * 5),  # nothing to resume from
        (GCP, "s3://bucket?region=us-east-1", 2, 40, 0.12 * 10 * 2 + 0.09 * 10),
        (AWS, "gs://bucket", 2, 40, 0.09 * 10 * 2 + 0.12 * 10),
        (GCP, "file:///srv/runs", 2, 40, 0.0),
        (LOCAL, "s3://bucket?region=us-east-1", 2, None, 0.0),
    ],
)
def test_every_byte_pays_where_it_leaves(pool: Any, store: str, commits: int, resumed: int | None, usd: float) -> None:
    assert egress_usd(attempt(pool, commits, resumed), place_of_store(store)) == pytest.approx(usd)


def test_the_summary_says_it_beside_the_total() -> None:
    told = Told()
    told.entries[0].fields["store"] = "s3://bucket?region=eu-west-1"
    told.attempt("finished", 0, 100, 100, usd=0.5, report={"commits": 5, "bytes_per_commit": 10_000_000_000})
    reserved = told.entries[1].fields
    reserved["pool"] = dataclasses.asdict(AWS)
    summary = summarise(read_run_state("run", told.entries))
    assert (summary["usd_total"], summary["usd_egress_estimate"]) == (0.5, 1.0)
    assert "about $1.0000" in to_markdown(summary)
    assert "store" not in STARTED_FIELDS  # journals of earlier versions name none: no egress is guessed
