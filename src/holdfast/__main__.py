"""`holdfast COMMAND`: the commands of the checkout in the current folder (`python -m flows`)."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    sys.path.insert(0, str(Path.cwd()))
    if find_spec("flows") is None:
        sys.exit(
            "holdfast: there is no folder `flows` here. The commands are run from a checkout of Holdfast: change into it, "
            "and run `make demo` once, which sets up .venv"
        )
    if find_spec("prefect") is None:
        sys.exit(
            f"holdfast: {sys.executable} has no Prefect; use .venv/bin/holdfast of the checkout, which `make demo` sets up"
        )
    runpy.run_module("flows", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
