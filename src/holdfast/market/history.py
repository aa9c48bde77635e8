"""What became of every machine that runs on a store have asked for: the history that estimates are made from.

One small object for each thing that a run's journal says of ends, created conditionally under a name that only that run
gives: no run overwrites another's, and recording again changes nothing. A day that is over is gathered into one object
for fast reading; it says of how many it is made, so that a late-comer is missed by nobody.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from holdfast.drivers.protocol import CapacityPool
from holdfast.errors import AlreadyExistsError, HoldfastError, NotFoundError
from holdfast.runtime.contract import Outcome
from holdfast.storage import ObjectStore

log = logging.getLogger(__name__)

LIVES, DAYS = "history/lives/", "history/days/"
READERS = 16
CLOCKS_DIFFER = timedelta(hours=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One machine from its launch to its end, or a request that was refused."""

    run: str
    token: str
    """The attempt's number, the machine's id, or the round: unique in the run."""
    pool: CapacityPool
    launched_at: datetime | None
    """None: no machine came."""
    ended_at: datetime
    """Of a refusal: when it was heard."""
    recorded_at: datetime
    """When the journal's entry of its end was written; the same for all that one entry tells of."""
    outcome: Outcome
    usd: float = 0.0

    @property
    def hours(self) -> float:
        return (self.ended_at - self.launched_at).total_seconds() / 3600 if self.launched_at else 0.0

    @property
    def preempted(self) -> bool:
        return self.launched_at is not None and self.outcome in ("preempted", "lost")

    @property
    def refused(self) -> bool:
        return self.launched_at is None and self.outcome == "no-capacity"


class History:
    """Of one store. Threads may share it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._kept: dict[str, list[Life]] = {}
        self._lock = threading.Lock()

    def record(self, lives: Sequence[Life]) -> None:
        """Write what is not written yet. Raises TransientError; doing it again changes nothing."""
        by_key: dict[str, list[Life]] = defaultdict(list)
        for life in lives:
            by_key[_key(life)].append(life)
        written: set[str] = set()
        if len(by_key) > 1:
            starts = {key.rpartition("-")[0] for key in by_key}
            written = {info.key for start in starts for info in self._store.list(f"{start}-")}
        for key in sorted(set(by_key) - written):
            with contextlib.suppress(AlreadyExistsError):
                self._store.create(key, _to_json(by_key[key]))

    def lives(self, since: datetime, until: datetime | None = None) -> list[Life]:
        """Every life that ended, or refusal that was heard, in this time; by end. Raises TransientError."""
        days: dict[str, list[str]] = defaultdict(list)
        first = f"{since.astimezone(UTC) - CLOCKS_DIFFER:%Y-%m-%d}"
        for info in self._store.list(LIVES):
            day = info.key.removeprefix(LIVES).partition("/")[0]
            if day >= first:  # an end is recorded after it has come
                days[day].append(info.key)
        if not days:
            return []
        newest = max(days)
        with ThreadPoolExecutor(READERS) as readers:
            found = [life for day, keys in days.items() for life in self._of_day(day, keys, day < newest, readers)]
        return sorted(
            (life for life in found if since <= life.ended_at and (until is None or life.ended_at < until)),
            key=lambda life: (life.ended_at, life.run, life.token),
        )

    def _of_day(self, day: str, keys: Sequence[str], over: bool, readers: ThreadPoolExecutor) -> list[Life]:
        with self._lock:
            known = {key: self._kept[key] for key in keys if key in self._kept}
        missing = [key for key in keys if key not in known]
        if missing and (gathered := self._gathered(day, len(keys))) is not None:
            of_key: dict[str, list[Life]] = defaultdict(list)
            for life in gathered:
                of_key[_key(life)].append(life)
            known.update({key: of_key[key] for key in missing if key in of_key})
            missing = [key for key in missing if key not in known]
        for key, body in zip(missing, readers.map(self._store.get, missing), strict=True):
            known[key] = _from_json(body)
        with self._lock:
            self._kept.update(known)
        lives = [life for key in keys for life in known[key]]
        if over and len(missing) > 1:
            self._gather(day, lives, len(keys))
        return lives

    def _gathered(self, day: str, objects: int) -> list[Life] | None:
        try:
            content = json.loads(self._store.get(f"{DAYS}{day}.json"))
        except NotFoundError:
            return None
        return [_life(one) for one in content["lives"]] if content["objects"] == objects else None

    def _gather(self, day: str, lives: Sequence[Life], objects: int) -> None:
        """For the next reader. Whoever writes last has seen as much or is found out by the count."""
        content = {"objects": objects, "lives": [_fields(life) for life in lives]}
        try:
            self._store.put(f"{DAYS}{day}.json", json.dumps(content, separators=(",", ":")).encode())
        except HoldfastError as error:
            log.info("history of %s is not gathered: %s", day, error)


def days_between(start: date, end: date) -> list[date]:
    """From `start` up to, and without, `end`."""
    return [start + timedelta(days=number) for number in range((end - start).days)]


def _key(life: Life) -> str:
    at = life.recorded_at.astimezone(UTC)
    return f"{LIVES}{at:%Y-%m-%d}/{life.run}-{at:%H%M%S%f}.json"


def _to_json(lives: Sequence[Life]) -> bytes:
    return json.dumps([_fields(life) for life in lives], separators=(",", ":")).encode()


def _from_json(body: bytes) -> list[Life]:
    return [_life(one) for one in json.loads(body)]


def _fields(life: Life) -> dict[str, Any]:
    pool = life.pool
    return {
        "run": life.run,
        "token": life.token,
        "pool": [pool.cloud, pool.region, pool.zone, pool.instance_type, pool.provisioning_model],
        "launched_at": life.launched_at.isoformat() if life.launched_at else None,
        "ended_at": life.ended_at.isoformat(),
        "recorded_at": life.recorded_at.isoformat(),
        "outcome": life.outcome,
        "usd": life.usd,
    }


def _life(fields: dict[str, Any]) -> Life:
    launched_at = fields["launched_at"]
    return Life(
        run=fields["run"],
        token=fields["token"],
        pool=CapacityPool(*fields["pool"]),
        launched_at=datetime.fromisoformat(launched_at) if launched_at else None,
        ended_at=datetime.fromisoformat(fields["ended_at"]),
        recorded_at=datetime.fromisoformat(fields["recorded_at"]),
        outcome=fields["outcome"],
        usd=fields["usd"],
    )
