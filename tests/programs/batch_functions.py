"""Functions of records, good and bad, that the batch engine's tests name."""

import json
import os
import random
import signal
import time
from pathlib import Path


def length(batch):
    return [len(json.dumps(record)) for record in batch]


def bad_of_each_kind(batch):
    """What a record asks for, it gets."""
    for record in batch:
        match record.get("wants"):
            case "an error":
                raise ValueError("this record is poison")
            case "to hang":
                time.sleep(3600)
            case "to die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "to exit":
                raise SystemExit(3)
    return [object() if record.get("wants") == "no JSON" else record["id"] for record in batch]


def changes_its_records(batch):
    ids = [record.pop("id") for record in batch]
    if 7 in ids and len(ids) > 1:
        raise ValueError("not this one with others")
    return ids


def too_few(batch):
    return batch[:-1]


def as_many_as_asked(batch):
    return (record["id"] for record in batch for _ in range(record["results"]))


def dies_at_once(batch):
    os.kill(os.getpid(), signal.SIGKILL)


def prepare():
    return {"factor": 10}


def with_context(batch, context):
    return [record["id"] * context["factor"] for record in batch]


def not_a_number(batch):
    return [{"value": float("nan"), "big": 2**70, "id": record["id"]} for record in batch]


def slow(batch):
    """Tells that it has begun, then takes its time, which the records say."""
    for record in batch:
        Path(record["began"]).touch()
        time.sleep(record["seconds"])
    return [record["id"] for record in batch]


async def asynchronous(batch):
    return batch


def broken_setup():
    raise RuntimeError("no model here")


def say_that_it_works():
    """Leaves a file with the number of the worker's process, and tells where calls are noted."""
    folder = Path(os.environ["HOLDFAST_TEST_FOLDER"])
    (folder / "working" / str(os.getppid())).touch()
    return os.open(folder / "calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def noted(batch, calls):
    """A fifth of a second, more or less; what was computed to its end is noted."""
    time.sleep(random.uniform(0.1, 0.3))
    results = [record["id"] * 3 for record in batch]
    os.write(calls, f"{batch[0]['id']}\n".encode())
    return results
