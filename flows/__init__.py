"""The stories: each flow reads as the README tells it."""

DISPLAY_VARIABLE = "HOLDFAST_DISPLAY"
"""Set by our own command line: somebody looks at this terminal. A worker's flow runs print log lines instead."""
