"""What ranks that train together must agree on: when to save, when to leave, when to stop.

Every rank of a state that is saved together must take its snapshot after the same step. So the ranks vote: one small
all-reduce every quarter of a second (or every step, where steps are longer), on a group of its own. Which steps have a
vote is agreed on in the vote before, so that no rank waits for another that does not come.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime

from holdfast.checkpoint import planner
from holdfast.checkpoint.persister import Ranks
from holdfast.errors import ConfigError

log = logging.getLogger(__name__)

VOTE_SECONDS = 0.25
MOST_STEPS_BETWEEN_VOTES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """What a rank says; agreed is the greatest of each."""

    save: float = 0.0
    stop: float = 0.0
    fenced: float = 0.0
    busy: float = 0.0
    notice: float = 0.0
    """Strength of the notice heard; 0: none."""
    reclaim_at: float = -float("inf")
    """Of the earliest reclaim: minus its POSIX time."""
    step_seconds: float = 0.0
    saved_step: float = -float("inf")
    """Minus the step last saved. One rank alone may have an older one than the others: its snapshot came to nothing."""


class Together:
    """The ranks of this program; with one, votes are its own and cost nothing."""

    def __init__(self) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch = sys.modules.get("torch")
        ready = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
        if ready:
            self.world_size, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        elif self.world_size > 1:
            raise ConfigError(
                f"WORLD_SIZE is {self.world_size}, but the ranks can't reach each other yet: call "
                "torch.distributed.init_process_group() before attach()"
            )
        self._group = None
        if self.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        (token,) = self.first_says(float(secrets.randbits(32)))
        self.ranks = Ranks(rank=self.rank, world_size=self.world_size, token=f"{int(token):08x}", tells=local == 0)
        self._next_vote_step = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first_says(self, *values: float) -> list[float]:
        """The first rank's values, on every rank."""
        if self._group is None:
            return list(values)
        torch = sys.modules["torch"]
        said = torch.tensor(values, dtype=torch.float64)
        torch.distributed.broadcast(said, src=0, group=self._group)
        return list(said.tolist())

    def check_alike(self, layout: list[str]) -> None:
        """Raises ConfigError on every rank when one has another layout than the first."""
        if self._group is None:
            return
        torch = sys.modules["torch"]
        text = "\n".join(layout).encode()
        (size,) = self.first_says(float(len(text)))
        said = torch.frombuffer(bytearray(text.ljust(int(size))[: int(size)] or b" "), dtype=torch.uint8)
        torch.distributed.broadcast(said, src=0, group=self._group)
        first = bytes(said.tolist()).decode().split("\n") if size else []
        here, there = set(layout), set(first)
        if not self.all_say(here == there):
            found = "; ".join(
                f"only rank {rank} has {', '.join(sorted(lines)[:3])}"
                for rank, lines in ((self.rank, here - there), (0, there - here))
                if lines
            )
            raise ConfigError(
                f"attach() was given other objects on rank {self.rank} than on rank 0: {found}. Ranks save one state "
                "together, and must have the same components and modules; the stages of a pipeline can't be saved yet"
                if found
                else "attach() was given other objects on another rank than on rank 0; that rank says which"
            )

    def first_decides(self, plan: Callable[[], planner.Decision]) -> planner.Decision:
        """What the first rank's plan says, on every rank."""
        if self._group is None:
            return plan()
        kinds = (planner.CommitNow, planner.TrainUntil, planner.WaitFor, planner.Leave, planner.Skip)
        said = [0.0, 0.0, 0.0]
        decision = None
        if self.is_first:
            decision = plan()
            at = decision.at if isinstance(decision, planner.TrainUntil) else getattr(decision, "until", None)
            step = decision.step if isinstance(decision, planner.WaitFor) else 0
            said = [kinds.index(type(decision)), at.timestamp() if at else -1.0, step]
        kind, instant, step = self.first_says(*said)
        at = datetime.fromtimestamp(instant, UTC) if instant >= 0 else None
        match kinds[int(kind)]:
            case planner.TrainUntil:
                return planner.TrainUntil(at)
            case planner.WaitFor:
                return planner.WaitFor(int(step), at)
            case planner.Skip:
                return decision or planner.Skip("as the first rank decided")
            case planner.Leave:
                return planner.Leave()
        return planner.CommitNow()

    def all_say(self, yes: bool) -> bool:
        return self._greatest([0.0 if yes else 1.0]) == [0.0]

    def agree(self, step: int, vote: Vote, every_steps: int | None) -> Vote | None:
        """What all say after `step`; None when this step has no vote. `every_steps`: a save is due so long after the last."""
        if self._group is None:
            return vote
        if step < self._next_vote_step:
            return None
        names = [one.name for one in fields(Vote)]
        agreed = Vote(**dict(zip(names, self._greatest(list(astuple(vote))), strict=True)))
        steps = VOTE_SECONDS / max(agreed.step_seconds, VOTE_SECONDS / MOST_STEPS_BETWEEN_VOTES)
        self._next_vote_step = step + max(1, int(steps))
        if every_steps is not None:
            saved_step = step if agreed.save and not agreed.busy else int(-agreed.saved_step)
            if saved_step + every_steps > step:
                self._next_vote_step = min(self._next_vote_step, saved_step + every_steps)
        if agreed.notice > 0:
            self._next_vote_step = step + 1  # every step counts now
        return agreed

    def _greatest(self, values: list[float]) -> list[float]:
        if self._group is None:
            return values
        torch = sys.modules["torch"]
        said = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return list(said.tolist())
