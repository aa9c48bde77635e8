"""`sqs://REGION/`: Amazon SQS, a standard queue; `?endpoint=` names a server that speaks its protocol.

SQS counts how often it handed an item out, and takes it back when its time is over. It has no hand back that is not counted:
such an item is sent anew with the count as it was, and the old one deleted. Dead items go to a queue of their own; no
redrive policy is set, since it would count what was handed back. A lease ends 12 hours after it was given, whatever is
extended. Source: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from holdfast.errors import ConfigError, CredentialsError, TransientError
from holdfast.queues.address import options_of, redacted
from holdfast.queues.patience import OPENING_SECONDS, persist, poll
from holdfast.queues.protocol import Depth, Lease

AT_ONCE, MESSAGE_BYTES, CALL_BYTES = 10, 250_000, 250_000
"""SQS's limits of one call; regions that have the new ones take 1 MiB."""
LONG_POLL_SECONDS, ANSWER_SECONDS = 20, 30
RETENTION_SECONDS = 14 * 24 * 3600
LOOK_SECONDS = 30
"""Dead items are out of others' sight for so long, should whoever looks at them die."""
DELIVERED = "deliveries"
BASE64 = "base64:"
CALLERS = 8
POLICY = "deployments/aws-queue-policy.json"
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
WRONG_KEYS = {"InvalidClientTokenId", "UnrecognizedClientException", "SignatureDoesNotMatch", "InvalidAccessKeyId"}
GONE = {"QueueDoesNotExist", "AWS.SimpleQueueService.NonExistentQueue"}
PASSING = {"Throttling", "ThrottlingException", "RequestThrottled", "OverLimit", "QueueDeletedRecently"}
OVER = {"MessageNotInflight", "ReceiptHandleIsInvalid", "InvalidParameterValue"}
S, T = TypeVar("S"), TypeVar("T")


@dataclass(slots=True)
class Receipt:
    handle: str
    held_until: float
    """On the monotonic clock. Afterwards another may have it."""


class SqsQueue:
    def __init__(
        self, url: str, name: str, visibility_seconds: float, max_deliveries: int, credentials: Any = None
    ) -> None:
        import boto3
        from botocore.config import Config

        self.url, parts = redacted(url), urlsplit(url)
        options = options_of(url, ("endpoint",))
        if not re.fullmatch(r"[a-z]{2,}(-[a-z]+)+-\d+", parts.netloc) or parts.path.strip("/"):
            raise ConfigError(f"queue {self.url}: write sqs://REGION/, for example sqs://eu-central-1/")
        self._visibility_seconds, self._max_deliveries = visibility_seconds, max_deliveries
        session = credentials or boto3.Session()
        config = Config(
            region_name=parts.netloc,
            connect_timeout=OPENING_SECONDS,
            read_timeout=ANSWER_SECONDS,
            max_pool_connections=2 * CALLERS,
            retries={"mode": "standard", "max_attempts": 2},
        )
        self._name = sqs_name(name)
        self._client = session.client("sqs", endpoint_url=options.get("endpoint"), config=config)
        self._pool = ThreadPoolExecutor(CALLERS, thread_name_prefix="sqs")
        self._lock = threading.Lock()
        self._urls: dict[str, str] = {}
        persist(lambda: self._translated(self._make), OPENING_SECONDS)

    def _make(self) -> None:
        for kind in ("", "-dead"):
            # Creating what is there with the same attributes tells its URL.
            attributes = {"MessageRetentionPeriod": str(RETENTION_SECONDS)}
            made = self._client.create_queue(QueueName=self._name + kind, Attributes=attributes)
            self._urls[kind] = made["QueueUrl"]

    # -- verbs --------------------------------------------------------------------------------------------------------

    def put(self, bodies: Sequence[bytes]) -> None:
        self._send([{"MessageBody": encoded(body)} for body in bodies])

    def _send(self, entries: list[dict[str, Any]], kind: str = "") -> None:
        for entry in entries:
            if (size := len(entry["MessageBody"])) > MESSAGE_BYTES:
                raise ConfigError(
                    f"queue {self.url}: an item of {size} bytes is more than the {MESSAGE_BYTES} SQS takes"
                )
        self._each(lambda chunk: self._batch("send_message_batch", chunk, kind), list(calls(entries)))

    def lease(self, limit: int = 1, wait_seconds: float = 0.0) -> list[Lease]:
        return poll(lambda: self._lease(limit, wait_seconds), wait_seconds)

    def _lease(self, limit: int, wait_seconds: float) -> list[Lease]:
        found: list[Lease] = []
        while len(found) < limit:
            # Only a call that waits asks all of SQS's servers, so whoever can wait waits a second at least.
            waits = 0 if found else min(LONG_POLL_SECONDS, math.ceil(wait_seconds))
            held_until = time.monotonic() + self._visibility_seconds
            messages = self._receive(min(AT_ONCE, limit - len(found)), math.ceil(self._visibility_seconds), waits)
            for message in messages:
                told = message.get("MessageAttributes", {}).get(DELIVERED, {}).get("StringValue", "0")
                deliveries = int(told) + int(message["Attributes"]["ApproximateReceiveCount"])
                receipt = Receipt(message["ReceiptHandle"], held_until)
                lease = Lease(body=decoded(message["Body"]), deliveries=deliveries, receipt=receipt)
                if deliveries > self._max_deliveries:
                    self.dead_letter(lease, f"handed out {self._max_deliveries} times and never acknowledged")
                else:
                    found.append(lease)
            if not messages:
                break
        return found

    def _receive(self, limit: int, visibility_seconds: int, waits: int, kind: str = "") -> list[dict[str, Any]]:
        answer = self._call(
            "receive_message",
            kind,
            MaxNumberOfMessages=limit,
            VisibilityTimeout=visibility_seconds,
            WaitTimeSeconds=waits,
            MessageAttributeNames=[DELIVERED],
            MessageSystemAttributeNames=["ApproximateReceiveCount"],
        )
        return answer.get("Messages", [])

    def extend(self, leases: Sequence[Lease]) -> list[Lease]:
        kept, until = self._mine(leases), time.monotonic() + self._visibility_seconds
        over = set(self._make_visible_in(math.ceil(self._visibility_seconds), kept))
        for lease in kept:
            lease.receipt.held_until = 0.0 if lease.receipt.handle in over else until
        return [lease for lease in leases if not lease.receipt.held_until]

    def acknowledge(self, leases: Sequence[Lease]) -> None:
        kept = self._mine(leases)
        entries = [{"ReceiptHandle": lease.receipt.handle} for lease in kept]
        self._each(lambda chunk: self._batch("delete_message_batch", chunk), list(calls(entries)))
        for lease in kept:
            lease.receipt.held_until = 0.0

    def hand_back(self, leases: Sequence[Lease]) -> None:
        kept = self._mine(leases)
        self._send(
            [
                {
                    "MessageBody": encoded(lease.body),
                    "MessageAttributes": {
                        DELIVERED: {"DataType": "Number", "StringValue": str(lease.deliveries - 1)},
                    },
                }
                for lease in kept
            ]
        )
        self.acknowledge(kept)

    def dead_letter(self, lease: Lease, reason: str) -> None:
        if self._mine([lease]):
            letter = json.dumps({"body": encoded(lease.body), "reason": reason[:10_000]})
            self._send([{"MessageBody": letter}], "-dead")
            self.acknowledge([lease])

    def dead(self) -> list[tuple[bytes, str]]:
        """Of two that look at the same time, each sees a part."""
        seen: dict[str, dict[str, Any]] = {}
        empty = 0
        while empty < 2:
            messages = self._receive(AT_ONCE, LOOK_SECONDS, 1 if empty else 0, "-dead")
            empty = 0 if messages else empty + 1
            seen.update({message["MessageId"]: message for message in messages})
        self._make_visible_in(0, [message["ReceiptHandle"] for message in seen.values()], "-dead")
        letters = [json.loads(message["Body"]) for message in seen.values()]
        return [(decoded(letter["body"]), letter["reason"]) for letter in letters]

    def depth(self) -> Depth:
        """As SQS counts: right within about a minute."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        counts = [
            self._call("get_queue_attributes", kind, AttributeNames=names)["Attributes"] for kind in ("", "-dead")
        ]
        (waiting, leased), dead = ([int(count[name]) for name in names] for count in counts)
        return Depth(waiting=waiting, leased=leased, dead=sum(dead), approximate=True)

    def close(self) -> None:
        self._pool.shutdown(wait=False)
        self._client.close()

    # -- calls --------------------------------------------------------------------------------------------------------

    def _mine(self, leases: Sequence[Lease]) -> list[Lease]:
        now = time.monotonic()
        for lease in leases:
            if lease.receipt.held_until <= now:
                lease.receipt.held_until = 0.0
        return [lease for lease in leases if lease.receipt.held_until]

    def _make_visible_in(self, seconds: int, leases: Sequence[Lease | str], kind: str = "") -> list[str]:
        """The handles of those whose time was over."""
        handles = [lease if isinstance(lease, str) else lease.receipt.handle for lease in leases]
        entries = [{"ReceiptHandle": handle, "VisibilityTimeout": seconds} for handle in handles]
        verb = "change_message_visibility_batch"
        over = self._each(lambda chunk: self._batch(verb, chunk, kind), list(calls(entries)))
        return [entry["ReceiptHandle"] for entries in over for entry in entries]

    def _batch(self, verb: str, entries: list[dict[str, Any]], kind: str = "") -> list[dict[str, Any]]:
        """The entries that SQS refuses because their lease is over. The others are tried until they succeed."""
        left = {str(number): {"Id": str(number), **entry} for number, entry in enumerate(entries)}
        over: list[dict[str, Any]] = []

        def attempt() -> None:
            answer = self._translated(lambda: self._made(verb)(QueueUrl=self._url(kind), Entries=list(left.values())))
            for done in answer.get("Successful", []):
                left.pop(done["Id"], None)
            for failed in answer.get("Failed", []):
                if failed["Code"].removeprefix("AWS.SimpleQueueService.") in OVER and verb != "send_message_batch":
                    over.append(left.pop(failed["Id"]))
                elif failed.get("SenderFault"):
                    raise ConfigError(
                        f"queue {self.url}: SQS refuses an item: {failed['Code']} {failed.get('Message', '')}"
                    )
            if left:
                raise TransientError(f"queue {self.url}: SQS did not take {len(left)} of {len(entries)} items")

        if left:
            persist(attempt)
        return over

    def _call(self, verb: str, kind: str, **arguments: Any) -> dict[str, Any]:
        return persist(lambda: self._translated(lambda: self._made(verb)(QueueUrl=self._url(kind), **arguments)))

    def _made(self, verb: str) -> Callable[..., dict[str, Any]]:
        return getattr(self._client, verb)

    def _url(self, kind: str) -> str:
        with self._lock:
            if kind not in self._urls:
                self._make()
            return self._urls[kind]

    def _each(self, act: Callable[[S], T], all: list[S]) -> list[T]:
        return list(self._pool.map(act, all)) if len(all) > 1 else [act(one) for one in all]

    def _translated(self, call: Callable[[], T]) -> T:
        import botocore.exceptions as refusals

        try:
            return call()
        except refusals.ClientError as error:
            code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
            code = code.removeprefix("AWS.SimpleQueueService.") if code not in GONE else code
            said = f"queue {self.url}: SQS: {error}"
            if code in GONE:
                self._urls.clear()
                raise TransientError(f"{said}; the queue {self._name} is made again") from error
            if code in EXPIRED:
                raise CredentialsError(f"{said}; renew the credentials") from error
            if code in PASSING or status >= 500 or status == 429:
                raise TransientError(said) from error
            if code in WRONG_KEYS:
                raise ConfigError(f"{said}; give it the keys, profile or role of an account that exists") from error
            raise ConfigError(f"{said}; what is needed stands in {POLICY}") from error
        except (refusals.NoCredentialsError, refusals.PartialCredentialsError, refusals.ProfileNotFound) as error:
            raise ConfigError(
                f"queue {self.url}: {error}; set AWS_PROFILE or keys, or give the machine a role"
            ) from error
        except refusals.HTTPClientError as error:
            raise TransientError(f"queue {self.url}: no answer from SQS there: {error}") from error
        except (refusals.BotoCoreError, ValueError) as error:
            if isinstance(error, refusals.ConnectionError):
                raise TransientError(f"queue {self.url}: no answer from SQS there: {error}") from error
            raise ConfigError(f"queue {self.url}: {error}") from error


def sqs_name(name: str) -> str:
    """SQS takes 80 letters, digits, - and _; what is changed for that is told apart by a hash."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    if plain != name or len(plain) > 60:
        plain = f"{plain[:50]}-{hashlib.sha256(name.encode()).hexdigest()[:9]}"
    return f"holdfast-{plain}"


def encoded(body: bytes) -> str:
    """SQS takes text, and not every character of it."""
    text = body.decode("ascii", "replace")
    if text and text.isascii() and text.isprintable() and not text.startswith(BASE64):
        return text
    return BASE64 + base64.b64encode(body).decode()


def decoded(text: str) -> bytes:
    return base64.b64decode(text.removeprefix(BASE64)) if text.startswith(BASE64) else text.encode()


def calls(entries: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """In chunks that one call takes."""
    chunk: list[dict[str, Any]] = []
    size = 0
    for entry in entries:
        bytes_of_it = len(entry.get("MessageBody", "")) + 100
        if chunk and (len(chunk) == AT_ONCE or size + bytes_of_it > CALL_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += bytes_of_it
    if chunk:
        yield chunk
