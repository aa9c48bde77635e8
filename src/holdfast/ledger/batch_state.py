"""What the journal says of a batch job's run: a fleet's rounds and members, and the batches that they work through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.ledger.fleet_state import FleetState, fold_fleet
from holdfast.ledger.journal import Entry


@dataclass(slots=True)
class BatchState(FleetState):
    plan: dict[str, Any] = field(default_factory=dict)
    """`batches`, `records`, `input_bytes`, `sources` and `empty_sources`; empty until the plan is whole."""
    put_up_to: int = 0
    """So many batches, from the plan's first, have been put into the queue."""
    put_again: int = 0
    """Batches that the broker had lost, or whose workers had all ended."""
    given_up: int = 0
    """Batches over which workers died too often: their records are written down as failed."""
    audit: dict[str, Any] = field(default_factory=dict)
    """Empty until every batch has its result and all have been read back."""


def read_batch_state(run_id: str, entries: Sequence[Entry]) -> BatchState:
    state = fold_fleet(BatchState(run_id), entries)
    for entry in entries:
        fields = entry.fields
        match entry.kind:
            case "planned":
                state.plan = fields["plan"]
            case "batches-put":
                state.put_up_to = max(state.put_up_to, fields["up_to"])
            case "batches-put-again":
                state.put_again += fields["batches"]
            case "batches-given-up":
                state.given_up += fields["batches"]
            case "audited":
                state.audit = fields["audit"]
    return state
