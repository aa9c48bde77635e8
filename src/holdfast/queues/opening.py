"""A queue by its URL."""

from __future__ import annotations

import importlib
import math
from typing import Any
from urllib.parse import urlsplit

from holdfast.errors import ConfigError
from holdfast.queues.address import check_name, redacted
from holdfast.queues.protocol import Queue

BROKERS = {
    "sqlite": ("holdfast.queues.sqlite", "SqliteQueue", ""),
    "redis": ("holdfast.queues.redis", "RedisQueue", "redis"),
    "rediss": ("holdfast.queues.redis", "RedisQueue", "redis"),
    "amqp": ("holdfast.queues.rabbitmq", "RabbitQueue", "amqp"),
    "amqps": ("holdfast.queues.rabbitmq", "RabbitQueue", "amqp"),
    "sqs": ("holdfast.queues.sqs", "SqsQueue", "aws"),
    "pubsub": ("holdfast.queues.pubsub", "PubSubQueue", "pubsub"),
    "store": ("holdfast.queues.in_store", "StoreQueue", "aws"),
}
"""By scheme: module, class, and the extra that installs the client library."""


TAKE_CREDENTIALS = ("sqs", "pubsub", "store")


def open_queue(
    url: str, name: str, *, visibility_seconds: float = 600.0, max_deliveries: int = 5, credentials: Any = None
) -> Queue:
    """The queue `name` at the broker that `url` names; it is made when it isn't there.

    `sqlite:///PATH`, `store+STORE` (any URL that holdfast.storage opens), `redis://`, `amqp://`, `sqs://REGION/`,
    `pubsub://PROJECT/`: docs/queues.md. The broker is asked whether it is there and lets us in: raises ConfigError and
    TransientError. Every worker of a queue gives the same `visibility_seconds` and `max_deliveries`. `credentials`: what
    open_store takes, for a cloud's queue or the store's own; without them the environment's, or the machine's role.
    """
    scheme = "store" if url.startswith("store+") else urlsplit(url).scheme
    if scheme not in BROKERS:
        raise ConfigError(
            f"queue {redacted(url)}: no broker speaks {scheme!r}; use sqlite:///PATH, store+file:///..., store+s3://..., "
            "store+gs://..., redis://, amqp://, sqs:// or pubsub://"
        )
    if not (math.isfinite(visibility_seconds) and 0.1 <= visibility_seconds <= 43200):
        raise ConfigError(f"visibility_seconds is {visibility_seconds}: a lease lasts 0.1 s to 12 h (43200)")
    if max_deliveries < 1:
        raise ConfigError(f"max_deliveries is {max_deliveries}: every item is handed out once at least")
    module, class_name, extra = BROKERS[scheme]
    try:
        broker = getattr(importlib.import_module(module), class_name)
        more = {"credentials": credentials} if scheme in TAKE_CREDENTIALS else {}
        return broker(url, check_name(name), visibility_seconds, max_deliveries, **more)
    except ImportError as error:
        if not extra or (error.name or "").startswith("holdfast"):
            raise
        raise ConfigError(
            f"queue {redacted(url)}: its client library is not installed ({error}); pip install 'holdfast[{extra}]'"
        ) from error
