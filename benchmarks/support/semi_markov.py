"""Traces of a market whose hazards are known, and what a job costs in it at best: an exact program over every tick of age."""

from __future__ import annotations

from math import gcd

import numpy as np

from benchmarks.support.tick_market import Setting
from holdfast.placement.hazards import Library
from holdfast.placement.situation import Decision, Situation

TICK_SECONDS = 600.0
KNOWN = Library(
    edges_seconds=(0.0, 600.0, 1200.0, 2400.0, 4200.0, 7200.0, 12600.0),
    rates=(
        tuple(tuple(one / TICK_SECONDS for one in state) for state in (
            (0.36, 0.25, 0.15, 0.10, 0.06, 0.04, 0.02),
            (0.30, 0.22, 0.15, 0.08, 0.05, 0.03, 0.015),
        )),
    ),
    switching=((1.0,),),
    weights=(1.0,),
    source="invented",
)  # fmt: skip


def hazards_by_age(library: Library) -> np.ndarray:
    """Probability that a stretch ends at its n-th tick, shape (2, ages); the last age stands for all above."""
    ages = np.arange(int(library.edges_seconds[-1] / TICK_SECONDS) + 1)
    bins = library.bins(ages * TICK_SECONDS)
    return -np.expm1(-library.rate_array[0][:, bins] * TICK_SECONDS)


def draw(library: Library, ticks: int, seed: int) -> tuple[bytes, np.ndarray]:
    """A trace, and at every tick the age of its stretch, from 0."""
    hazards, source = hazards_by_age(library), np.random.default_rng(seed)
    chances, states, ages = source.random(ticks), np.zeros(ticks, np.uint8), np.zeros(ticks, int)
    state, age = int(source.random() < 0.5), 0
    for tick in range(ticks):
        states[tick], ages[tick] = state, age
        if chances[tick] < hazards[state, min(age, hazards.shape[1] - 1)]:
            state, age = 1 - state, 0
        else:
            age += 1
    return states.tobytes(), np.minimum(ages, hazards.shape[1] - 1)


class Exact:
    """The policy of `optimum`: it knows the hazards, and is told the stretch's age."""

    asks_while_running = True

    def __init__(self, choices: np.ndarray, unit_seconds: float, states: bytes, ages: np.ndarray) -> None:
        """`states`, `ages`: of the run's ticks, of which only the present one's are looked at."""
        self._choices, self._unit, self._states, self._ages = choices, unit_seconds, states, ages

    def decide(self, situation: Situation) -> Decision:
        tick = round(situation.now_seconds / situation.tick_seconds)
        current = situation.current
        machine = 0 if current is None else 2 if current else 1
        left = round((situation.deadline_seconds - situation.now_seconds) / situation.tick_seconds)
        slack = situation.slack_seconds + situation.restart_seconds - situation.pending_seconds
        units = max(0, int(slack / self._unit + 1e-6))
        choice = self._choices[left, self._states[tick], self._ages[tick], machine, units]
        return Decision((None, 0, 1)[choice], "exact")


def optimum(setting: Setting, library: Library) -> tuple[np.ndarray, np.ndarray, float]:
    """Least expected dollars at a run's start, by state and age of the stretch, shape (2, ages); what to do (0: wait, 1: spot,
    2: on-demand), shape (ticks left, 2, ages, machine, slack); and the unit of slack in seconds.
    """
    tick_seconds, overhead_seconds = round(setting.tick_seconds), round(setting.overhead_hours * 3600)
    unit = gcd(tick_seconds, overhead_seconds)
    tick, launch = tick_seconds // unit, overhead_seconds // unit
    slack = round((setting.deadline_hours - setting.work_hours) * 3600 / unit)
    spot = setting.spot_usd_per_hour * setting.tick_seconds / 3600
    on_demand = setting.on_demand_usd_per_hour * setting.tick_seconds / 3600
    ends = hazards_by_age(library)[..., None]
    ages = ends.shape[1]
    older = np.minimum(np.arange(ages) + 1, ages - 1)
    none = np.full((2, ages, slack + 1), np.inf)
    demand, on_spot = none.copy(), none.copy()

    def expected(value: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (1 - ends) * value[:, older] + ends * value[::-1, :1]

    def less(value: np.ndarray, units: int) -> np.ndarray:
        moved = np.full_like(value, np.inf)
        if units <= slack:
            moved[..., units:] = value[..., : slack + 1 - units]
        return moved

    choices = np.zeros((setting.ticks + 1, 2, ages, 3, slack + 1), np.int8)
    for left in range(1, setting.ticks + 1):
        for value in (none, demand, on_spot):
            value[..., (left - 1) * tick :] = 0.0
        on_spot[0] = none[0]
        after_spot, after_demand, after_none = expected(on_spot), expected(demand), expected(none)
        start_spot = spot + less(after_spot, launch)
        wait = less(after_none, tick)
        start_spot[0] = np.inf
        stay_spot = spot + after_spot
        stay_spot[0] = np.inf
        start_demand = on_demand + less(after_demand, launch)
        options = [
            np.stack([wait, start_spot, start_demand]),
            np.stack([wait, stay_spot, start_demand]),
            np.stack([wait, start_spot, on_demand + after_demand]),
        ]
        none, on_spot, demand = (option.min(axis=0) for option in options)
        for machine, option in enumerate(options):
            choices[left, :, :, machine] = option.argmin(axis=0)
    return none[..., slack], choices, float(unit)
