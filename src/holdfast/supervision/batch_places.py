"""Where the parts of a batch job are, and how many machines can work on what is left of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from holdfast.drivers.protocol import Driver
from holdfast.errors import ConfigError
from holdfast.model import BatchJob
from holdfast.storage import ObjectStore
from holdfast.storage.keys import is_key


def results_prefix(job: BatchJob, store: ObjectStore, run_id: str) -> str:
    """The prefix of the keys of plan and results, without a slash at its end. Raises ConfigError for a place outside the store."""
    if not job.results:
        return f"results/{run_id}"
    named = job.results
    if "://" in named:
        root, place = urlsplit(store.url), urlsplit(named)
        below = unquote(place.path).strip("/").removeprefix(unquote(root.path).strip("/")).lstrip("/")
        if (root.scheme, root.netloc) != (place.scheme, place.netloc) or not unquote(place.path).startswith(
            unquote(root.path).rstrip("/") + "/"
        ):
            raise ConfigError(
                f"results: {named!r} lies outside the store {store.url!r}; name a prefix in it, or another store (--store)"
            )
        named = below
    named = named.strip("/")
    reserved = named.partition("/")[0] in ("runs", "budgets", "queues", "probes")
    if not is_key(named) or Path(job.results).is_absolute() or reserved:
        raise ConfigError(
            f"results: {job.results!r} is no prefix for results in the store {store.url!r}; write a/b, or leave it out"
        )
    return named


def queue_url(job: BatchJob, driver: Driver, store: ObjectStore) -> str:
    """The broker. On the local cloud all machines share this computer; elsewhere they share the store at least."""
    if job.queue:
        return job.queue
    root = urlsplit(store.url)
    if driver.name == "local" and root.scheme == "file":
        return f"sqlite://{Path(unquote(root.path)).absolute() / 'queues' / 'queues.sqlite'}"
    return f"store+{store.url}"


def reached_as_the_store(inputs: Sequence[str], store: ObjectStore) -> list[str]:
    """Inputs in the store's own bucket get its region and endpoint, where they name none."""
    own, query = store.url.partition("?")[::2]
    bucket = own.split("/")[:3]
    return [f"{one}?{query}" if query and "?" not in one and one.split("/")[:3] == bucket else one for one in inputs]


SAME_CLOUD = {"s3": ("s3", "sqs"), "gs": ("gs", "pubsub")}


def credentials_for(urls: Sequence[str], store: ObjectStore) -> Any:
    """The store's, when all that is not on this computer is of its cloud; else None: what the environment has."""
    schemes = {urlsplit(url.removeprefix("store+")).scheme for url in urls if "://" in url}
    of_its_cloud = schemes <= {*SAME_CLOUD.get(urlsplit(store.url).scheme, ())}
    return getattr(store, "credentials", None) if of_its_cloud else None


def machines_of_use(machines: int, living: int, at_work: int, waiting: int, workers_per_machine: int) -> int:
    """How many machines have something to do: those that live, and for every batch per worker that waits one more than
    are `at_work` already. The living that still boot are about to take what waits.

    When nothing waits, machines that end are not replaced: the fleet has begun to shrink.
    """
    more = math.ceil(waiting / max(1, workers_per_machine))
    return max(living, min(machines, at_work + more))
