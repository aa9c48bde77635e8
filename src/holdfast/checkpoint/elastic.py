"""Going on in another world: what a changed number of ranks does to random numbers, learning rates and data."""

from __future__ import annotations

import hashlib
import logging
import math
import random
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from holdfast.checkpoint.sampling import ShuffledBatches
from holdfast.errors import ConfigError

logger = logging.getLogger(__name__)

LearningRateRule = Literal["none", "linear", "sqrt"]

GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""What a parameter group holds in units of the learning rate: OneCycleLR and SWALR keep theirs there."""
SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "eta_min", "_last_lr")


# -- random numbers ---------------------------------------------------------------------------------------------------


def rank_seed(seed: int, step: int, rank: int, world_size: int) -> int:
    """The seed of a rank's random streams when it goes on after `step` in a world of another size; below 2**63.

    The saved states belong to ranks that are no more. A hash of the four takes their place, so that no two ranks share
    a stream, none meets one it had before, and the same resume gives the same numbers again.
    """
    return hashed(f"rank {seed} {step} {rank} {world_size}")


def reseed(seed: int, step: int, rank: int, world_size: int, generators: Mapping[str, Any] | None = None) -> int:
    """Seed what this process draws from by `rank_seed`, which is returned: Python, NumPy and torch on every device,
    and `generators` (torch.Generator or numpy.random.Generator), each by its name.
    """
    value = rank_seed(seed, step, rank, world_size)
    seed_this_process(value)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(value)  # the devices too
    for name, generator in (generators or {}).items():
        own = hashed(f"{value} {name}")
        if hasattr(generator, "bit_generator"):
            generator.bit_generator.state = type(generator.bit_generator)(own).state
        else:
            generator.manual_seed(own)
    return value


def seed_this_process(seed: int) -> None:
    """Python, NumPy and torch on the processor: cheap enough for every sample (about 15 µs)."""
    random.seed(seed)
    # The upper half: torch takes the lower one for the same kind of generator, which would give NumPy the same bits.
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed >> 31)
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(seed)


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# -- learning rates ---------------------------------------------------------------------------------------------------


def learning_rate_factor(rule: LearningRateRule, old_global_batch: int, new_global_batch: int) -> float:
    """What a learning rate is multiplied by when the global batch changes.

    'linear': with the batch (SGD; Goyal et al. 2017, arXiv:1706.02677); 'sqrt': with its square root, which keeps the
    variance of the step (Krizhevsky 2014, arXiv:1404.5997); 'none': 1.
    Raises ConfigError for another rule, and for a batch that is not above zero.
    """
    if old_global_batch < 1 or new_global_batch < 1:
        raise ConfigError(f"a global batch of {min(old_global_batch, new_global_batch)}: it must be above zero")
    ratio = new_global_batch / old_global_batch
    match rule:
        case "none":
            return 1.0
        case "linear":
            return ratio
        case "sqrt":
            return math.sqrt(ratio)
    raise ConfigError(f"learning-rate rule {rule!r}: write 'none', 'linear' or 'sqrt'")


def scale_learning_rates(
    rule: LearningRateRule,
    old_global_batch: int,
    new_global_batch: int,
    optimizers: Iterable[Any],
    schedulers: Iterable[Any] = (),
) -> float:
    """Multiply the learning rates of torch optimizers, and all that is still to come of torch schedulers.

    Call it once, after both were restored: from then on every rate is the factor, which is returned, times what it
    would have been. A floor such as `eta_min` or `min_lr` is multiplied too. A scheduler of your own must keep its
    rates where torch's do (`base_lrs`), or be scaled by you.
    """
    factor = learning_rate_factor(rule, old_global_batch, new_global_batch)
    if factor == 1.0:
        return factor
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = [float(group["lr"]) for group in groups]
    scaled: set[int] = set()  # a tensor may be the rate of two groups, and stand in the scheduler as well
    for group in groups:
        for name in GROUP_RATES:
            if name in group:
                group[name] = _times(group[name], factor, scaled)
    for scheduler in _flat(schedulers):
        for name in SCHEDULER_RATES:
            if hasattr(scheduler, name):
                setattr(scheduler, name, _times(getattr(scheduler, name), factor, scaled))
    after = [float(group["lr"]) for group in groups]
    logger.warning(
        "learning rate x %.6g (%s, global batch %d -> %d): %s",
        *(factor, rule, old_global_batch, new_global_batch),
        ", ".join(dict.fromkeys(f"{old:.6g} -> {new:.6g}" for old, new in zip(before, after, strict=True))),
    )
    return factor


def _flat(schedulers: Iterable[Any]) -> list[Any]:
    """The schedulers and those they are made of (ChainedScheduler, SequentialLR), each once."""
    found: dict[int, Any] = {}
    waiting = list(schedulers)
    while waiting:
        scheduler = waiting.pop()
        if id(scheduler) not in found:
            found[id(scheduler)] = scheduler
            waiting += getattr(scheduler, "_schedulers", ())
    return list(found.values())


def _times(value: Any, factor: float, scaled: set[int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_times(item, factor, scaled) for item in value)
    if not hasattr(value, "mul_"):
        return None if value is None else value * factor
    if id(value) not in scaled:
        scaled.add(id(value))
        value.mul_(factor)  # in place: a compiled or captured optimizer step reads this very tensor
    return value


# -- data -------------------------------------------------------------------------------------------------------------


def load_loader(name: str, component: Any, state: dict[str, Any], *, same_world: bool) -> None:
    """`component.load_state_dict(state)`, for a component that may be a torchdata StatefulDataLoader.

    Its state says where one rank was among the samples of that rank. Only with ShuffledBatches as its batch_sampler is
    that a place in the whole, which holds for any number of ranks and of workers; any other would repeat and skip
    samples, or stop at an assertion. Raises ConfigError.
    """
    if not any(kind.__module__.partition(".")[0] == "torchdata" for kind in type(component).__mro__):
        component.load_state_dict(state)
        return
    main = state["_snapshot"]["_main_snapshot"] if "_snapshot" in state else state
    workers, workers_now = main.get("_num_workers", 0), getattr(component, "num_workers", 0)
    if same_world and workers == workers_now:
        component.load_state_dict(state)
        return
    batches = getattr(component, "batch_sampler", None)
    if not isinstance(batches, ShuffledBatches):
        saved_with = f"{workers} workers, not {workers_now}" if same_world else "another number of ranks"
        raise ConfigError(
            f"attach({name}=...) is a {type(component).__name__} saved with {saved_with}, and its position holds for that "
            "alone; to change it, give the loader batch_sampler=holdfast.ShuffledBatches(...), or use "
            "holdfast.ResumableLoader"
        )
    component.load_state_dict({})  # forgets what it has read ahead
    saved = main["_index_sampler_state"]
    if unsaid := state.get("_steps_since_snapshot", 0):  # with snapshot_every_n_steps above 1
        old = ShuffledBatches(
            saved["count"], saved["batch_size"], 0, 0, saved["world_size"], drop_last=batches.drop_last
        )
        old.load_state_dict(saved)
        for _ in range(unsaid):
            old.next()
        saved = old.state_dict()
    batches.load_state_dict(saved)
