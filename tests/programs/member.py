"""One member of a fleet: leaves a note of its own, works for some seconds; the first fails where FAIL names a file."""

import os
import sys
import time
from pathlib import Path

member, notes = os.environ["HOLDFAST_MEMBER"], Path(os.environ["NOTES"])
notes.mkdir(parents=True, exist_ok=True)
print(f"{member} works", flush=True)
if os.environ.get("FAIL"):
    try:
        (notes / os.environ["FAIL"]).touch(exist_ok=False)
        print("this member fails", flush=True)
        sys.exit(5)
    except FileExistsError:
        pass
(notes / f"{member}.begun").touch()
time.sleep(float(sys.argv[1]))
(notes / f"{member}.done").touch()
