"""`store+file:///PATH`, `store+s3://BUCKET/PREFIX`, `store+gs://BUCKET/PREFIX`: the object store is the queue, no server.

An item is an object under items/; whoever creates claims/ITEM/0001 has it, because of two creations one wins. The claim says
when it ends: to extend it is to write it again, and after its end the next may create claims/ITEM/0002. Who is done deletes
the item, then the claims. Ends are by each machine's own clock, so clocks that differ by more than a lease lasts make
workers take each other's batches: done twice, with one result.

A lease costs two requests that write and two that read; finding one costs a listing now and then, in pages of 1,000.
"""

from __future__ import annotations

import base64
import json
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from holdfast.errors import AlreadyExistsError, NotFoundError
from holdfast.queues.address import check_name, redacted
from holdfast.queues.patience import OPENING_SECONDS, persist, poll
from holdfast.queues.protocol import Depth, Lease
from holdfast.storage import DirectoryStore, ObjectStore, open_store

STALE_SECONDS = 10.0
"""A listing is thrown away sooner when it misleads."""
MISSES = 3
FIRST, BACK = f"/{1:08d}", ".back"
"""The end of a claim's key: an item's first, one that was handed back."""
ONCE_A_SECOND = 1.0
"""How often an idle worker lists a bucket at most: listings are paid for."""
S, T = TypeVar("S"), TypeVar("T")


@dataclass(frozen=True, slots=True)
class Claim:
    key: str
    token: str
    deliveries: int
    ends_at: float
    """Seconds since 1970."""

    @property
    def content(self) -> bytes:
        return json.dumps({"token": self.token, "deliveries": self.deliveries, "ends_at": self.ends_at}).encode()


@dataclass(slots=True)
class Receipt:
    item: str
    claim: Claim
    held_until: float
    """On the monotonic clock."""


class StoreQueue:
    def __init__(
        self,
        store: ObjectStore | str,
        name: str,
        visibility_seconds: float = 600.0,
        max_deliveries: int = 5,
        credentials: Any = None,
    ) -> None:
        """`store`: one that is open already, or the queue's URL, which open_store takes with `credentials`."""
        self._store = open_store(store.removeprefix("store+"), credentials) if isinstance(store, str) else store
        self.url = redacted(f"store+{self._store.url}")
        self._place = f"queues/{check_name(name)}"
        self._visibility_seconds, self._max_deliveries = visibility_seconds, max_deliveries
        on_this_disk = isinstance(self._store, DirectoryStore)
        self._listing_pause_seconds = 0.02 if on_this_disk else ONCE_A_SECOND
        # A bucket answers in tens of milliseconds, and many requests at a time.
        self._pool = ThreadPoolExecutor(4 if on_this_disk else 16, thread_name_prefix="queue")
        self._lock = threading.RLock()
        self._candidates: deque[str] = deque()
        self._claims: dict[str, str] = {}
        """By item, as last listed: the key of its newest claim."""
        self._ends: dict[str, Claim] = {}
        """Claims that were read, by their keys."""
        self._listed_at = self._list_again_at = 0.0
        persist(lambda: self._store.list(f"{self._place}/dead/"), OPENING_SECONDS)

    def put(self, bodies: Sequence[bytes]) -> None:
        prefix = f"{self._place}/items/{time.time_ns():020d}-{secrets.token_hex(4)}"
        keys = [f"{prefix}-{number:08d}" for number in range(len(bodies))]
        self._each(lambda pair: persist(lambda: self._store.put(*pair)), list(zip(keys, bodies, strict=True)))
        self._list_again_at = 0.0

    # -- leasing ------------------------------------------------------------------------------------------------------

    def lease(self, limit: int = 1, wait_seconds: float = 0.0) -> list[Lease]:
        return poll(lambda: self._lease(limit), wait_seconds)

    def _lease(self, limit: int) -> list[Lease]:
        found: list[Lease] = []
        with self._lock:
            misses = 0
            if time.monotonic() - self._listed_at > STALE_SECONDS:
                self._candidates.clear()
            while len(found) < limit:
                if not self._candidates and not self._list():
                    break
                item = self._candidates.popleft()
                lease = self._claimed(item)
                if lease:
                    found.append(lease)
                elif lease is None and (misses := misses + 1) >= MISSES:
                    misses = 0
                    self._candidates.clear()
        return found

    def _list(self) -> bool:
        """Whether there is anything that may be had. Nothing is listed while the last listing is too young."""
        now = time.monotonic()
        if now < self._list_again_at:
            return False
        items = self._items()
        self._listed_at = now = time.monotonic()
        self._claims = self._newest_claims()
        free = [item for item in items if item not in self._claims]
        # Everyone begins somewhere else: of two that try for the same item, one has wasted a request.
        random.shuffle(free)
        over = [item for item in items if item in self._claims and self._is_over(self._claims[item])]
        self._candidates = deque([*over, *free])
        self._list_again_at = now + self._listing_pause_seconds * random.uniform(0.7, 1.3)
        return bool(self._candidates)

    def _claimed(self, item: str) -> Lease | bool | None:
        """None: another has it by now, and this listing is old. False: it is dead."""
        last, number, deliveries = self._claims.get(item), 1, 1
        if last:
            claim = self._read(last)
            if not claim or claim.ends_at > time.time():
                return None
            number, deliveries = int(last.rpartition("/")[2].removesuffix(BACK)) + 1, claim.deliveries + 1
        key = f"{self._place}/claims/{item}/{number:08d}"
        claim = Claim(key, secrets.token_hex(8), deliveries, time.time() + self._visibility_seconds)
        receipt = Receipt(item, claim, time.monotonic() + self._visibility_seconds)
        try:
            persist(lambda: self._store.create(key, claim.content))
        except AlreadyExistsError:
            # Perhaps by this very call, whose answer was lost.
            found = self._read(key)
            if not found or found.token != claim.token:
                return None
        try:
            body = persist(lambda: self._store.get(f"{self._place}/items/{item}"))
        except NotFoundError:
            persist(lambda: self._store.delete(key))  # it was done since it was listed
            return None
        lease = Lease(body=body, deliveries=deliveries, receipt=receipt)
        if deliveries > self._max_deliveries:
            self._bury(lease, f"handed out {self._max_deliveries} times and never acknowledged")
            return False
        return lease

    def _read(self, key: str) -> Claim | None:
        try:
            content = json.loads(persist(lambda: self._store.get(key)))
        except (NotFoundError, ValueError):
            return None
        claim = self._ends[key] = Claim(key, content["token"], content["deliveries"], content["ends_at"])
        return claim

    def _is_over(self, key: str) -> bool:
        """Read again only once its end, as it was last seen, has passed."""
        known = self._ends.get(key)
        if known and known.ends_at > time.time():
            return False
        claim = self._read(key)
        return bool(claim) and claim.ends_at <= time.time()  # type: ignore[union-attr]

    def _items(self) -> list[str]:
        prefix = f"{self._place}/items/"
        return [info.key.removeprefix(prefix) for info in persist(lambda: self._store.list(prefix))]

    def _newest_claims(self) -> dict[str, str]:
        prefix = f"{self._place}/claims/"
        newest: dict[str, str] = {}
        for info in persist(lambda: self._store.list(prefix)):
            newest[info.key.removeprefix(prefix).rpartition("/")[0]] = info.key
        self._ends = {key: self._ends[key] for key in newest.values() if key in self._ends}
        return newest

    # -- what becomes of a lease --------------------------------------------------------------------------------------

    def extend(self, leases: Sequence[Lease]) -> list[Lease]:
        kept = self._each(self._extend, leases)
        return [lease for lease, is_kept in zip(leases, kept, strict=True) if not is_kept]

    def _extend(self, lease: Lease) -> bool:
        if not self._is_mine(lease):
            return False
        claim, until = lease.receipt.claim, time.monotonic() + self._visibility_seconds
        longer = Claim(claim.key, claim.token, claim.deliveries, time.time() + self._visibility_seconds)
        persist(lambda: self._store.put(longer.key, longer.content))
        lease.receipt.held_until = until
        return True

    def acknowledge(self, leases: Sequence[Lease]) -> None:
        self._each(lambda lease: self._is_mine(lease) and self._forget(lease), leases)

    def hand_back(self, leases: Sequence[Lease]) -> None:
        self._each(self._hand_back, leases)
        self._list_again_at = 0.0

    def _hand_back(self, lease: Lease) -> None:
        if self._is_mine(lease):
            claim: Claim = lease.receipt.claim
            # An object of its own: a listing shows it, and nobody has to read every claim again and again.
            back = Claim(f"{claim.key}{BACK}", claim.token, claim.deliveries - 1, 0.0)
            persist(lambda: self._store.put(back.key, back.content))
            lease.receipt.held_until = 0.0

    def dead_letter(self, lease: Lease, reason: str) -> None:
        if self._is_mine(lease):
            self._bury(lease, reason)

    def _is_mine(self, lease: Lease) -> bool:
        """Asked of the store only where another may have taken it: this lease's time was over."""
        receipt: Receipt = lease.receipt
        if time.monotonic() < receipt.held_until:
            return True
        claims = persist(lambda: self._store.list(f"{self._place}/claims/{receipt.item}/"))
        if not claims or claims[-1].key != receipt.claim.key:
            return False
        claim = self._read(receipt.claim.key)
        return claim is not None and claim.token == receipt.claim.token

    def _forget(self, lease: Lease) -> None:
        item, claim = lease.receipt.item, lease.receipt.claim.key
        keys = [f"{self._place}/items/{item}", claim]
        if not claim.endswith(FIRST):
            prefix = f"{self._place}/claims/{item}/"
            keys = [keys[0], *(info.key for info in persist(lambda: self._store.list(prefix)))]
        for key in keys:
            persist(lambda key=key: self._store.delete(key))
        lease.receipt.held_until = 0.0

    def _bury(self, lease: Lease, reason: str) -> None:
        letter = {"body": base64.b64encode(lease.body).decode(), "reason": reason}
        key = f"{self._place}/dead/{lease.receipt.item}"
        persist(lambda: self._store.put(key, json.dumps(letter).encode()))
        self._forget(lease)

    def dead(self) -> list[tuple[bytes, str]]:
        letters = []
        for info in persist(lambda: self._store.list(f"{self._place}/dead/")):
            letter = json.loads(persist(lambda key=info.key: self._store.get(key)))
            letters.append((base64.b64decode(letter["body"]), letter["reason"]))
        return letters

    def depth(self) -> Depth:
        with self._lock:
            items, claims = self._items(), self._newest_claims()
            leased = sum(item in claims and not self._is_over(claims[item]) for item in items)
        dead = len(persist(lambda: self._store.list(f"{self._place}/dead/")))
        return Depth(waiting=len(items) - leased, leased=leased, dead=dead)

    def close(self) -> None:
        self._pool.shutdown(wait=False)

    def _each(self, act: Callable[[S], T], all: Sequence[S]) -> list[T]:
        return list(self._pool.map(act, all)) if len(all) > 1 else [act(one) for one in all]
