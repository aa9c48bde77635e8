"""`holdfast COMMAND`: the commands of the checkout in the current folder (`python -m flows`)."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    sys.path.insert(0, str(Path.cwd()))
    if find_spec("flows") is None:
        sys.exit("holdfast: there is no folder `flows` here; change into a checkout of Holdfast first")
    runpy.run_module("flows", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
