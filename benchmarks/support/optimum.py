"""What a job costs whose owner knows the future: an exact dynamic program over time, slack and machine.

Slack is what is left of the time when everything still to be done, overhead included, is taken off. A tick on a machine leaves
it as it is, a tick of waiting takes a tick of it, a launch the overhead. So work need not be a dimension of its own.
Moving between a machine's launch and the end of its overhead is priced as if the first overhead were to be paid in full;
nobody who knows the future does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

from benchmarks.support.tick_market import Setting


def optimal_usd(setting: Setting, pools: Sequence[bytes], starts: Sequence[int]) -> np.ndarray:
    """Of each start, knowing all `pools` at every tick. Shape (starts,); inf where the deadline can't be met."""
    tick_seconds, overhead_seconds = round(setting.tick_seconds), round(setting.overhead_hours * 3600)
    unit = gcd(tick_seconds, overhead_seconds) or tick_seconds
    wait, launch = tick_seconds // unit, overhead_seconds // unit
    slack = round((setting.deadline_hours - setting.work_hours) * 3600 / unit)
    spot = setting.spot_usd_per_hour * setting.tick_seconds / 3600
    on_demand = setting.on_demand_usd_per_hour * setting.tick_seconds / 3600
    available = np.stack([np.frombuffer(pool, np.uint8) for pool in pools]).astype(bool)
    begins = np.asarray(starts)
    zones, shape = len(pools), (len(begins), slack + 1)
    # Value by machine: the spot pools in use, on-demand, none after a spot pool. Without egress one "none" does.
    nones = zones if setting.move_usd else 1
    later = np.full((zones + 1 + nones, *shape), np.inf)
    for left in range(1, setting.ticks + 1):
        later[:, :, left * wait - wait :] = 0.0  # nothing is left to be done
        at = begins + setting.ticks - left
        there = available[:, at]
        started = np.stack([_shifted(later[zone], launch) for zone in range(zones)]) + spot
        started[~there] = np.inf
        on = _shifted(later[zones], launch) + on_demand
        now = np.empty_like(later)
        for none in range(nones):
            fee = np.array([setting.move_usd * (nones > 1 and zone != none) for zone in range(zones)])
            idle = np.minimum(_shifted(later[zones + 1 + none], wait), on)
            now[zones + 1 + none] = np.minimum(idle, (started + fee[:, None, None]).min(axis=0))
        # Who leaves on-demand is taken to have his checkpoint where it is cheapest: on-demand is to be had in every zone.
        idle = np.minimum(_shifted(later[zones + 1 :].min(axis=0), wait), started.min(axis=0))
        now[zones] = np.minimum(later[zones] + on_demand, idle)
        for zone in range(zones):
            leave = now[zones + 1 + (zone if nones > 1 else 0)]
            stay = later[zone] + spot
            now[zone] = np.where(there[zone][:, None], np.minimum(stay, leave), leave)
        later = now
    first = later[zones + 1 :].min(axis=0)[:, slack]
    return first


def _shifted(values: np.ndarray, units: int) -> np.ndarray:
    """The same with so much less slack; inf where there is none left."""
    moved = np.full_like(values, np.inf)
    if units < values.shape[-1]:
        moved[..., units:] = values[..., : values.shape[-1] - units] if units else values
    return moved
