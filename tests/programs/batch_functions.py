"""Functions of records, good and bad, that the batch engine's tests name."""

import json
import os
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
