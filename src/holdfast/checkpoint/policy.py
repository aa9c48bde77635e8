"""When to save."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

from holdfast.errors import ConfigError

FIRST_SAVE_STEPS, FIRST_SAVE_SECONDS = 10, 60.0
"""`auto` saves first after so many steps or seconds, whichever come first, to learn what a save costs."""
DEFAULT_MEAN_SECONDS_BETWEEN_PREEMPTIONS = 4 * 3600.0
MOST_OVERHEAD_FRACTION = 0.05
"""However likely a preemption is, saving takes no more than this share of the time."""
LONGEST_SECONDS = 1800.0
NOTICED_SHARE = 0.9
"""Of preemptions, that are announced: clouds promise no more than best effort. Where a commit surely fits into the notice,
only the others cost what was done since the last one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """Every so many steps, every so many seconds, or (both None) at the spacing that loses least."""

    every_steps: int | None = None
    every_seconds: float | None = None
    max_to_keep: int = 3
    compression: Literal["auto", "off"] = "auto"
    mean_seconds_between_preemptions: float | None = None
    hazards: tuple[tuple[float, float], ...] = ()
    """(age of the machine in seconds, interruptions per hour from then on), by age; empty: the mean holds at every age."""
    notice_seconds: float = 0.0
    """Between the cloud's notice and the end; 0: none is counted on."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_seconds", "max_to_keep", "mean_seconds_between_preemptions"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is {value!r}; it must be a number above zero")
        for name in ("every_steps", "max_to_keep"):
            if (value := getattr(self, name)) is not None and value != int(value):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number")
        if self.compression not in ("auto", "off"):
            raise ConfigError(f"compression is {self.compression!r}; write 'auto' or 'off'")
        if self.every_steps and self.every_seconds:
            raise ConfigError("every_steps and every_seconds contradict each other; give one of them")

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value not in (None, (), 0.0)})

    @classmethod
    def from_json(cls, text: str) -> CheckpointPolicy:
        fields = json.loads(text)
        return cls(**{**fields, "hazards": tuple((age, rate) for age, rate in fields.get("hazards", ()))})

    @property
    def is_automatic(self) -> bool:
        """The spacing is this policy's to choose, by what a save was seen to cost."""
        return not (self.every_steps or self.every_seconds)

    def is_due(
        self,
        steps: int,
        seconds: float,
        save_seconds: float | None = None,
        age_seconds: float = 0.0,
        commit_seconds: float = math.inf,
    ) -> bool:
        """`steps` and `seconds` since the last save (or the start); `save_seconds`: what a save was seen to cost;
        `age_seconds`: of the machine; `commit_seconds`: until a save that begins at a notice is surely durable.
        """
        if self.every_steps:
            return steps >= self.every_steps
        if self.every_seconds:
            return seconds >= self.every_seconds
        if save_seconds is None:
            return steps >= FIRST_SAVE_STEPS or seconds >= FIRST_SAVE_SECONDS
        return seconds >= auto_interval_seconds(
            save_seconds, self.mean_seconds_between_losses(age_seconds, commit_seconds)
        )

    def mean_seconds_between_losses(self, age_seconds: float, commit_seconds: float = math.inf) -> float:
        """At this age, between preemptions that cost what was done since the last save."""
        mean = self.mean_seconds_between_preemptions or DEFAULT_MEAN_SECONDS_BETWEEN_PREEMPTIONS
        rates = [rate for age, rate in self.hazards if age <= age_seconds]
        if rates and rates[-1] > 0:
            mean = 3600 / rates[-1]
        return mean / (1 - NOTICED_SHARE) if commit_seconds <= self.notice_seconds else mean


def checkpoint_interval_seconds(save_seconds: float, mean_seconds_between_preemptions: float) -> float:
    """Spacing of checkpoints that loses the least expected work.

    First-order, so only for saves much shorter than the mean life of a machine.
    Raises ConfigError unless both are positive. Source: Young, CACM 17(9), 1974.
    """
    if save_seconds <= 0 or mean_seconds_between_preemptions <= 0:
        raise ConfigError(
            f"save_seconds is {save_seconds!r}, mean_seconds_between_preemptions {mean_seconds_between_preemptions!r}; "
            "both must be above zero"
        )
    return math.sqrt(2 * save_seconds * mean_seconds_between_preemptions)


def auto_interval_seconds(save_seconds: float, mean_seconds_between_preemptions: float) -> float:
    """Young's spacing, within what is sensible: never so dense that saving costs more than 5 %, never above 30 min."""
    best = checkpoint_interval_seconds(max(save_seconds, 1e-6), mean_seconds_between_preemptions)
    return max(save_seconds / MOST_OVERHEAD_FRACTION, min(best, LONGEST_SECONDS))
