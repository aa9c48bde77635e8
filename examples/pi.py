"""What one machine of a fleet does in examples/fleet.yaml: throws darts, from a seed of its own, and says what pi is."""

import os
import random
import sys
import time

seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
member = os.environ.get("HOLDFAST_MEMBER", "alone")
draw = random.Random(member)
until = time.monotonic() + seconds
darts = inside = 0
while time.monotonic() < until:
    for _ in range(10_000):
        inside += draw.random() ** 2 + draw.random() ** 2 < 1
    darts += 10_000
    time.sleep(0.05)  # several of these share one computer on the local cloud
print(f"{member}: after {darts:,} darts pi is {4 * inside / darts:.5f}", flush=True)
