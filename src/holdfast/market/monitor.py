"""Where machines are being taken too often just now: rates over a sliding window, and what follows from them.

Judged by a scheduled flow, which also knows the machines that still live; what it finds is one object in the store that
every run reads. It lapses by itself: a monitor that has died cools nothing for ever.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from holdfast.drivers.protocol import CapacityPool, Machine, Offer
from holdfast.errors import NotFoundError
from holdfast.market.history import Life
from holdfast.storage import ObjectStore

WINDOW = timedelta(hours=6)
MOST_OF_LAUNCHES = 0.25
MOST_PER_INSTANCE_HOUR = 0.1
LEAST_PREEMPTIONS = 2
"""One machine that is taken after ten minutes is a rate of six per hour, and an accident."""
VALID = timedelta(hours=1)
"""After which a judgement counts no more."""
ALL_COOLED_FACTOR = 0.5
"""On a fleet's spot share while every spot pool that fits it is cooled."""
KEY = "monitor/judgement.json"

Level = Literal["pool", "family", "region"]


@dataclass(frozen=True, slots=True, order=True)
class Scope:
    """A pool, a family of types in a region, or a whole region; spot only."""

    cloud: str
    region: str
    family: str = ""
    zone: str = ""
    instance_type: str = ""

    @property
    def level(self) -> Level:
        return "pool" if self.instance_type else "family" if self.family else "region"

    def covers(self, pool: CapacityPool) -> bool:
        return pool.provisioning_model == "spot" and self in scopes_of(pool)

    def __str__(self) -> str:
        if self.instance_type:
            return f"{self.cloud}/{self.zone}/{self.instance_type}"
        return f"{self.cloud}/{self.region}" + (f"/{self.family}" if self.family else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """What happened in one scope within the window."""

    scope: Scope
    machines: int
    """That ran in it, for however short a time."""
    preemptions: int
    hours: float
    """Machine hours within the window."""

    @property
    def per_instance_hour(self) -> float:
        return self.preemptions / self.hours if self.hours else 0.0

    @property
    def of_launches(self) -> float:
        return self.preemptions / self.machines if self.machines else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    scope: Scope
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    judged_at: datetime
    rates: tuple[Rate, ...] = ()
    alarms: tuple[Alarm, ...] = ()

    def cooled(self, pool: CapacityPool) -> str:
        """Why this pool comes after the others; empty: it does not."""
        return next((alarm.why for alarm in self.alarms if alarm.scope.covers(pool)), "")

    def spot_share(self, asked: float, offers: Iterable[Offer]) -> float:
        """A fleet's share of spot machines. As long as one pool that fits is calm, the ranking alone avoids the others."""
        spot = [offer.pool for offer in offers if offer.pool.provisioning_model == "spot"]
        return asked * ALL_COOLED_FACTOR if spot and all(self.cooled(pool) for pool in spot) else asked


def family_of(instance_type: str) -> str:
    """g5.xlarge is of g5, a2-highgpu-1g of a2."""
    return instance_type.partition(".")[0] if "." in instance_type else instance_type.partition("-")[0]


def scopes_of(pool: CapacityPool) -> tuple[Scope, Scope, Scope]:
    family = family_of(pool.instance_type)
    return (
        Scope(pool.cloud, pool.region, family, pool.zone, pool.instance_type),
        Scope(pool.cloud, pool.region, family),
        Scope(pool.cloud, pool.region),
    )


def judge(lives: Iterable[Life], living: Iterable[Machine], now: datetime, window: timedelta = WINDOW) -> Judgement:
    """Of spot machines only. `living`: those that run now, whose hours count as well."""
    start = now - window
    machines: dict[Scope, int] = defaultdict(int)
    preemptions: dict[Scope, int] = defaultdict(int)
    hours: dict[Scope, float] = defaultdict(float)
    parts: dict[Scope, set[Scope]] = defaultdict(set)

    def count(pool: CapacityPool, launched_at: datetime, ended_at: datetime, preempted: bool) -> None:
        if pool.provisioning_model != "spot" or ended_at <= start or launched_at >= now:
            return
        scopes = scopes_of(pool)
        seconds = (min(ended_at, now) - max(launched_at, start)).total_seconds()
        for number, scope in enumerate(scopes):
            machines[scope] += 1
            preemptions[scope] += preempted
            hours[scope] += max(0.0, seconds) / 3600
            if preempted and number:
                parts[scope].add(scopes[number - 1])

    for life in lives:
        if life.launched_at:
            count(life.pool, life.launched_at, life.ended_at, life.preempted)
    for machine in living:
        if machine.state != "terminated":
            count(machine.pool, machine.launched_at, now, False)
    rates = tuple(
        Rate(scope=scope, machines=machines[scope], preemptions=preemptions[scope], hours=hours[scope])
        for scope in sorted(machines)
    )
    alarms = []
    for rate in rates:
        # What one pool does is that pool's matter, and what one family does not the region's.
        wide_enough = rate.scope.level == "pool" or len(parts[rate.scope]) > 1
        if wide_enough and (why := _why_too_many(rate, window)):
            alarms.append(Alarm(scope=rate.scope, why=why))
    return Judgement(judged_at=now, rates=rates, alarms=tuple(alarms))


def _why_too_many(rate: Rate, window: timedelta) -> str:
    if rate.preemptions < LEAST_PREEMPTIONS:
        return ""
    seen = (
        f"{rate.scope}: {rate.preemptions} of {rate.machines} spot machines were taken in "
        f"{window.total_seconds() / 3600:g} h ({rate.per_instance_hour:.2f} per instance-hour)"
    )
    if rate.of_launches > MOST_OF_LAUNCHES:
        return f"{seen}, more than {MOST_OF_LAUNCHES:.0%}"
    if rate.per_instance_hour > MOST_PER_INSTANCE_HOUR:
        return f"{seen}, more than {MOST_PER_INSTANCE_HOUR:g} per instance-hour"
    return ""


def write_judgement(store: ObjectStore, judgement: Judgement) -> None:
    content = {
        "judged_at": judgement.judged_at.isoformat(),
        "rates": [dataclasses.asdict(rate) for rate in judgement.rates],
        "alarms": [dataclasses.asdict(alarm) for alarm in judgement.alarms],
    }
    store.put(KEY, json.dumps(content).encode())


def read_judgement(store: ObjectStore, now: datetime) -> Judgement:
    """The last one, without alarms where there is none that still counts. Raises TransientError."""
    try:
        content = json.loads(store.get(KEY))
    except NotFoundError:
        return Judgement(judged_at=now)
    judged_at = datetime.fromisoformat(content["judged_at"])
    if not timedelta(0) <= now - judged_at <= VALID:
        return Judgement(judged_at=now)
    return Judgement(judged_at=judged_at, rates=_rates(content["rates"]), alarms=_alarms(content["alarms"]))


def changes(before: Judgement, after: Judgement) -> tuple[list[Alarm], list[Scope]]:
    """Alarms that are new, and scopes that are calm again: what there is to tell."""
    was, now = {alarm.scope for alarm in before.alarms}, {alarm.scope for alarm in after.alarms}
    return [alarm for alarm in after.alarms if alarm.scope not in was], sorted(was - now)


def _rates(found: Sequence[dict[str, Any]]) -> tuple[Rate, ...]:
    return tuple(Rate(**{**one, "scope": Scope(**one["scope"])}) for one in found)


def _alarms(found: Sequence[dict[str, Any]]) -> tuple[Alarm, ...]:
    return tuple(Alarm(scope=Scope(**one["scope"]), why=one["why"]) for one in found)
