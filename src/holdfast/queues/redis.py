"""`redis://HOST/` and `rediss://HOST/`: a server of Redis 5 or newer, or Valkey.

Four keys a queue: who is due when (a sorted set: waiting items below zero in the order they were put, leased ones at the
instant their lease ends), bodies, claims, and the dead. Every verb is one script, so no worker sees another's half-way,
and time is the server's own. Not a stream with a consumer group: there an entry's idle time is measured against the
timeout of whoever asks, a late holder claims it back from the next one, and depth is a count over consumers.

A restart keeps what the append-only file has. With `appendfsync always` that is all that a verb has answered to. With Redis's
default, `everysec`, a power cut loses the last second; and while the disk is too slow for a flush a second, writes wait up to two
seconds in the server's memory and are answered all the same, so that a killed server loses those too.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from holdfast.errors import ConfigError, TransientError
from holdfast.queues.address import PASSWORD_VARIABLE, ServerAddress
from holdfast.queues.patience import OPENING_SECONDS, persist, poll
from holdfast.queues.protocol import Depth, Lease

ANSWER_SECONDS = 20.0
"""A server that takes longer is away."""
AT_ONCE = 500
"""Items in one call of a script: others wait as long."""
PASSING = ("LOADING", "BUSY", "OOM", "READONLY", "MASTERDOWN", "MISCONF", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS")
"""The first word of refusals that pass."""

# KEYS: due, bodies, claims, dead. A claim is "DELIVERIES TOKEN"; without token nobody has it.
NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function claim_of(id)
    local deliveries, token = string.match(redis.call('HGET', KEYS[3], id) or '0 ', '^(%d+) (.*)$')
    return tonumber(deliveries), token
end
local function forget(id)
    redis.call('ZREM', KEYS[1], id); redis.call('HDEL', KEYS[2], id); redis.call('HDEL', KEYS[3], id)
end
"""
SCRIPTS = {
    # ARGV: id, body, id, body, ...
    "put": """
    for i = 1, #ARGV, 2 do
        if redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) == 1 then
            redis.call('ZADD', KEYS[1], -redis.call('HINCRBY', KEYS[3], 'put', 1), ARGV[i])
        end
    end""",
    # ARGV: limit, visibility in ms, most deliveries, token, reason of a death
    "lease": """
    local found = {}
    while #found < tonumber(ARGV[1]) do
        local ids = redis.call('ZREVRANGEBYSCORE', KEYS[1], now, '-inf', 'LIMIT', 0, 1)
        if #ids == 0 then break end
        local id = ids[1]
        local body, deliveries = redis.call('HGET', KEYS[2], id), claim_of(id) + 1
        if not body then
            forget(id)
        elseif deliveries > tonumber(ARGV[3]) then
            redis.call('HSET', KEYS[4], id, ARGV[5] .. '\\n' .. body)
            forget(id)
        else
            redis.call('ZADD', KEYS[1], now + ARGV[2], id)
            redis.call('HSET', KEYS[3], id, deliveries .. ' ' .. ARGV[4])
            table.insert(found, {id, body, deliveries})
        end
    end
    return found""",
    # ARGV: visibility in ms, id, token, id, token, ...
    "extend": """
    local lost = {}
    for i = 2, #ARGV, 2 do
        local _, token = claim_of(ARGV[i])
        if token == ARGV[i + 1] then
            redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[i])
        else
            table.insert(lost, ARGV[i])
        end
    end
    return lost""",
    # ARGV: id, token, id, token, ...
    "acknowledge": """
    for i = 1, #ARGV, 2 do
        local _, token = claim_of(ARGV[i])
        if token == ARGV[i + 1] then forget(ARGV[i]) end
    end""",
    # ARGV: id, token, id, token, ...
    "hand_back": """
    for i = 1, #ARGV, 2 do
        local deliveries, token = claim_of(ARGV[i])
        if token == ARGV[i + 1] then
            redis.call('ZADD', KEYS[1], now, ARGV[i])
            redis.call('HSET', KEYS[3], ARGV[i], (deliveries - 1) .. ' ')
        end
    end""",
    # ARGV: id, token, reason
    "dead_letter": """
    local _, token = claim_of(ARGV[1])
    local body = redis.call('HGET', KEYS[2], ARGV[1])
    if token == ARGV[2] and body then
        redis.call('HSET', KEYS[4], ARGV[1], ARGV[3] .. '\\n' .. body)
        forget(ARGV[1])
    end""",
    "depth": """
    local waiting = redis.call('ZCOUNT', KEYS[1], '-inf', now)
    return {waiting, redis.call('ZCARD', KEYS[1]) - waiting, redis.call('HLEN', KEYS[4])}""",
}
T = TypeVar("T")
log = logging.getLogger(__name__)


class RedisQueue:
    def __init__(self, url: str, name: str, visibility_seconds: float, max_deliveries: int) -> None:
        import redis

        address = ServerAddress.parse(url, 6379)
        self.url = address.shown
        number = address.path.strip("/")
        if not number.isdecimal() and number:
            raise ConfigError(
                f"queue {self.url}: the path of a Redis URL is a database's number: {address.scheme}://HOST/0"
            )
        # The braces keep a queue's keys in one slot of a cluster.
        self._keys = [f"holdfast:{{{name}}}:{kind}" for kind in ("due", "bodies", "claims", "dead")]
        self._visibility_ms, self._max_deliveries = int(visibility_seconds * 1000), max_deliveries
        self._client = redis.Redis(
            host=address.host,
            port=address.port,
            db=int(number or 0),
            username=address.user or None,
            password=address.password or None,
            ssl=address.scheme == "rediss",
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=OPENING_SECONDS,
            socket_keepalive=True,
            health_check_interval=30,
        )
        self._scripts = {name: self._client.register_script(NOW + script) for name, script in SCRIPTS.items()}
        persist(lambda: self._translated(self._look), OPENING_SECONDS)

    def _look(self) -> None:
        """Is it there, does it let us in, and does it keep what it is given?"""
        import redis

        version = str(self._client.info("server").get("redis_version", "0"))
        if version.startswith(("1.", "2.", "3.", "4.")):
            raise ConfigError(
                f"queue {self.url}: Redis {version} is too old, its scripts can't tell the time; use 5 or newer"
            )
        try:
            policy = self._client.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction")
            kept = self._client.config_get("appendonly").get("appendonly", "yes")
        except redis.ResponseError:
            return  # services that are run for one don't tell
        if policy != "noeviction":
            log.warning(
                "queue: %s evicts keys when it is full (maxmemory-policy %s): items may vanish", self.url, policy
            )
        if kept == "no":
            log.warning(
                "queue: %s does not write what it is given to a file (appendonly no): a restart loses it", self.url
            )

    def put(self, bodies: Sequence[bytes]) -> None:
        # An id of our own: a call that is made again because its answer was lost puts nothing twice.
        prefix, number = secrets.token_hex(6), itertools.count()
        for chunk in chunks(bodies):
            items = [part for body in chunk for part in (f"{prefix}{next(number):x}", body)]
            self._call("put", items)

    def lease(self, limit: int = 1, wait_seconds: float = 0.0) -> list[Lease]:
        return poll(lambda: self._lease(min(limit, AT_ONCE)), wait_seconds)

    def _lease(self, limit: int) -> list[Lease]:
        token = secrets.token_hex(8)
        reason = f"handed out {self._max_deliveries} times and never acknowledged"
        found = self._call("lease", [limit, self._visibility_ms, self._max_deliveries, token, reason])
        return [Lease(body=body, deliveries=count, receipt=(id.decode(), token)) for id, body, count in found]

    def extend(self, leases: Sequence[Lease]) -> list[Lease]:
        lost = set()
        for chunk in chunks(leases):
            lost |= {id.decode() for id in self._call("extend", [self._visibility_ms, *receipts(chunk)])}
        return [lease for lease in leases if lease.receipt[0] in lost]

    def acknowledge(self, leases: Sequence[Lease]) -> None:
        for chunk in chunks(leases):
            self._call("acknowledge", receipts(chunk))

    def hand_back(self, leases: Sequence[Lease]) -> None:
        for chunk in chunks(leases):
            self._call("hand_back", receipts(chunk))

    def dead_letter(self, lease: Lease, reason: str) -> None:
        self._call("dead_letter", [*lease.receipt, reason.replace("\n", " | ")])

    def dead(self) -> list[tuple[bytes, str]]:
        found: dict[bytes, bytes] = persist(lambda: self._translated(lambda: self._client.hgetall(self._keys[3])))
        parts = [text.partition(b"\n") for _, text in sorted(found.items())]
        return [(body, reason.decode()) for reason, _, body in parts]

    def depth(self) -> Depth:
        waiting, leased, dead = self._call("depth", [])
        return Depth(waiting=waiting, leased=leased, dead=dead)

    def close(self) -> None:
        self._client.close()

    def _call(self, verb: str, arguments: list[Any]) -> Any:
        return persist(lambda: self._translated(lambda: self._scripts[verb](keys=self._keys, args=arguments)))

    def _translated(self, call: Callable[[], T]) -> T:
        import redis

        try:
            return call()
        except redis.AuthenticationError as error:
            raise ConfigError(
                f"queue {self.url}: the server does not let us in: {error}; set {PASSWORD_VARIABLE}, or the URL's user"
            ) from error
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            if "NOAUTH" in str(error):
                raise ConfigError(f"queue {self.url}: the server wants a password; set {PASSWORD_VARIABLE}") from error
            if "CERTIFICATE" in str(error).upper():
                raise ConfigError(f"queue {self.url}: the server's certificate is not trusted: {error}") from error
            raise TransientError(f"queue {self.url}: no answer from a Redis there: {error}") from error
        except redis.RedisError as error:
            if str(error).startswith(PASSING):
                raise TransientError(f"queue {self.url}: Redis can't take it now: {error}") from error
            raise ConfigError(f"queue {self.url}: Redis refuses: {error}") from error


def chunks(all: Sequence[T]) -> Iterable[Sequence[T]]:
    return (all[start : start + AT_ONCE] for start in range(0, len(all), AT_ONCE))


def receipts(leases: Sequence[Lease]) -> list[str]:
    return [part for lease in leases for part in lease.receipt]
