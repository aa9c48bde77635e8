"""A worker of the queues' tests: `python -m tests.programs.leasing hold|race URL NAME VISIBILITY_SECONDS [FILE]`."""

from __future__ import annotations

import os
import sys
import time

from holdfast.queues import open_queue


def hold(url: str, name: str, visibility_seconds: float) -> None:
    """Lease one item, say so, and do nothing more."""
    queue = open_queue(url, name, visibility_seconds=visibility_seconds)
    (lease,) = queue.lease(1, wait_seconds=30)
    print(lease.body.decode(), flush=True)
    time.sleep(600)


def race(url: str, name: str, visibility_seconds: float, log: str) -> None:
    """Lease, note when it was had and when it was given up, acknowledge; until nothing is left."""
    queue = open_queue(url, name, visibility_seconds=visibility_seconds)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while leases := queue.lease(3, wait_seconds=1.0):
        had = time.monotonic()
        time.sleep(0.002)
        given_up = time.monotonic()
        for lease in leases:
            os.write(file, f"{lease.body.decode()} {had} {given_up} {os.getpid()}\n".encode())
        queue.acknowledge(leases)
    queue.close()


if __name__ == "__main__":
    verb, url, name, visibility_seconds, *rest = sys.argv[1:]
    {"hold": hold, "race": race}[verb](url, name, float(visibility_seconds), *rest)
