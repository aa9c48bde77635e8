"""`python -m holdfast.runtime FOLDER`: the agent, started by the machine's start-up script."""

import logging
import sys
from pathlib import Path

from holdfast.runtime.agent import Agent

logging.basicConfig(level=logging.INFO, format="holdfast: agent %(levelname)s %(message)s")
Agent(Path(sys.argv[1])).run()
