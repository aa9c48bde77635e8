"""Two sides of a comparison in turns of a second or two: while one runs, the other's processes are stopped.

On a machine with other programs on it a minute is not like the next; what happens to one side within a few seconds
happens to the other too. A side's time is that of its turns.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import psutil

TURN_SECONDS, LOOK_SECONDS = 1.5, 0.25
PATIENCE_SECONDS = 1800.0


@dataclass(slots=True, kw_only=True)
class Side:
    pid: int
    """Of the process that is stopped, with all below it."""
    begin: Callable[[], None]
    """Called at the beginning of its first turn."""
    ended_at: Callable[[], float | None]
    """Wall-clock time of its end; asked while it runs."""
    seconds: float = 0.0

    def stop(self) -> None:
        self._tell(signal.SIGSTOP)

    def go(self) -> None:
        self._tell(signal.SIGCONT)

    def _tell(self, word: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            for one in (parent, *parent.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(word)


def in_turns(first: Side, second: Side) -> None:
    """Both are waiting, and not stopped. Until both have ended; neither is stopped then."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    second.stop()
    begun: set[int] = set()
    left = [first, second]
    for side in cycle((first, second)):
        if side not in left:
            continue
        turn_began = time.time()
        side.go()
        if side.pid not in begun:
            begun.add(side.pid)
            side.begin()
        while (ended_at := side.ended_at()) is None and (len(left) == 1 or time.time() - turn_began < TURN_SECONDS):
            if time.monotonic() > give_up_at:
                raise SystemExit(f"two sides were not done after {PATIENCE_SECONDS:.0f} s")
            time.sleep(LOOK_SECONDS)
        if ended_at is None:
            side.stop()
            side.seconds += time.time() - turn_began
            continue
        side.seconds += ended_at - turn_began
        left.remove(side)
        if not left:
            return
