"""A program with a habit that many have: on SIGTERM it saves a folder, and leaves with a status of its own."""

import os
import signal
import sys
import time
from pathlib import Path

steps, status = int(sys.argv[1]), int(sys.argv[2])
folder = Path(os.environ["HOLDFAST_CHECKPOINT_DIRECTORY"])
step = int(os.environ.get("HOLDFAST_RESUME_STEP", "0"))
told = False


def hear(*_: object) -> None:
    global told
    told = True


signal.signal(signal.SIGTERM, hear)


def save() -> None:
    (folder / f"{step}.tmp").mkdir()
    (folder / f"{step}.tmp/state").write_text(str(step))
    (folder / f"{step}.tmp").rename(folder / str(step))


with open(os.environ["TRAINED"], "a", buffering=1) as trained:
    while step < steps:
        step += 1
        time.sleep(0.05)
        trained.write(f"{step}\n")
        if told:
            save()
            sys.exit(status)
save()
