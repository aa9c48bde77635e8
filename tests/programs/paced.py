"""A training loop whose steps last so many seconds of the cloud's clock, however busy the computer is: what a step takes too
long is taken off the next ones.
"""

import sys

import holdfast
from holdfast.clock import clock_from_environment

STEPS, STEP_SECONDS = int(sys.argv[1]), float(sys.argv[2])
clock = clock_from_environment()
run = holdfast.attach()
began_at, done = clock.now(), run.resumed_step
run.state.setdefault("trained", 0)
for step in run.steps(STEPS):
    run.state["trained"] += 1
    run.report(step=step)
    clock.sleep((step - done) * STEP_SECONDS - (clock.now() - began_at).total_seconds())
