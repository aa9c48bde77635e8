"""A program that never checkpoints."""

import time

for _ in range(20):
    time.sleep(0.02)
print("done")
