"""`python -m holdfast.batch.several`: the workers of one machine, one process each, and one exit status for all."""

from __future__ import annotations

import glob
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from holdfast.runtime import contract

WORKERS = "HOLDFAST_WORKERS"  # how many; 0: one per GPU, and one where there is none
WORKER = "HOLDFAST_WORKER"  # the number of each, from 0
GPUS = "CUDA_VISIBLE_DEVICES"
LOOK_SECONDS = 0.1
LEAVE_SECONDS = 10.0
"""What the others may take to leave when one has failed."""


def main() -> int:
    number, gpus = workers_here(os.environ), gpus_here(os.environ)
    command = [sys.executable, "-m", "holdfast.batch.worker"]
    if number == 1:
        os.environ[WORKER] = "0"
        os.execv(command[0], command)
    started = [subprocess.Popen(command, env=environment_of(index, gpus, os.environ)) for index in range(number)]
    for asked in (signal.SIGTERM, signal.SIGINT):
        signal.signal(asked, lambda kind, _: [one.send_signal(kind) for one in started])
    return status_of_all(started)


def workers_here(environment: Mapping[str, str]) -> int:
    return int(environment.get(WORKERS, "0")) or max(1, len(gpus_here(environment)))


def gpus_here(environment: Mapping[str, str]) -> list[str]:
    """Those that programs of this machine see."""
    if GPUS in environment:
        return [name for name in environment[GPUS].split(",") if name not in ("", "-1")]
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def environment_of(index: int, gpus: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Each worker sees one GPU: its own, or one that it shares where there are more workers."""
    own = {GPUS: gpus[index % len(gpus)]} if gpus else {}
    return {**environment, WORKER: str(index), **own}


def status_of_all(workers: list[subprocess.Popen[bytes]]) -> int:
    """Once all have ended: that of the first to fail, else that of a preemption, else 0. When one fails, all leave."""
    good = (contract.EXIT_FINISHED, contract.EXIT_PREEMPTED_COMMITTED, contract.EXIT_PREEMPTED_UNCOMMITTED)
    failed: int | None = None
    kill_at = 0.0
    while True:
        statuses = [one.poll() for one in workers]
        if failed is None:
            failed = next((status for status in statuses if status is not None and status not in good), None)
            if failed is not None:
                kill_at = time.monotonic() + LEAVE_SECONDS
                for one in workers:
                    one.terminate()
        elif time.monotonic() > kill_at:
            for one in workers:
                one.kill()
        if None not in statuses:
            break
        time.sleep(LOOK_SECONDS)
    if failed is not None:
        return failed if failed > 0 else 128 - failed
    return max(status for status in statuses if status is not None)


if __name__ == "__main__":
    sys.exit(main())
