"""`python -m holdfast.runtime FOLDER`: the agent, started by the machine's start-up script."""

import logging
import os
import sys
from pathlib import Path

from holdfast.runtime.agent import Agent

logging.basicConfig(level=logging.INFO, format="holdfast: agent %(levelname)s %(message)s")
work = Path(sys.argv[1])
(work / "agent.pid").write_text(str(os.getpid()))
Agent(work).run()
