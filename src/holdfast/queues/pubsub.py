"""`pubsub://PROJECT/`: Google Cloud Pub/Sub, a topic and its subscription; `?endpoint=http://HOST:PORT` names an emulator.

An acknowledgement deadline is the lease. A deadline is ten minutes at most, so a thread renews those of longer leases. The
count of deliveries comes with the dead letter policy, which is set for that alone: what is handed back is published anew
with the count as it was, and dead items go to a topic of their own. Pub/Sub tells nobody how many messages it has: depth
is what this process has put, has leased, and has seen done.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from holdfast.errors import ConfigError, CredentialsError, TransientError
from holdfast.queues.address import options_of, redacted
from holdfast.queues.patience import OPENING_SECONDS, persist, poll
from holdfast.queues.protocol import Depth, Lease

AT_ONCE, CALL_BYTES = 500, 5_000_000
ANSWER_SECONDS = 20.0
SHORTEST_DEADLINE_SECONDS, LONGEST_DEADLINE_SECONDS = 10, 600
"""Of a subscription; that of one message may be shorter."""
MOST_ATTEMPTS = 100
"""Of a dead letter policy. Pub/Sub itself would give an item up then, if its service agent may."""
LOOK_SECONDS, LOOK_AGAIN_SECONDS = 30, 0.5
DELIVERED, REASON = "holdfast-deliveries", "holdfast-reason"
EMULATOR = "PUBSUB_EMULATOR_HOST"
ROLE = "deployments/gcp-queue-role.yaml"
S, T = TypeVar("S"), TypeVar("T")


@dataclass(slots=True)
class Receipt:
    ack_id: str
    held_until: float
    """On the monotonic clock. Afterwards another may have it; 0: it was given up."""


class PubSubQueue:
    def __init__(
        self, url: str, name: str, visibility_seconds: float, max_deliveries: int, credentials: Any = None
    ) -> None:
        self.url, parts = redacted(url), urlsplit(url)
        self._project = parts.netloc
        if not re.fullmatch(r"[a-z][a-z0-9:.-]{3,60}[a-z0-9]", self._project) or parts.path.strip("/"):
            raise ConfigError(f"queue {self.url}: write pubsub://PROJECT/, the id of a Google Cloud project")
        if max_deliveries > MOST_ATTEMPTS:
            raise ConfigError(f"queue {self.url}: max_deliveries {max_deliveries}: Pub/Sub counts to {MOST_ATTEMPTS}")
        self._visibility_seconds, self._max_deliveries = visibility_seconds, max_deliveries
        self._deadline_seconds = min(LONGEST_DEADLINE_SECONDS, math.ceil(visibility_seconds))
        self._name = f"holdfast-{name.replace('/', '~')}"
        self._lock = threading.Lock()
        self._held: dict[str, Receipt] = {}
        self._put = self._done = 0
        endpoint = options_of(url, ("endpoint",)).get("endpoint", os.environ.get(EMULATOR, ""))
        self._connect(endpoint.removeprefix("http://").rstrip("/"), credentials)
        persist(lambda: self._translated(self._make), OPENING_SECONDS)
        self._closed = threading.Event()
        if visibility_seconds > LONGEST_DEADLINE_SECONDS:
            threading.Thread(target=self._renew, name="pubsub", daemon=True).start()

    def _connect(self, emulator: str, credentials: Any) -> None:
        import grpc
        from google.auth import exceptions as no_credentials
        from google.pubsub_v1 import PublisherClient, SubscriberClient
        from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
        from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport

        try:
            if emulator:
                self._publisher = PublisherClient(
                    transport=PublisherGrpcTransport(channel=grpc.insecure_channel(emulator))
                )
                self._subscriber = SubscriberClient(
                    transport=SubscriberGrpcTransport(channel=grpc.insecure_channel(emulator))
                )
            else:
                self._publisher = PublisherClient(credentials=credentials)
                self._subscriber = SubscriberClient(credentials=credentials)
        except no_credentials.GoogleAuthError as error:
            raise ConfigError(
                f"queue {self.url}: {error}; give the machine a service account, or set GOOGLE_APPLICATION_CREDENTIALS"
            ) from error

    def _make(self) -> None:
        for kind in ("-dead", ""):
            topic = self._topic(kind)
            self._unless_there(lambda topic=topic: self._publisher.create_topic(name=topic, **CALL))
        for kind in ("-dead", ""):
            subscription = {
                "name": self._subscription(kind),
                "topic": self._topic(kind),
                "ack_deadline_seconds": max(SHORTEST_DEADLINE_SECONDS, self._deadline_seconds),
                "message_retention_duration": {"seconds": 7 * 24 * 3600},
            }
            if not kind:
                policy = {"dead_letter_topic": self._topic("-dead"), "max_delivery_attempts": MOST_ATTEMPTS}
                subscription["dead_letter_policy"] = policy
            self._unless_there(lambda made=subscription: self._subscriber.create_subscription(request=made, **CALL))

    def _topic(self, kind: str = "") -> str:
        return f"projects/{self._project}/topics/{self._name}{kind}"

    def _subscription(self, kind: str = "") -> str:
        return f"projects/{self._project}/subscriptions/{self._name}{kind}"

    def _unless_there(self, create: Callable[[], Any]) -> None:
        from google.api_core import exceptions as refusals

        try:
            create()
        except refusals.AlreadyExists:
            return

    # -- verbs --------------------------------------------------------------------------------------------------------

    def put(self, bodies: Sequence[bytes]) -> None:
        self._publish([(body, {DELIVERED: "0"}) for body in bodies])
        self._put += len(bodies)

    def _publish(self, messages: list[tuple[bytes, dict[str, str]]], kind: str = "") -> None:
        for chunk in chunks(messages, lambda message: len(message[0])):
            made = [{"data": body, "attributes": attributes} for body, attributes in chunk]
            self._call(lambda made=made: self._publisher.publish(topic=self._topic(kind), messages=made, **CALL))

    def lease(self, limit: int = 1, wait_seconds: float = 0.0) -> list[Lease]:
        return poll(lambda: self._lease(min(limit, AT_ONCE)), wait_seconds)

    def _lease(self, limit: int) -> list[Lease]:
        held_until = time.monotonic() + self._visibility_seconds
        received = self._pull(limit)
        self._set_deadlines([one.ack_id for one in received], self._deadline_seconds)
        found: list[Lease] = []
        for one in received:
            deliveries = int(one.message.attributes.get(DELIVERED, "0")) + max(1, one.delivery_attempt)
            lease = Lease(body=one.message.data, deliveries=deliveries, receipt=Receipt(one.ack_id, held_until))
            with self._lock:
                self._held[one.ack_id] = lease.receipt
            if deliveries > self._max_deliveries:
                self.dead_letter(lease, f"handed out {self._max_deliveries} times and never acknowledged")
            else:
                found.append(lease)
        return found

    def _pull(self, limit: int, kind: str = "") -> list[Any]:
        """What can be had at once.

        A call that waits can only be ended by not hearing its answer: what it brings then is delivered, and lost until its
        deadline. Pub/Sub discourages calls that don't wait, since they may find nothing where there is something; whoever
        leases asks again.
        """
        name = self._subscription(kind)
        request = {"subscription": name, "max_messages": limit, "return_immediately": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return list(self._call(lambda: self._subscriber.pull(request=request, **CALL)).received_messages)

    def extend(self, leases: Sequence[Lease]) -> list[Lease]:
        kept, until = self._mine(leases), time.monotonic() + self._visibility_seconds
        self._set_deadlines([lease.receipt.ack_id for lease in kept], self._deadline_seconds)
        for lease in kept:
            lease.receipt.held_until = until
        return [lease for lease in leases if not lease.receipt.held_until]

    def acknowledge(self, leases: Sequence[Lease]) -> None:
        kept = self._mine(leases)
        name = self._subscription()
        for chunk in chunks([lease.receipt.ack_id for lease in kept], len):
            self._call(lambda ids=chunk: self._subscriber.acknowledge(subscription=name, ack_ids=ids, **CALL))
        self._let_go(kept)
        self._done += len(kept)

    def hand_back(self, leases: Sequence[Lease]) -> None:
        kept = self._mine(leases)
        self._publish([(lease.body, {DELIVERED: str(lease.deliveries - 1)}) for lease in kept])
        self._put += len(kept)
        self.acknowledge(kept)

    def dead_letter(self, lease: Lease, reason: str) -> None:
        if self._mine([lease]):
            # An attribute has 1,024 bytes at most.
            self._publish([(lease.body, {REASON: reason.encode()[:1024].decode(errors="ignore") or "?"})], "-dead")
            self.acknowledge([lease])

    def dead(self) -> list[tuple[bytes, str]]:
        """Of two that look at the same time, each sees a part."""
        seen: dict[str, Any] = {}
        while received := poll(lambda: self._pull(AT_ONCE, "-dead"), LOOK_AGAIN_SECONDS):
            self._set_deadlines([one.ack_id for one in received], LOOK_SECONDS, "-dead")
            seen.update({one.message.message_id: one for one in received})
        self._set_deadlines([one.ack_id for one in seen.values()], 0, "-dead")
        messages = [one.message for one in seen.values()]
        return [(message.data, message.attributes.get(REASON, "given up by Pub/Sub")) for message in messages]

    def depth(self) -> Depth:
        self._mine([])
        leased, dead = len(self._held), len(self.dead())
        return Depth(waiting=max(0, self._put - self._done - leased), leased=leased, dead=dead, approximate=True)

    def close(self) -> None:
        self._closed.set()
        self._publisher.transport.close()
        self._subscriber.transport.close()

    # -- leases -------------------------------------------------------------------------------------------------------

    def _mine(self, leases: Sequence[Lease]) -> list[Lease]:
        now = time.monotonic()
        with self._lock:
            for receipt in [receipt for receipt in self._held.values() if receipt.held_until <= now]:
                receipt.held_until = 0.0
                del self._held[receipt.ack_id]
        return [lease for lease in leases if lease.receipt.held_until]

    def _let_go(self, leases: Sequence[Lease]) -> None:
        with self._lock:
            for lease in leases:
                lease.receipt.held_until = 0.0
                self._held.pop(lease.receipt.ack_id, None)

    def _set_deadlines(self, ack_ids: list[str], seconds: int, kind: str = "") -> None:
        for chunk in chunks(ack_ids, len):
            self._call(
                lambda ids=chunk: self._subscriber.modify_ack_deadline(
                    subscription=self._subscription(kind), ack_ids=ids, ack_deadline_seconds=seconds, **CALL
                )
            )

    def _renew(self) -> None:
        while not self._closed.wait(LONGEST_DEADLINE_SECONDS / 3):
            self._mine([])
            with self._lock:
                ack_ids = list(self._held)
            try:
                self._set_deadlines(ack_ids, LONGEST_DEADLINE_SECONDS)
            except (TransientError, ConfigError):
                continue  # the next verb tells it

    # -- calls --------------------------------------------------------------------------------------------------------

    def _call(self, call: Callable[[], T]) -> T:
        return persist(lambda: self._translated(call))

    def _translated(self, call: Callable[[], T]) -> T:
        from google.api_core import exceptions as refusals
        from google.auth import exceptions as no_credentials

        try:
            return call()
        except refusals.NotFound as error:
            self._remake(error)
            raise TransientError(f"queue {self.url}: {self._name} was gone and is made again: {error}") from error
        except (refusals.Unauthenticated, no_credentials.RefreshError) as error:
            raise CredentialsError(f"queue {self.url}: Pub/Sub: {error}; renew the credentials") from error
        except (refusals.ServerError, refusals.TooManyRequests, refusals.Aborted, refusals.Cancelled) as error:
            raise TransientError(f"queue {self.url}: no answer from Pub/Sub there: {error}") from error
        except no_credentials.TransportError as error:
            raise TransientError(f"queue {self.url}: no credentials yet: {error}") from error
        except refusals.Forbidden as error:
            raise ConfigError(f"queue {self.url}: Pub/Sub: {error}; what is needed stands in {ROLE}") from error
        except refusals.GoogleAPICallError as error:
            raise ConfigError(f"queue {self.url}: Pub/Sub refuses: {error}") from error

    def _remake(self, error: Exception) -> None:
        from google.api_core import exceptions as refusals

        try:
            self._make()
        except refusals.NotFound:
            raise ConfigError(f"queue {self.url}: no such project, or Pub/Sub is not enabled there: {error}") from error
        except refusals.GoogleAPICallError:
            return


CALL: dict[str, Any] = {"retry": None, "timeout": ANSWER_SECONDS}


def chunks(all: list[S], size: Callable[[S], int]) -> Iterator[list[S]]:
    """What one call takes."""
    chunk: list[S] = []
    total = 0
    for one in all:
        if chunk and (len(chunk) == AT_ONCE or total + size(one) > CALL_BYTES):
            yield chunk
            chunk, total = [], 0
        chunk.append(one)
        total += size(one)
    if chunk:
        yield chunk
