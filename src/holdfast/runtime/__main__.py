"""`python -m holdfast.runtime FOLDER`: the agent, started by the machine's start-up script."""

import json
import logging
import os
import sys
from pathlib import Path

from holdfast.runtime.agent import Agent
from holdfast.runtime.gang_agent import GangAgent
from holdfast.serving.agent import ServeAgent

logging.basicConfig(level=logging.INFO, format="holdfast: agent %(levelname)s %(message)s")
work = Path(sys.argv[1])
(work / "agent.pid").write_text(str(os.getpid()))
try:
    orders = json.loads((work / "agent.json").read_text())
    kind = GangAgent if orders.get("gang") else ServeAgent if orders.get("serving") else Agent
    agent = kind(work)
except Exception as error:
    with open(work / "boot.log", "a") as boot_log:  # what startup.sh reports: we have no store
        boot_log.write(f"{error}\n")
    raise
agent.run()
