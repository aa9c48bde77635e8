"""The policy for deadlines: what costs least, as far as anybody can know, and is in time for certain.

What each choice will cost comes from `value_tables`, weighed by what was seen of the pools (`hazards`). Several spot pools are
decided on as one, which has something to give while any of them has; which of them is then a matter of price and of how soon it
may be taken.
"""

from __future__ import annotations

import math

from holdfast.placement.hazards import Belief, Library
from holdfast.placement.situation import Decision, Situation, is_safe, on_demand_pool
from holdfast.placement.value_tables import Tables, Terms, tables

DIFFERS = 0.1
"""Restarts or prices that have changed by so much ask for another table."""
MOVE_PAYS = 2.0
"""A cheaper spot pool must save so many times what the move costs."""
LEAST_SAVING = 1e-4
"""To wait is worth it for more than rounding: else it is better to have done something."""
SETTLED_TICKS = 4


class LeastCost:
    asks_while_running = True

    def __init__(self, library: Library) -> None:
        self._library = library
        self._tables: Tables | None = None
        self._terms: Terms | None = None
        self._asked: tuple[float, ...] = ()
        self._any: Belief | None = None
        """Of all spot pools together."""
        self._each: list[Belief | None] = []
        self._last_spot: int | None = None
        self._settled_seconds = -math.inf
        """When it was last decided to stay on demand, since there was spot."""
        self._untold: tuple[bool, float] | None = None
        """What was last seen of the spot pools together, and when, where no decision was to be made of it."""

    def decide(self, situation: Situation) -> Decision:
        current = situation.current
        pools = situation.pools
        if current is not None and pools[current].spot:
            self._last_spot = current
            # A machine that trains is left for no reason but a cheaper one, or a deadline that another tick would break.
            if len(pools) == 2 and self._any is not None and is_safe(situation, current):
                self._untold = (True, situation.now_seconds)
                return Decision(current, "spot while it lasts")
        spot = [index for index, pool in enumerate(pools) if pool.spot]
        if not spot:
            return Decision(on_demand_pool(situation), "there is no spot pool")
        if self._goes_on(situation, spot):
            assert current is not None
            return Decision(current, "on-demand while there is no spot")
        self._look(situation, spot)
        decision = self._choose(situation, spot)
        if is_safe(situation, decision.pool):
            return decision
        return Decision(on_demand_pool(situation), "the slack is used up")

    def _goes_on(self, situation: Situation, spot: list[int]) -> bool:
        """On demand, and there is no spot: whether to wait without a machine is asked again now and then only."""
        current = situation.current
        if current is None or situation.pools[current].spot or any(situation.pools[index].available for index in spot):
            self._settled_seconds = -math.inf
            return False
        if situation.now_seconds - self._settled_seconds < SETTLED_TICKS * situation.tick_seconds - 1e-6:
            if situation.sees_all:
                self._untold = (False, situation.now_seconds)
            return True
        self._settled_seconds = situation.now_seconds
        return False

    def _choose(self, situation: Situation, spot: list[int]) -> Decision:
        pools, current = situation.pools, situation.current
        open_ = [index for index in spot if pools[index].available or index == current]
        best = self._best(situation, open_)
        if current is not None and pools[current].spot:
            return self._stay_or_move(situation, current, best)
        if math.isinf(situation.deadline_seconds):
            return Decision(
                best, "spot is to be had, and there is no hurry" if best is not None else "waiting for spot"
            )
        assert self._any is not None
        if best is None or self._any.available:
            costs = self._costs(situation, best, self._any)
        else:
            costs = self._hoped(situation, best, self._any)
        wait_usd, spot_usd, demand_usd = costs
        if spot_usd <= min(wait_usd, demand_usd) and best is not None:
            return Decision(best, _words("spot", costs))
        if wait_usd < demand_usd * (1 - LEAST_SAVING) and is_safe(situation, None):
            return Decision(None, _words("wait", costs))
        return Decision(on_demand_pool(situation), _words("on-demand", costs))

    # -- what it will cost --------------------------------------------------------------------------------------------

    def _hoped(self, situation: Situation, spot: int, belief: Belief) -> tuple[float, float, float]:
        """The same of a pool that had nothing when it was last asked. Who has no machine asks for nothing.

        To ask on demand means to leave that machine; where there is nothing, the run stands as if it had none.
        """
        there = self._costs(situation, spot, belief.changed())
        if situation.current is None:
            return there
        wait_usd, _, demand_usd = self._costs(situation, None, belief)
        chance = (self._each[spot] or belief).changed_by(situation.now_seconds)
        else_usd = min(wait_usd, self._start_usd(situation, belief))
        return wait_usd, chance * there[1] + (1 - chance) * else_usd, demand_usd

    def _costs(self, situation: Situation, spot: int | None, belief: Belief) -> tuple[float, float, float]:
        """Expected dollars from now on: of waiting, of spot, of on-demand."""
        found = self._table(situation)
        step = found.step_seconds
        slack = situation.slack_seconds / step
        restart = situation.restart_seconds / step
        on_demand = situation.pools[on_demand_pool(situation)].usd_per_hour * step / 3600
        time_left = situation.deadline_seconds - situation.now_seconds
        place, state = found.place(time_left), int(spot is not None)
        wait_usd = spot_usd = math.inf
        if slack >= 1.0:
            wait_usd = belief.expected(found.on_none[place, state], *found.among(slack - 1.0))
        if slack >= restart and spot is not None:
            usd = situation.pools[spot].usd_per_hour * step / 3600
            spot_usd = usd + belief.expected(found.on_spot[place], *found.among(slack - restart))
            if self._last_spot is not None and spot != self._last_spot:
                spot_usd += situation.move_usd
        if situation.current is not None:
            slack -= situation.pending_seconds / step
        else:
            slack -= restart
        demand_usd = self._on_demand_usd(situation, slack, found, place, state, on_demand, belief)
        return wait_usd, spot_usd, demand_usd

    def _on_demand_usd(
        self, situation: Situation, slack: float, found: Tables, place: int, state: int, usd: float, belief: Belief
    ) -> float:
        if slack < 0:
            pending = situation.pending_seconds if situation.current is not None else situation.restart_seconds
            return usd * math.ceil((situation.work_left_seconds + pending) / found.step_seconds - 1e-9)
        return usd + belief.expected(found.on_demand[place, state], *found.among(slack))

    def _start_usd(self, situation: Situation, belief: Belief) -> float:
        """Of on-demand, when the machine in use has been left."""
        found = self._table(situation)
        usd = situation.pools[on_demand_pool(situation)].usd_per_hour * found.step_seconds / 3600
        place = found.place(situation.deadline_seconds - situation.now_seconds)
        slack = (situation.slack_seconds - situation.restart_seconds) / found.step_seconds
        return self._on_demand_usd(situation, slack, found, place, 0, usd, belief)

    def _table(self, situation: Situation) -> Tables:
        """For these restarts and prices, or such that differ little."""
        spot_usd = min([pool.usd_per_hour for pool in situation.pools if pool.spot])
        on_demand_usd = min([pool.usd_per_hour for pool in situation.pools if not pool.spot])
        asked = (situation.restart_seconds, spot_usd, on_demand_usd, situation.tick_seconds, situation.deadline_seconds)
        if self._tables is not None and asked == self._asked:
            return self._tables
        self._asked = asked
        terms = self._terms
        if (
            self._tables is None
            or terms is None
            or not (
                _near(terms.restart_seconds, situation.restart_seconds, terms.tick_seconds)
                and _near(terms.spot_usd_per_hour, spot_usd)
                and _near(terms.on_demand_usd_per_hour, on_demand_usd)
                and terms.tick_seconds == situation.tick_seconds
                and situation.deadline_seconds - situation.now_seconds <= terms.time_left_seconds + terms.tick_seconds
            )
        ):
            time_left = situation.deadline_seconds - situation.now_seconds
            self._terms = Terms(
                tick_seconds=situation.tick_seconds,
                time_left_seconds=time_left,
                slack_seconds=max(situation.slack_seconds, situation.tick_seconds),
                restart_seconds=situation.restart_seconds,
                spot_usd_per_hour=spot_usd,
                on_demand_usd_per_hour=on_demand_usd,
            )
            self._tables = tables(self._library, self._terms)
        return self._tables

    # -- what was seen ------------------------------------------------------------------------------------------------

    def _look(self, situation: Situation, spot: list[int]) -> None:
        now, pools = situation.now_seconds, situation.pools
        if self._any is None:
            self._any = self._first(situation, spot, None)
            self._each = [None] * len(pools)
            if len(spot) > 1:
                for index in spot:
                    self._each[index] = self._first(situation, [index], index)
        if self._untold is not None:
            self._any.saw(*self._untold)
            self._untold = None
        known = [index for index in spot if situation.sees_all or self._is_known(situation, index)]
        if not known:
            return
        current = situation.current
        there = any(pools[index].available or index == current for index in known)
        when = {index: self._when(situation, index) for index in known}
        if there or len(known) == len(spot):
            self._any.saw(there, now if there else max(when.values()))
        for index in known:
            if (belief := self._each[index]) is not None:
                belief.saw(pools[index].available or index == current, when[index])

    def _when(self, situation: Situation, index: int) -> float:
        """That a pool has nothing is known from when it was asked, unless all is seen."""
        pool = situation.pools[index]
        if situation.sees_all or pool.available or index == situation.current:
            return situation.now_seconds
        return min(situation.now_seconds, pool.since_seconds)

    def _first(self, situation: Situation, spot: list[int], index: int | None) -> Belief:
        now = situation.now_seconds
        histories = [one for place in spot if place < len(situation.history) and (one := situation.history[place])]
        if index is None and len(histories) == len(spot) > 1:
            shortest = min(len(one.available) for one in histories)
            together = bytes(map(max, *(bytes(one.available)[-shortest:] for one in histories)))
            return Belief.of_history(self._library, _Together(histories[0].gap_seconds, together), now)
        if len(histories) == len(spot) and histories[0].available:
            return Belief.of_history(self._library, histories[0], now)
        return Belief(self._library, any(situation.pools[place].available for place in spot), now)

    def _is_known(self, situation: Situation, index: int) -> bool:
        """Is it in use, or was it refused or taken just now? Else that it is available is but a hope."""
        if index == situation.current:
            return True
        pool = situation.pools[index]
        return not pool.available

    # -- which pool ---------------------------------------------------------------------------------------------------

    def _best(self, situation: Situation, open_: list[int]) -> int | None:
        if len(open_) < 2:
            return open_[0] if open_ else None
        return min(open_, key=lambda index: (self._usd_per_useful_hour(situation, index), index))

    def _usd_per_useful_hour(self, situation: Situation, index: int) -> float:
        """With what the next restart will cost, at the rate at which the pool's machines are taken."""
        pool, belief = situation.pools[index], self._each[index]
        rate = belief.rate_per_second() if belief is not None and belief.available else 0.0
        usd = situation.pools[on_demand_pool(situation)].usd_per_hour
        fee = situation.move_usd if self._last_spot is not None and index != self._last_spot else 0.0
        return pool.usd_per_hour + rate * (situation.restart_seconds * usd + 3600 * fee)

    def _stay_or_move(self, situation: Situation, current: int, best: int | None) -> Decision:
        if best is None or best == current or not situation.sees_all:
            return Decision(current, "spot while it lasts")
        belief = self._each[best]
        rate = belief.rate_per_second() if belief is not None else 0.0
        lasts = min(situation.work_left_seconds, 1.0 / rate if rate > 0 else math.inf)
        here, there = (self._usd_per_useful_hour(situation, index) for index in (current, best))
        costs = situation.restart_seconds / 3600 * situation.pools[on_demand_pool(situation)].usd_per_hour
        if (here - there) * lasts / 3600 > MOVE_PAYS * (costs + situation.move_usd):
            return Decision(best, "a cheaper spot pool, by more than the move costs")
        return Decision(current, "spot while it lasts")


class _Together:
    """What any of several pools had to give."""

    def __init__(self, gap_seconds: float, available: bytes) -> None:
        self.gap_seconds, self.available = gap_seconds, available


def _near(one: float, other: float, least: float = 0.0) -> bool:
    return abs(one - other) <= DIFFERS * max(abs(one), least)


def _words(chosen: str, costs: tuple[float, float, float]) -> str:
    names = ("wait", "spot", "on-demand")
    told = [f"{name} ${usd:.2f}" for name, usd in zip(names, costs, strict=True) if usd < 1e6]
    return (
        f"{chosen} is expected to cost least ({', '.join(told)})"
        if len(told) > 1
        else f"{chosen} is all that is in time"
    )
