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


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """Every so many steps, every so many seconds, or (both None) at the spacing that loses least."""

    every_steps: int | None = None
    every_seconds: float | None = None
    max_to_keep: int = 3
    compression: Literal["auto", "off"] = "auto"
    mean_seconds_between_preemptions: float | None = None

    def __post_init__(self) -> None:
        for name in ("every_steps", "every_seconds", "max_to_keep", "mean_seconds_between_preemptions"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is {value!r}; it must be above zero")
        if self.compression not in ("auto", "off"):
            raise ConfigError(f"compression is {self.compression!r}; write 'auto' or 'off'")
        if self.every_steps and self.every_seconds:
            raise ConfigError("every_steps and every_seconds contradict each other; give one of them")

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def from_json(cls, text: str) -> CheckpointPolicy:
        return cls(**json.loads(text))

    def is_due(self, steps: int, seconds: float, save_seconds: float | None) -> bool:
        """`steps` and `seconds` since the last save (or the start); `save_seconds`: what a save was seen to cost."""
        if self.every_steps:
            return steps >= self.every_steps
        if self.every_seconds:
            return seconds >= self.every_seconds
        if save_seconds is None:
            return steps >= FIRST_SAVE_STEPS or seconds >= FIRST_SAVE_SECONDS
        mean = self.mean_seconds_between_preemptions or DEFAULT_MEAN_SECONDS_BETWEEN_PREEMPTIONS
        return seconds >= auto_interval_seconds(save_seconds, mean)


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
