"""A program with the most common mistake: part of what it computes with is not in the checkpoint."""

import sys
import time

import holdfast

run = holdfast.attach()
run.state.setdefault("weight", 1.0)
momentum = 0.0  # lost at every preemption
for _ in run.steps(int(sys.argv[1])):
    momentum = 0.9 * momentum + 0.01
    run.state["weight"] -= momentum
    run.report(loss=run.state["weight"])
    time.sleep(0.01)
