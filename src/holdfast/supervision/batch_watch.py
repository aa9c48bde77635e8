"""Watch a batch job's fleet: what a fleet's watch sees, how much is done, and what the queue has lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from holdfast.drivers.protocol import Machine
from holdfast.errors import ProgramFailedError
from holdfast.ledger.fleet_state import Member
from holdfast.supervision.fleet_watch import STOP_GRACE_SECONDS, FleetWatch
from holdfast.supervision.updates import Update

if TYPE_CHECKING:
    from holdfast.supervision.batch_run import BatchRun

LOOK_WALL_SECONDS = 1.0
LOOK_FACTOR = 20.0
"""A look at a large data set's results takes its time: the next comes so many times later."""
LOST_WALL_SECONDS = 60.0
"""A queue that says that it holds nothing, while results are missing, is believed after so long: some count late."""
ABANDONED_WALL_SECONDS = 3.0
"""The same when no machine lives that could still write a result."""
RATE_WALL_SECONDS = 30.0
FAILURES_WALL_SECONDS = 10.0
PRICE_LOOK_SECONDS = 60.0


@dataclass(slots=True)
class BatchWatch(FleetWatch):
    run: BatchRun
    next_look: float = 0.0
    nothing_since: float | None = None
    recent: deque[tuple[float, int]] = field(default_factory=deque)
    next_prices: float = 0.0
    next_failures: float = 0.0
    dead_before: int = 0

    def _lead(self, machines: dict[str, Machine]) -> Iterator[Update]:
        run = self.run
        if time.monotonic() < self.next_look:
            return
        began = time.monotonic()
        tally = run.look()
        ended = time.monotonic()
        self.next_look = ended + max(LOOK_WALL_SECONDS, LOOK_FACTOR * (ended - began))
        self.recent.append((ended, tally.done))
        while self.recent[0][0] < ended - RATE_WALL_SECONDS:
            self.recent.popleft()
        if run.state.asked_to_end:
            return
        if run.all_done:
            if run.state.living:
                run.ask_to_stop("finished", "every batch has its result", STOP_GRACE_SECONDS)
            return
        if tally.dead > self.dead_before:
            self.dead_before = tally.dead
            if given_up := run.give_up_the_dead():
                yield run.update("warned", f"{given_up} batches are given up: their workers died too often")
        self._stop_where_too_much_fails(ended)
        yield from self._find_the_lost()

    def _stop_where_too_much_fails(self, now: float) -> None:
        run, share = self.run, self.run.job.max_failed_share
        if share >= 1 or now < self.next_failures:
            return
        self.next_failures = now + FAILURES_WALL_SECONDS
        failed = sum(one["failed"] for one in run.said_by_workers().values())
        if failed > share * run.state.plan["records"]:
            raise ProgramFailedError(
                f"{failed:.0f} records have failed by now, more than max_failed_share {share:g} of "
                f"{run.state.plan['records']}; their errors are in {run.prefix}/failed/ in the store: mend the function or "
                "the inputs, or raise it to go on"
            )

    def _find_the_lost(self) -> Iterator[Update]:
        run, tally = self.run, self.run.tally
        assert tally
        nobody = not run.state.living
        if tally.waiting or (tally.leased and not nobody):
            self.nothing_since = None
            return
        now = time.monotonic()
        self.nothing_since = self.nothing_since or now
        patience = LOST_WALL_SECONDS
        if tally.approximate:  # others may have leases that we don't see, for so long
            patience += run.job.visibility_seconds + run.job.batch_time_limit_seconds
        if now - self.nothing_since < (ABANDONED_WALL_SECONDS if nobody else patience):
            return
        self.nothing_since = None
        why = "no machine lives that had them" if nobody else "the queue has lost them"
        number = run.put_again(why)
        run.look()
        if number:
            yield run.update("warned", f"{number} batches are put into the queue again: {why}")

    def _why_to_stop(self, living: list[Member]) -> str | None:
        if why := FleetWatch._why_to_stop(self, living):  # slots make a new class, which super() does not know
            return why
        run, cap = self.run, self.run.job.max_usd
        if cap is None or run.usd_if_stopped_now(at_on_demand_prices=True) < cap:
            return None
        now = run.driver.clock.now().timestamp()
        if now < self.next_prices:
            return None
        self.next_prices = now + PRICE_LOOK_SECONDS
        usd = run.usd_if_stopped_now(at_on_demand_prices=False)
        ahead = sum(one.priced.on_demand_usd_per_hour for one in living) * PRICE_LOOK_SECONDS / 3600
        if usd + ahead < cap:
            return None
        return f"${run.usd_so_far:.4f} of the run's max_usd of ${cap:g} is spent, and stopping costs the rest; raise it to go on"

    def progress_fields(self) -> dict[str, Any]:
        """Records and batches done, their rate, and how long the rest takes at it; seconds are the wall's."""
        tally, plan = self.run.tally, self.run.state.plan
        if tally is None or not plan:
            return {}
        records, batches = plan.get("records"), max(1, tally.batches)
        per_batch = records / batches if records else self.run.job.batch_size
        fields = {
            "batches_done": tally.done,
            "batches": tally.batches,
            "records_done": round(tally.done * per_batch),
            "records": records,
            "waiting": tally.waiting,
            "records_per_second": None,
            "eta_seconds": None,
        }
        (first_at, first), (last_at, last) = (self.recent[0], self.recent[-1]) if self.recent else ((0, 0), (0, 0))
        if last > first:
            per_second = (last - first) / (last_at - first_at)
            fields["records_per_second"] = per_second * per_batch
            fields["eta_seconds"] = tally.left / per_second
        return fields
