"""What a job is known to take, by machine type: measured once, kept in the store, read by whoever plans with it.

`calibrate` measures it on purpose; every run that ends adds what it saw.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from statistics import median
from typing import Any

from holdfast.errors import ConfigError, NotFoundError
from holdfast.ledger.run_state import Attempt
from holdfast.storage import ObjectStore

LEAST_STEPS = 2
"""An attempt that trained fewer says nothing about the time of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Of one machine type. Seconds are the cloud's."""

    cloud: str
    instance_type: str
    step_seconds: float
    """Saves at the job's own interval are in it."""
    boot_seconds: float
    """From the machine's launch, where billing begins, to the first step."""
    stop_seconds: float = 0.0
    """From the last step to the end of billing."""
    save_seconds: float = 0.0
    """What one save holds up the training."""
    commit_seconds: float = 0.0
    """Until a save is durable."""
    checkpoint_bytes: int = 0
    steps: int = 0
    """That were measured."""
    measured_at: str = ""

    @property
    def upload_bytes_per_second(self) -> float:
        return self.checkpoint_bytes / self.commit_seconds if self.commit_seconds else 0.0

    @property
    def restart_seconds(self) -> float:
        """What another machine costs in time that trains nothing."""
        return self.boot_seconds + self.stop_seconds


@dataclass(frozen=True, slots=True)
class JobProfile:
    job: str
    total_steps: int | None = None
    """Of the whole job; None: no program has told."""
    measurements: tuple[Measurement, ...] = field(default=())
    """One of each machine type, the newest last."""

    def of(self, instance_type: str) -> Measurement | None:
        """Of that type, else the slowest of what was measured: a plan must not count on more than it has seen."""
        known = [one for one in self.measurements if one.instance_type == instance_type]
        return known[-1] if known else max(self.measurements, key=lambda one: one.step_seconds, default=None)

    def work_seconds(self, instance_type: str) -> float | None:
        measured = self.of(instance_type)
        return self.total_steps * measured.step_seconds if measured and self.total_steps else None

    def with_measurements(self, more: Iterable[Measurement], total_steps: int | None) -> JobProfile:
        """The same types' older ones give way."""
        new = list(more)
        types = {(one.cloud, one.instance_type) for one in new}
        kept = [one for one in self.measurements if (one.cloud, one.instance_type) not in types]
        return JobProfile(self.job, total_steps or self.total_steps, (*kept, *new))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def profile_key(job: str) -> str:
    return f"profiles/{job}.json"


def read_profile(store: ObjectStore, job: str) -> JobProfile:
    """An empty one where nothing was measured. Raises ConfigError when the object is not ours."""
    try:
        body = store.get(profile_key(job))
    except NotFoundError:
        return JobProfile(job)
    try:
        content = json.loads(body)
        measurements = tuple(Measurement(**one) for one in content["measurements"])
        return JobProfile(content["job"], content["total_steps"], measurements)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"store: {profile_key(job)} in {store.url!r} is no profile of a job ({error!r}); delete it, and calibrate again"
        ) from error


def write_profile(store: ObjectStore, profile: JobProfile) -> None:
    store.put(profile_key(profile.job), profile.to_json().encode())


def measured(attempts: Sequence[Attempt]) -> list[Measurement]:
    """What ended attempts tell, one for each machine type that trained long enough."""
    by_type: dict[tuple[str, str], list[Attempt]] = {}
    for attempt in attempts:
        if attempt.step_seconds and attempt.trained_steps >= LEAST_STEPS and attempt.launched_at:
            by_type.setdefault((attempt.pool.cloud, attempt.pool.instance_type), []).append(attempt)
    return [_measurement(cloud, kind, group) for (cloud, kind), group in sorted(by_type.items())]


def _measurement(cloud: str, instance_type: str, attempts: Sequence[Attempt]) -> Measurement:
    steps = sum(attempt.trained_steps for attempt in attempts)
    seconds = sum(attempt.trained_steps * (attempt.step_seconds or 0.0) for attempt in attempts)
    commits = sum(attempt.report.get("commits", 0) for attempt in attempts)
    sizes = [attempt.report["bytes_per_commit"] for attempt in attempts if attempt.report.get("bytes_per_commit")]

    def per_commit(name: str) -> float:
        total = sum(attempt.report.get("totals", {}).get(name, 0.0) for attempt in attempts)
        return total / commits if commits else 0.0

    ended = max(attempt.terminated_at for attempt in attempts if attempt.terminated_at)
    return Measurement(
        cloud=cloud,
        instance_type=instance_type,
        step_seconds=seconds / steps,
        boot_seconds=median([attempt.boot_seconds or 0.0 for attempt in attempts]),
        stop_seconds=median(_stops(attempts) or [0.0]),
        save_seconds=per_commit("stall_seconds"),
        commit_seconds=per_commit("commit_seconds"),
        checkpoint_bytes=sizes[-1] if sizes else 0,
        steps=steps,
        measured_at=ended.isoformat(),
    )


def _stops(attempts: Sequence[Attempt]) -> list[float]:
    """Only of machines that ended in order: what was taken trained to its end. One that was asked to stop commits then."""
    stops = []
    for attempt in attempts:
        asked = attempt.outcome in ("moved", "cancelled", "over-budget")
        last = attempt.marks.get("finished") or (attempt.marks.get("preempting") if asked else None)
        last = last and (attempt.last_step_at or last)
        if last and attempt.terminated_at:
            stops.append(_since(last, attempt.terminated_at))
    return stops


def _since(start: datetime | None, end: datetime | None) -> float:
    return max(0.0, (end - start).total_seconds()) if start and end else 0.0
