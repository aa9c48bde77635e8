"""A Pub/Sub of the tests, over gRPC with the real messages: topics, subscriptions, deadlines, counts of deliveries.

Honest where a client could go wrong: what is not there or there already, limits of calls and deadlines, messages that come
back, counts that are told only where there is a dead letter policy. Google's own emulator passes the same tests: start it
and set HOLDFAST_TEST_PUBSUB to its HOST:PORT.
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from google.protobuf.empty_pb2 import Empty
from google.pubsub_v1 import types


@dataclass(slots=True)
class Stored:
    message: types.PubsubMessage
    attempts: int = 0
    ack_id: str = ""
    hidden_until: float = 0.0


@dataclass(slots=True)
class Line:
    """A subscription."""

    request: types.Subscription
    messages: list[Stored] = field(default_factory=list)


class Refused(Exception):
    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class PubSubEmulator:
    def __init__(self) -> None:
        self._topics: set[str] = set()
        self._lines: dict[str, Line] = {}
        self._numbers = itertools.count(1)
        self.calls: set[str] = set()
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(64))
        publisher = {
            "CreateTopic": (types.Topic, self._create_topic),
            "Publish": (types.PublishRequest, self._publish),
        }
        subscriber = {
            "CreateSubscription": (types.Subscription, self._create_subscription),
            "Pull": (types.PullRequest, self._pull),
            "Acknowledge": (types.AcknowledgeRequest, self._acknowledge),
            "ModifyAckDeadline": (types.ModifyAckDeadlineRequest, self._modify),
        }
        for service, methods in (("Publisher", publisher), ("Subscriber", subscriber)):
            handlers = {name: self._handler(name, type_, act) for name, (type_, act) in methods.items()}
            self._server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(f"google.pubsub.v1.{service}", handlers),)
            )
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0)

    def _create_topic(self, topic: types.Topic, _: Any) -> types.Topic:
        with self._lock:
            if topic.name in self._topics:
                raise Refused(grpc.StatusCode.ALREADY_EXISTS, topic.name)
            self._topics.add(topic.name)
        return topic

    def _create_subscription(self, line: types.Subscription, _: Any) -> types.Subscription:
        with self._lock:
            if line.name in self._lines:
                raise Refused(grpc.StatusCode.ALREADY_EXISTS, line.name)
            dead = line.dead_letter_policy.dead_letter_topic
            for topic in filter(None, (line.topic, dead)):
                if topic not in self._topics:
                    raise Refused(grpc.StatusCode.NOT_FOUND, topic)
            if not 10 <= line.ack_deadline_seconds <= 600:
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"ack deadline {line.ack_deadline_seconds}")
            if dead and not 5 <= line.dead_letter_policy.max_delivery_attempts <= 100:
                raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "max delivery attempts")
            self._lines[line.name] = Line(line)
        return line

    def _publish(self, request: types.PublishRequest, _: Any) -> types.PublishResponse:
        if not 1 <= len(request.messages) <= 1000:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"{len(request.messages)} messages")
        with self._lock:
            if request.topic not in self._topics:
                raise Refused(grpc.StatusCode.NOT_FOUND, request.topic)
            for message in request.messages:
                if not message.data and not message.attributes:
                    raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "a message without data and attributes")
                if any(len(value.encode()) > 1024 for value in message.attributes.values()):
                    raise Refused(grpc.StatusCode.INVALID_ARGUMENT, "a long attribute")
                message.message_id = str(next(self._numbers))
                for line in self._lines.values():
                    if line.request.topic == request.topic:
                        line.messages.append(Stored(message))
        return types.PublishResponse(message_ids=[message.message_id for message in request.messages])

    def _pull(self, request: types.PullRequest, _: Any) -> types.PullResponse:
        if not request.return_immediately:
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, "calls that wait")
        with self._lock:
            line = self._line(request.subscription)
            due = [one for one in line.messages if one.hidden_until <= time.monotonic()]
            received = []
            for one in due[: request.max_messages]:
                one.ack_id, one.attempts = secrets.token_hex(8), one.attempts + 1
                one.hidden_until = time.monotonic() + line.request.ack_deadline_seconds
                told = one.attempts if line.request.dead_letter_policy.dead_letter_topic else 0
                received.append(types.ReceivedMessage(ack_id=one.ack_id, message=one.message, delivery_attempt=told))
        return types.PullResponse(received_messages=received)

    def _acknowledge(self, request: types.AcknowledgeRequest, _: Any) -> Empty:
        with self._lock:
            line, done = self._line(request.subscription), set(request.ack_ids)
            line.messages = [one for one in line.messages if one.ack_id not in done]
        return Empty()

    def _modify(self, request: types.ModifyAckDeadlineRequest, _: Any) -> Empty:
        if not 0 <= request.ack_deadline_seconds <= 600:
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, f"ack deadline {request.ack_deadline_seconds}")
        with self._lock:
            chosen = set(request.ack_ids)
            for one in self._line(request.subscription).messages:
                if one.ack_id in chosen:
                    one.hidden_until = time.monotonic() + request.ack_deadline_seconds
        return Empty()

    def _line(self, name: str) -> Line:
        if name not in self._lines:
            raise Refused(grpc.StatusCode.NOT_FOUND, name)
        return self._lines[name]

    def _handler(self, name: str, type_: Any, act: Callable[[Any, Any], Any]) -> grpc.RpcMethodHandler:
        def serve(request: Any, context: grpc.ServicerContext) -> Any:
            self.calls.add(name)
            try:
                return act(request, context)
            except Refused as refused:
                context.abort(refused.code, str(refused))

        def serialize(answer: Any) -> bytes:
            return answer.SerializeToString() if isinstance(answer, Empty) else type(answer).serialize(answer)

        return grpc.unary_unary_rpc_method_handler(serve, type_.deserialize, serialize)
