"""`amqp://HOST/VHOST` and `amqps://`: RabbitMQ 3.10 or newer, by quorum queues.

There a lease is a message that was delivered and not acknowledged: it comes back at once when its connection ends. So a
thread keeps the connection alive while a batch is computed, and gives back what was not extended in time. The broker counts
deliveries; what is handed back is put anew with the count as it was, and goes to the end of the line.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from holdfast.errors import ConfigError, TransientError
from holdfast.queues.address import PASSWORD_VARIABLE, ServerAddress
from holdfast.queues.patience import OPENING_SECONDS, persist, poll
from holdfast.queues.protocol import Depth, Lease

if TYPE_CHECKING:
    import amqp

ANSWER_SECONDS = 20.0
"""A server that takes longer is away."""
BACK_SECONDS = 5.0
"""What a channel held is back in its queue some time after the channel's end; `depth` is right once it is."""
UNCONFIRMED = 500
LONGEST_REASON = 10_000
"""Letters: a header has to fit into one frame."""
COUNT, DELIVERED, REASON = "x-delivery-count", "holdfast-deliveries", "holdfast-reason"
ARGUMENTS = {
    "x-queue-type": "quorum",
    # We count for ourselves: RabbitMQ 4 has a limit of its own, and counts what was handed back.
    "x-delivery-limit": 1_000_000,
    # From 3.12 on; older servers take a message back after 30 minutes, whatever its worker does.
    "x-consumer-timeout": 24 * 3600 * 1000,
}
T = TypeVar("T")


class RabbitQueue:
    def __init__(self, url: str, name: str, visibility_seconds: float, max_deliveries: int) -> None:
        self._address = ServerAddress.parse(url, 5671 if url.startswith("amqps:") else 5672)
        self.url = self._address.shown
        self._name, self._dead_name = f"holdfast.{name}", f"holdfast.{name}.dead"
        self._visibility_seconds, self._max_deliveries = visibility_seconds, max_deliveries
        self._heartbeat_seconds = int(min(60, max(5, visibility_seconds / 2)))
        self._lock = threading.RLock()
        self._connection: amqp.Connection | None = None
        self._generation = 0
        self._held: dict[int, float] = {}
        """Of this connection's leases, by their delivery tag: when they end, on the monotonic clock."""
        self._closed = threading.Event()
        persist(lambda: self._on_channel(lambda channel: None), OPENING_SECONDS)
        threading.Thread(target=self._pump, name="amqp", daemon=True).start()

    def put(self, bodies: Sequence[bytes]) -> None:
        left = [(self._name, body, {}) for body in bodies]
        persist(lambda: self._on_channel(lambda channel: self._publish(channel, left)))

    def lease(self, limit: int = 1, wait_seconds: float = 0.0) -> list[Lease]:
        return poll(
            lambda: persist(lambda: self._on_channel(lambda channel: self._lease(channel, limit))), wait_seconds
        )

    def _lease(self, channel: amqp.Channel, limit: int) -> list[Lease]:
        found: list[Lease] = []
        while len(found) < limit and (message := channel.basic_get(self._name)):
            headers = message.headers or {}
            tag = message.delivery_info["delivery_tag"]
            self._held[tag] = time.monotonic() + self._visibility_seconds
            deliveries = int(headers.get(DELIVERED, 0)) + int(headers.get(COUNT, 0)) + 1
            lease = Lease(body=as_bytes(message.body), deliveries=deliveries, receipt=(self._generation, tag))
            if deliveries > self._max_deliveries:
                self._bury(channel, lease, f"handed out {self._max_deliveries} times and never acknowledged")
            else:
                found.append(lease)
        return found

    def extend(self, leases: Sequence[Lease]) -> list[Lease]:
        with self._lock:
            self._look()
            lost = [lease for lease in leases if not self._is_held(lease)]
            for lease in leases:
                if lease not in lost:
                    self._held[lease.receipt[1]] = time.monotonic() + self._visibility_seconds
            return lost

    def acknowledge(self, leases: Sequence[Lease]) -> None:
        persist(lambda: self._on_channel(lambda channel: self._acknowledge(channel, leases)))

    def _acknowledge(self, channel: amqp.Channel, leases: Sequence[Lease]) -> None:
        for lease in self._of_this_connection(leases):
            channel.basic_ack(lease.receipt[1])
            self._held.pop(lease.receipt[1])

    def hand_back(self, leases: Sequence[Lease]) -> None:
        persist(lambda: self._on_channel(lambda channel: self._hand_back(channel, leases)))

    def _hand_back(self, channel: amqp.Channel, leases: Sequence[Lease]) -> None:
        kept = self._of_this_connection(leases)
        self._publish(channel, [(self._name, lease.body, {DELIVERED: lease.deliveries - 1}) for lease in kept])
        self._acknowledge(channel, kept)

    def dead_letter(self, lease: Lease, reason: str) -> None:
        persist(lambda: self._on_channel(lambda channel: self._bury(channel, lease, reason)))

    def _bury(self, channel: amqp.Channel, lease: Lease, reason: str) -> None:
        if self._is_held(lease):
            self._publish(channel, [(self._dead_name, lease.body, {REASON: reason[:LONGEST_REASON]})])
            self._acknowledge(channel, [lease])

    def dead(self) -> list[tuple[bytes, str]]:
        return persist(lambda: self._on_channel(self._dead))

    def _dead(self, channel: amqp.Channel) -> list[tuple[bytes, str]]:
        """Of two that look at the same time, one sees none."""
        looking = channel.connection.channel()
        found: list[tuple[bytes, str]] = []
        try:
            while message := looking.basic_get(self._dead_name):
                found.append((as_bytes(message.body), str((message.headers or {}).get(REASON, ""))))
        finally:
            looking.close()  # they go back to their places
        give_up_at = time.monotonic() + BACK_SECONDS
        while channel.queue_declare(self._dead_name, passive=True)[1] < len(found) and time.monotonic() < give_up_at:
            time.sleep(0.01)
        return found

    def depth(self) -> Depth:
        return persist(lambda: self._on_channel(self._depth))

    def _depth(self, channel: amqp.Channel) -> Depth:
        waiting, dead = (channel.queue_declare(name, passive=True)[1] for name in (self._name, self._dead_name))
        return Depth(waiting=waiting, leased=len(self._held), dead=dead, approximate=True)

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            self._disconnect()

    # -- leases of this connection ------------------------------------------------------------------------------------

    def _is_held(self, lease: Lease) -> bool:
        generation, tag = lease.receipt
        return generation == self._generation and self._held.get(tag, 0.0) > time.monotonic()

    def _of_this_connection(self, leases: Sequence[Lease]) -> list[Lease]:
        return [lease for lease in leases if self._is_held(lease)]

    def _pump(self) -> None:
        """Heartbeats, and the end of leases that nobody extended."""
        pause = min(1.0, self._visibility_seconds / 10)
        while not self._closed.wait(pause):
            with self._lock:
                self._look()

    def _look(self) -> None:
        """What the server said meanwhile. A connection that broke is noticed here, and its leases are lost."""
        import amqp

        if not self._connection:
            return
        try:
            now = time.monotonic()
            for tag in [tag for tag, ends_at in self._held.items() if ends_at <= now]:
                self._channel.basic_reject(tag, requeue=True)
                self._held.pop(tag)
            self._connection.heartbeat_tick(rate=4)
            while True:
                self._connection.drain_events(timeout=0)
        except TimeoutError:
            return
        except (amqp.AMQPError, OSError, AttributeError):
            self._disconnect()

    # -- the connection -----------------------------------------------------------------------------------------------

    def _on_channel(self, act: Callable[[amqp.Channel], T]) -> T:
        import amqp
        from amqp import exceptions as refusals

        with self._lock:
            try:
                if not self._connection:
                    self._connect()
                return act(self._channel)
            except TransientError:
                self._disconnect()
                raise
            except (refusals.AccessRefused, refusals.NotAllowed) as error:
                self._disconnect()
                raise ConfigError(
                    f"queue {self.url}: RabbitMQ refuses: {error}; is the virtual host there, the user's password right "
                    f"(it may stand in {PASSWORD_VARIABLE}), and may the user configure, write and read 'holdfast.*'?"
                ) from error
            except (refusals.PreconditionFailed, refusals.AMQPNotImplementedError) as error:
                self._disconnect()
                raise ConfigError(
                    f"queue {self.url}: {error}; RabbitMQ 3.10 or newer has the quorum queues this needs; a queue of the "
                    "same name that was made otherwise must be deleted first"
                ) from error
            # AttributeError and the like: what the library says of a connection that broke under it.
            except (amqp.AMQPError, OSError, AttributeError, KeyError) as error:
                self._disconnect()
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise ConfigError(f"queue {self.url}: the server's certificate is not trusted: {error}") from error
                raise TransientError(f"queue {self.url}: no answer from a RabbitMQ there: {error!r}") from error

    def _connect(self) -> None:
        import amqp

        address = self._address
        secure = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": address.host}
        host = f"[{address.host}]" if ":" in address.host else address.host
        connection = amqp.Connection(
            f"{host}:{address.port}",
            userid=address.user or "guest",
            password=address.password or ("" if address.user else "guest"),
            login_method="PLAIN",
            virtual_host=address.path[1:] or "/",
            ssl=secure if address.scheme == "amqps" else False,
            heartbeat=self._heartbeat_seconds,
            connect_timeout=OPENING_SECONDS,
            read_timeout=int(ANSWER_SECONDS),
            write_timeout=int(ANSWER_SECONDS),
        )
        connection.connect()
        self._connection, self._channel = connection, connection.channel()
        self._generation += 1
        for name in (self._name, self._dead_name):
            self._channel.queue_declare(name, durable=True, auto_delete=False, arguments=ARGUMENTS)
        self._published = Published(self._channel)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._held.clear()
        if connection:
            try:
                connection.transport.sock.settimeout(1.0)
                connection.close()
            except Exception:
                connection.collect()

    def _publish(self, channel: amqp.Channel, messages: list[tuple[str, bytes, dict[str, Any]]]) -> None:
        """Queue, body, headers. What the server holds is taken out of `messages`."""
        import amqp

        while messages:
            chunk = messages[:UNCONFIRMED]
            for name, body, headers in chunk:
                message = amqp.Message(body, application_headers=headers, delivery_mode=2)
                channel.basic_publish(message, routing_key=name, mandatory=True)
            self._published.wait(len(chunk))
            del messages[: len(chunk)]


class Published:
    """The server's confirmations, many at a time: one by one they would cost a disk's flush each."""

    def __init__(self, channel: amqp.Channel) -> None:
        self._channel = channel
        self._sent = self._below = 0
        """Every message up to `_below` is confirmed, and of the later ones those in `_above`."""
        self._above: set[int] = set()
        self._refused = ""
        channel.events["basic_ack"].add(self._on_ack)
        channel.events["basic_nack"].add(lambda *_: self._refuse("it could not store a message"))
        channel.events["basic_return"].add(lambda error, *_: self._refuse(f"a message went nowhere: {error}"))
        channel.confirm_select()

    def wait(self, count: int) -> None:
        """Until `count` more messages are confirmed. Raises TransientError."""
        self._sent += count
        give_up_at = time.monotonic() + ANSWER_SECONDS
        while self._below < self._sent and not self._refused:
            if (left := give_up_at - time.monotonic()) <= 0:
                raise TransientError(f"RabbitMQ did not confirm in {ANSWER_SECONDS:g} s that it holds what was put")
            with contextlib.suppress(TimeoutError):
                self._channel.connection.drain_events(timeout=left)
        if self._refused:
            raise TransientError(f"RabbitMQ refused what was put: {self._refused}")

    def _on_ack(self, tag: int, multiple: bool) -> None:
        if multiple:
            self._below = max(self._below, tag)
        else:
            self._above.add(tag)
        self._above = {one for one in self._above if one > self._below} if multiple else self._above
        while self._below + 1 in self._above:
            self._below += 1
            self._above.remove(self._below)

    def _refuse(self, reason: str) -> None:
        self._refused = reason


def as_bytes(body: bytes | str | memoryview) -> bytes:
    return body.encode() if isinstance(body, str) else bytes(body)
