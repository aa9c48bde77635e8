"""A loop that is left with break."""

import holdfast

run = holdfast.attach()
for step in run.steps(100):
    if step == 7:
        break
