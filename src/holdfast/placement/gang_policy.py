"""When a gang forms, and when a formation is over: plain values in, a plain value out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

LAST_CALL_SECONDS = 30.0
"""How long those who are there wait for a member that runs and does not answer; later it joins the next formation."""
FIRST_CALL_SECONDS = 120.0
"""The same before the first formation, and for machines that boot beside one that is to take them in."""


STAND_STILL_SECONDS = 900.0
"""Machines that are too few to train, and get no company where they are, are paid for in vain for so long."""
FAILURES_TOLD = 4
"""Of machines whose program failed in the same formation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a member said that waits for the next formation."""

    member: str
    address: str
    port: int
    at: datetime
    outcome: str | None = None
    """How it left the last one; None: it was not in it."""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GangSituation:
    """Only what is knowable at `now`."""

    now: datetime
    machines: int
    min_machines: int
    members: Sequence[str]
    """Of the newest formation; empty before the first."""
    is_over: bool
    """The newest formation is; True before the first."""
    living: Set[str]
    """Machines that run and have not said that they end."""
    finished: Set[str]
    """Machines whose program has come to its end."""
    on_demand: Set[str]
    ready: Mapping[str, Ready]
    """By machine: who waits for the formation after the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    members: tuple[str, ...]
    host: str
    """Where the others meet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dissolve:
    gracious: bool
    """Nobody is missing: all may commit before they leave."""
    why: str


def decide_formation(situation: GangSituation) -> Form | Dissolve | None:
    """What to do now; None: go on as it is."""
    if situation.is_over:
        return _form(situation)
    return _dissolve(situation)


def failed_program(situation: GangSituation) -> Ready | None:
    """Who failed first in a formation that is over, where the program is to blame: all its members are there, alive.

    Where one is gone, the others' failures are its absence. `detail` has the words of those who failed later, too.
    """
    if not situation.is_over or not situation.members:
        return None
    told = [situation.ready.get(member) for member in situation.members if member in situation.living]
    if len(told) < len(situation.members):
        return None
    failures = [one for one in told if one and one.outcome == "program-failed"]
    if not failures or not all(told):
        return None
    first, *later = sorted(failures, key=lambda one: one.at)
    # Within a second it is chance whose end is seen first, the culprit's or that of those who lost it.
    more = "".join(f"\nmachine {one.member}: {one.detail}" for one in later[: FAILURES_TOLD - 1])
    return replace(first, detail=first.detail + more)


def is_to_move(situation: GangSituation, refused_since: datetime | None) -> bool:
    """Shall those that are left be given up, so that the gang may begin in another region? None: nothing was refused."""
    if not situation.is_over or not 0 < len(situation.living) < situation.min_machines or refused_since is None:
        return False
    return situation.now - refused_since > timedelta(seconds=STAND_STILL_SECONDS)


def _form(situation: GangSituation) -> Form | None:
    candidates = sorted(situation.ready.keys() & situation.living)
    if len(candidates) < situation.min_machines:
        return None
    # Machines that still boot are not waited for by those that have trained together.
    awaited = {member for member in situation.members if member in situation.living} or situation.living
    patience = LAST_CALL_SECONDS if situation.members else FIRST_CALL_SECONDS
    if len(candidates) < situation.machines and awaited - set(candidates) and not _waited(situation, patience):
        return None
    chosen = candidates[: situation.machines]
    # What is least likely to be taken holds the others together.
    first = sorted(chosen, key=lambda member: (member not in situation.on_demand, situation.ready[member].at))
    return Form(members=tuple(chosen), host=first[0])


def _dissolve(situation: GangSituation) -> Dissolve | None:
    members = set(situation.members)
    gone = sorted(members - situation.living - situation.finished)
    left = sorted(members & situation.ready.keys() - set(gone) - situation.finished)
    if gone or left:
        names = [f"{', '.join(gone)} gone"] * bool(gone) + [f"{', '.join(left)} left it"] * bool(left)
        return Dissolve(gracious=False, why="; ".join(names))
    if situation.finished & members:
        return None
    newcomers = sorted(situation.ready.keys() & situation.living - members)
    booting = situation.living - members - set(newcomers)
    if newcomers and len(members) < situation.machines and (not booting or _waited(situation, FIRST_CALL_SECONDS)):
        return Dissolve(gracious=True, why=f"{', '.join(newcomers)} joined")
    return None


def _waited(situation: GangSituation, seconds: float) -> bool:
    """Since the last of those who are there came. Machines' clocks and ours may differ by less than this matters."""
    came = [ready.at for member, ready in situation.ready.items() if member in situation.living]
    return bool(came) and situation.now - max(came) > timedelta(seconds=seconds)
