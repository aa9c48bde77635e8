"""What is worth another machine, and what is not."""

from __future__ import annotations

from typing import Any

from prefect.client.schemas.objects import State

from holdfast.errors import (
    CapacityError,
    HoldfastError,
    OverBudgetError,
    PreemptedError,
    ProgramFailedError,
    QuotaError,
    TransientError,
)
from holdfast.ledger.run_state import Attempt

ERROR_OF_OUTCOME: dict[str, type[HoldfastError]] = {
    "preempted": PreemptedError,
    "lost": PreemptedError,
    "moved": PreemptedError,
    "no-capacity": CapacityError,
    "quota": QuotaError,
    "program-failed": ProgramFailedError,
    "over-budget": OverBudgetError,
}


def raise_unless_finished(attempt: Attempt) -> None:
    """The attempt's outcome as the error that says what to do now."""
    if attempt.outcome != "finished":
        text = attempt.detail or f"attempt {attempt.number} on {attempt.pool}: {attempt.outcome}"
        raise ERROR_OF_OUTCOME.get(str(attempt.outcome), HoldfastError)(text)


def only_preemption(task: Any, task_run: Any, state: State) -> bool:
    """`retry_condition_fn`: another machine for what was preempted, refused or lost; for nothing else.

    A pool that was refused for quota is not asked again: the decision where to go leaves it out.
    """
    error = state.result(raise_on_failure=False)
    return isinstance(error, PreemptedError | CapacityError | QuotaError)


def only_transient(task: Any, task_run: Any, state: State) -> bool:
    """`retry_condition_fn`: the same call may work shortly."""
    return isinstance(state.result(raise_on_failure=False), TransientError)
