"""A training loop without PyTorch: it starts in a blink, so that a story about machines need not wait for imports."""

import os
import random
import sys
import time

import holdfast

STEPS, PAUSE_SECONDS = int(sys.argv[1]), float(sys.argv[2])
random.seed(7)
run = holdfast.attach()
run.state.setdefault("weight", 1.0)
with open(os.environ["TRAINED"], "a", buffering=1) as trained:
    for step in run.steps(STEPS):
        run.state["weight"] *= 1 - random.random() * 1e-2
        run.report(loss=run.state["weight"])
        time.sleep(PAUSE_SECONDS)
        trained.write(f"{step}\n")  # what was really trained, told by nobody but the program
        if os.environ.get("FAIL_AT") == str(step) and os.environ.get("HOLDFAST_ATTEMPT") == "1":
            for number in range(80):
                print(f"line {number} before the end")
            raise SystemExit(3)
print("trained to the end, weight", run.state["weight"])
