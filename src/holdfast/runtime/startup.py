"""The start-up script that every machine of every cloud boots with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib.resources import files

from holdfast.errors import ConfigError

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def startup_script(environment: Mapping[str, str]) -> str:
    """User data: `environment` as quoted exports, then startup.sh. Raises ConfigError for a name no shell takes."""
    for name in environment:
        if not VARIABLE.fullmatch(name):
            raise ConfigError(f"environment variable {name!r}: use letters, digits and underscores only")
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(environment.items()))
    return "#!/bin/bash\n" + exports + files("holdfast.runtime").joinpath("startup.sh").read_text()


SHUTDOWN_SCRIPT = """#!/bin/bash
# GCP runs this when the machine is told to stop, from the folder that the start-up script was run from.
# The agent turns SIGTERM into a notice.
kill -TERM "$(cat "${HOLDFAST_WORK:-$PWD}/work/agent.pid")"
"""
