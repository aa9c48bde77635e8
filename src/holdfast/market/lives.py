"""What a run's journal says of its machines, as lives for the history."""

from __future__ import annotations

from holdfast.ledger.fleet_state import FleetState
from holdfast.ledger.run_state import RunState
from holdfast.market.history import Life


def lives_of(state: RunState | FleetState) -> list[Life]:
    """Every life that has ended, and every refusal, in the order of the journal."""
    lives = _of_attempts(state) if isinstance(state, RunState) else _of_members(state)
    return sorted(lives, key=lambda life: life.recorded_at)


def _of_attempts(state: RunState) -> list[Life]:
    return [
        Life(
            run=state.run_id,
            token=str(attempt.number),
            pool=attempt.pool,
            launched_at=attempt.launched_at,
            ended_at=attempt.terminated_at or attempt.detected_at,
            recorded_at=attempt.detected_at,
            outcome=attempt.outcome,
            usd=attempt.usd,
        )
        for attempt in state.attempts
        if attempt.outcome and attempt.detected_at
    ]


def _of_members(state: FleetState) -> list[Life]:
    refusals = [
        Life(
            run=state.run_id,
            token=f"round-{asked.number}-{number}",
            pool=priced.pool,
            launched_at=None,
            ended_at=asked.answered_at,
            recorded_at=asked.answered_at,
            outcome=asked.refusal,
        )
        for asked in state.rounds
        if asked.refusal and asked.answered_at
        for number, priced in enumerate(asked.pools)
    ]
    members = [
        Life(
            run=state.run_id,
            token=member.machine,
            pool=member.pool,
            launched_at=member.launched_at,
            ended_at=member.terminated_at or member.detected_at,
            recorded_at=member.detected_at,
            outcome=member.outcome,
            usd=member.usd,
        )
        for member in state.members.values()
        if member.outcome and member.detected_at
    ]
    return [*refusals, *members]
