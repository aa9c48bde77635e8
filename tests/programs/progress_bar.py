"""A program with a progress bar, which leaves the console's cursor in the middle of a line."""

import os
import time

import holdfast

run = holdfast.attach()
with open(os.environ["TRAINED"], "a", buffering=1) as trained:
    for step in run.steps(100):
        time.sleep(0.01)
        print(f"\r{step}%|####", end="")  # before the next line: when the agent is killed first, this ends the program
        trained.write(f"{step}\n")
