"""A run's own cap on dollars: what may still be set aside, and when a machine must stop so that it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from holdfast.drivers.protocol import Offer, PricePoint
from holdfast.errors import OverBudgetError
from holdfast.ledger.billing import TERMS, bill, round_usd
from holdfast.ledger.run_state import Attempt, RunState
from holdfast.model import TrainingJob

STOP_SECONDS = 240.0
"""From the decision to stop until a machine that does not obey has been ended by force."""
LOOK_SECONDS = 60.0
"""Prices are asked for so often at most, and only when the on-demand price alone would have reached the cap."""


def worst_case_usd(job: TrainingJob, state: RunState, offer: Offer) -> float:
    """What the next machine may cost at most: the hours that are left at the on-demand price, within the run's cap.

    Raises OverBudgetError when hours or dollars are used up.
    """
    hours_left = job.max_run_hours - state.billed_seconds / 3600
    if hours_left <= 0:
        raise OverBudgetError(f"the run has used its max_run_hours of {job.max_run_hours:g}; raise it to go on")
    usd = offer.on_demand_usd_per_hour * hours_left
    if job.max_usd is None:
        return round_usd(usd)
    left = job.max_usd - state.usd_total
    if left <= stop_usd(offer.on_demand_usd_per_hour):
        raise OverBudgetError(
            f"the run has spent ${state.usd_total:.4f} of its max_usd of ${job.max_usd:g}, and what is left pays for no "
            "machine's start and stop; raise it to go on"
        )
    return round_usd(min(usd, left))


def stop_usd(on_demand_usd_per_hour: float) -> float:
    return on_demand_usd_per_hour * STOP_SECONDS / 3600


class Spending:
    """Of the living machine, held against the run's cap."""

    def __init__(
        self, max_usd: float | None, prices: Callable[[Attempt, datetime, datetime], Sequence[PricePoint]]
    ) -> None:
        self._max_usd, self._prices = max_usd, prices
        self._next_look: datetime | None = None

    def why_too_dear(self, attempt: Attempt, spent_before_usd: float, now: datetime) -> str | None:
        """Words when the machine must stop now, so that its orderly end is still within the cap."""
        cap = self._max_usd
        if cap is None or attempt.launched_at is None:
            return None
        stop = stop_usd(attempt.on_demand_usd_per_hour)
        dearest = (now - attempt.launched_at).total_seconds() / 3600 * attempt.on_demand_usd_per_hour
        if spent_before_usd + dearest + stop < cap or (self._next_look and now < self._next_look):
            return None
        self._next_look = now + timedelta(seconds=LOOK_SECONDS)
        prices = self._prices(attempt, attempt.launched_at, now)
        spent = spent_before_usd + bill(attempt.launched_at, now, prices, TERMS[attempt.pool.cloud], False).usd
        ahead = prices[-1].usd_per_hour * LOOK_SECONDS / 3600 if prices else 0.0
        if spent + stop + ahead < cap:
            return None
        return (
            f"${spent:.4f} of the run's max_usd of ${cap:g} is spent, and stopping may cost ${stop:.4f}: it commits and "
            "stops; raise max_usd to go on from there"
        )
