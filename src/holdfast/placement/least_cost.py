"""The policy for deadlines: what costs least, as far as anybody can know, and is in time for certain.

What each choice will cost comes from `value_tables`, weighed by what was seen of the pools (`hazards`). Several spot pools are
decided on as one, which has something to give while any of them has; which of them is then a matter of price and of how soon it
may be taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from holdfast.placement.hazards import Belief, Library
from holdfast.placement.situation import (
    UNSEEN,
    USED_UP,
    Decision,
    PoolHistory,
    Seen,
    Situation,
    is_safe,
    on_demand_pool,
)
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
        self._settled: tuple[bool, float, Decision] | None = None
        """The last decision to go on as it is, without spot: is that without a machine, and when was it?"""
        self._is_clear = False
        """Was on-demand expected to cost more by a whole tick of it? Then it will in the next ticks too."""
        self._untold: tuple[bool, float] | None = None
        """What was last seen of the spot pools together, and when, where no decision was to be made of it."""

    def decide(self, situation: Situation) -> Decision:
        current = situation.current
        pools = situation.pools
        if current is not None and pools[current].spot:
            self._last_spot = current
            # A machine that trains is left for no reason but a cheaper one, or a deadline that another tick would break.
            if len(pools) == 2 and self._any is not None and is_safe(situation, current):
                self._untold, self._settled = (True, situation.now_seconds), None
                return Decision(current, "spot while it lasts")
            self._settled = None
        spot = [index for index, pool in enumerate(pools) if pool.spot]
        if not spot:
            return Decision(on_demand_pool(situation), "there is no spot pool")
        if current is not None and not pools[current].spot and not is_safe(situation, spot[0]):
            return Decision(current, USED_UP)  # and it does not come back
        if (decision := self._goes_on(situation, spot)) is not None:
            return decision
        self._look(situation, spot)
        decision = self._choose(situation, spot)
        if not is_safe(situation, decision.pool):
            return Decision(on_demand_pool(situation), USED_UP)
        stays = decision.pool == current if current is not None else self._is_clear
        self._settled = (current is None, situation.now_seconds, decision) if stays else None
        return decision

    def _goes_on(self, situation: Situation, spot: list[int]) -> Decision | None:
        """While there is no spot, whether to be on demand or without a machine is asked again now and then only."""
        current, now = situation.current, situation.now_seconds
        if self._settled is None or self._settled[0] != (current is None):
            return None
        if now - self._settled[1] >= SETTLED_TICKS * situation.tick_seconds - 1e-6:
            return None
        pool, words = current, "on-demand while there is no spot" if current is not None else "waiting for spot"
        if any(situation.pools[index].available for index in spot):
            if situation.sees_all or current is not None or len(spot) > 1:
                return None
            pool, words = spot[0], "asking for spot again"
            if self._settled[2].pool == pool:
                words = self._settled[2].reason
        elif situation.sees_all or current is None:
            self._untold = (False, max(self._when(situation, index) for index in spot))
        return Decision(pool, words) if is_safe(situation, pool) else None

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
        now = self._now(situation)
        if best is not None and self._any.available:  # beside spot that is there, no tick is idle
            costs = math.inf, self._spot_usd(now, best, self._any), _demand_usd(now, 1, self._any)
        elif best is not None:
            costs = self._hoped(now, best, self._any)
        else:
            costs = _wait_usd(now, self._any), math.inf, _demand_usd(now, 0, self._any)
        wait_usd, spot_usd, demand_usd = costs
        self._is_clear = min(wait_usd, spot_usd) < demand_usd - now.on_demand_usd
        if best is not None and spot_usd <= min(wait_usd, demand_usd):
            return Decision(best, _words("spot", costs))
        if wait_usd < demand_usd * (1 - LEAST_SAVING) and is_safe(situation, None):
            return Decision(None, _words("wait", costs))
        return Decision(now.on_demand, _words("on-demand", costs))

    # -- what it will cost --------------------------------------------------------------------------------------------

    def _now(self, situation: Situation) -> _Now:
        found, on_demand = self._table(situation), on_demand_pool(situation)
        step = found.step_seconds
        return _Now(
            situation,
            found,
            found.place(situation.deadline_seconds - situation.now_seconds),
            situation.slack_seconds / step,
            situation.restart_seconds / step,
            on_demand,
            situation.pools[on_demand].usd_per_hour * step / 3600,
        )

    def _hoped(self, now: _Now, spot: int, belief: Belief) -> tuple[float, float, float]:
        """The costs of a pool that had nothing when it was last asked. Who has no machine asks for nothing.

        To ask on demand means to leave that machine; where there is nothing, the run stands as if it had none.
        """
        wait_usd, demand_usd = _wait_usd(now, belief), _demand_usd(now, 0, belief)
        there_usd = self._spot_usd(now, spot, belief.changed())
        if now.situation.current is None:
            return wait_usd, there_usd, demand_usd
        chance = (self._each[spot] or belief).changed_by(now.situation.now_seconds)
        else_usd = min(wait_usd, _demand_usd(now, 0, belief, leaving=True))
        return wait_usd, chance * there_usd + (1 - chance) * else_usd, demand_usd

    def _spot_usd(self, now: _Now, spot: int, belief: Belief) -> float:
        """Of a machine of that pool, launched now, and all after it."""
        slack = now.slack_steps - now.restart_steps
        if slack < 0:
            return math.inf
        usd = now.situation.pools[spot].usd_per_hour * now.found.step_seconds / 3600
        if self._last_spot is not None and spot != self._last_spot:
            usd += now.situation.move_usd
        return usd + belief.expected(now.found.on_spot[now.place], *now.found.among(slack))

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
            self._any = self._first(situation, spot)
            self._each = [None] * len(pools)
            if len(spot) > 1:
                for index in spot:
                    self._each[index] = self._first(situation, [index])
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

    def _first(self, situation: Situation, spot: list[int]) -> Belief:
        hoped = any(situation.pools[place].available for place in spot)
        histories = [situation.history[place] if place < len(situation.history) else None for place in spot]
        history = histories[0] if len(spot) == 1 else _together(histories)
        found = Belief.of_history(self._library, history, situation.now_seconds, hoped) if history else None
        return found or Belief(self._library, hoped, situation.now_seconds)

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


class _Now(NamedTuple):
    """A situation on the tables' grid."""

    situation: Situation
    found: Tables
    place: int
    slack_steps: float
    restart_steps: float
    on_demand: int
    on_demand_usd: float
    """Of a step."""


def _wait_usd(now: _Now, belief: Belief) -> float:
    """Of a tick without a machine while there is no spot, and all after it."""
    if now.slack_steps < 1.0:
        return math.inf
    return belief.expected(now.found.on_none[now.place, 0], *now.found.among(now.slack_steps - 1.0))


def _demand_usd(now: _Now, state: int, belief: Belief, leaving: bool = False) -> float:
    """Of on-demand: the machine in use, unless it is one that is left, or a new one. `state`: 1, there is spot."""
    pending = now.restart_steps
    if now.situation.current is not None and not leaving:
        pending = now.situation.pending_seconds / now.found.step_seconds
    slack = now.slack_steps - pending
    if slack < 0:
        return now.on_demand_usd * math.ceil(now.situation.work_left_seconds / now.found.step_seconds + pending - 1e-9)
    return now.on_demand_usd + belief.expected(now.found.on_demand[now.place, state], *now.found.among(slack))


def _together(histories: Sequence[PoolHistory | None]) -> PoolHistory | None:
    """What any of several pools had to give; that none had anything is seen only where all were looked at."""
    seen = [one for one in histories if one is not None]
    if not seen or len({one.gap_seconds for one in seen}) > 1:
        return None
    ticks = max(len(one.available) for one in seen)
    records = [bytes([UNSEEN]) * (ticks - len(one.available)) + bytes(one.available) for one in seen]
    if len(seen) < len(histories):
        records.append(bytes([UNSEEN]) * ticks)
    together = bytes(1 if 1 in at_once else max(at_once) for at_once in zip(*records, strict=True))
    return Seen(seen[0].gap_seconds, together)


def _near(one: float, other: float, least: float = 0.0) -> bool:
    return abs(one - other) <= DIFFERS * max(abs(one), least)


def _words(chosen: str, costs: tuple[float, float, float]) -> str:
    names = ("wait", "spot", "on-demand")
    told = [f"{name} ${usd:.{2 if usd >= 1 else 4}f}" for name, usd in zip(names, costs, strict=True) if usd < 1e6]
    return (
        f"{chosen} is expected to cost least ({', '.join(told)})"
        if len(told) > 1
        else f"{chosen} is all that is in time"
    )
