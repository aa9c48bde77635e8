"""A training loop that tells of saves as the checkpointer does when they are in trouble: one late, one not worth beginning."""

import json
import os
import time
from datetime import UTC, datetime

import holdfast


def tell(kind: str, **fields: object) -> None:
    with open(os.environ["HOLDFAST_TELEMETRY"], "a") as telemetry:
        telemetry.write(json.dumps({"kind": kind, "at": datetime.now(UTC).isoformat(), **fields}) + "\n")


run = holdfast.attach(every="1000 steps")
for step in run.steps(100):
    run.report(loss=1 / step)
    time.sleep(0.02)
    if step == 10:
        tell("commit-late", step=10, seconds=12.4, budget_seconds=10.0)
    if step == 20:
        tell("commit-failed", step=10, error="the disk is full")
        tell("commit-late", step=20, seconds=75.0, budget_seconds=60.0)
        tell("commit-late", step=20, seconds=90.0, budget_seconds=60.0)  # the same save, tried again
        tell("notice-skipped", step=20, reason="12 GB do not fit the 30 s that are left")
