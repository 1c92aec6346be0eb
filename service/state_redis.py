"""The shared state store: one Redis list per user and history, one pipelined round trip per call."""

from collections.abc import Iterable
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from onesearch.errors import ConfigError
from service.state import LIMITS, History, Stamped, StateUnavailable, UserState

_KEY = "onesearch:user"


class RedisStore:
    """A `StateStore` in Redis. It connects when first used, so the service starts while Redis is away."""

    def __init__(self, url: str, ttl_seconds: float, timeout_seconds: float) -> None:
        """Raises ConfigError for an address that Redis clients do not understand."""
        self._ttl = ttl_seconds
        try:
            # No client retries: a search that cannot have its history in time is served without.
            self._redis: Redis = Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ConfigError(f"state: not a Redis address ({error})") from error

    async def read(self, user: str, now: float) -> UserState:
        pipe = self._redis.pipeline(transaction=True)
        self._queue_read(pipe, user)
        return self._state(await _execute(pipe), now)

    async def visit(self, user: str, query: str, now: float) -> UserState:
        pipe = self._redis.pipeline(transaction=True)
        self._queue_read(pipe, user)
        self._queue_append(pipe, user, "queries", query, now)
        return self._state(await _execute(pipe), now)

    async def append(self, user: str, item_id: int, histories: Iterable[History], now: float) -> None:
        pipe = self._redis.pipeline(transaction=True)
        for name in histories:
            self._queue_append(pipe, user, name, str(item_id), now)
        await _execute(pipe)

    async def close(self) -> None:
        await self._redis.aclose()

    def _queue_read(self, pipe: Pipeline, user: str) -> None:
        for name in LIMITS:
            pipe.lrange(_key(user, name), 0, -1)

    def _queue_append(self, pipe: Pipeline, user: str, name: History, value: str, now: float) -> None:
        key = _key(user, name)
        pipe.rpush(key, f"{now!r} {value}")
        pipe.ltrim(key, -LIMITS[name], -1)
        pipe.pexpire(key, int(self._ttl * 1000))

    def _state(self, replies: list[list[str]], now: float) -> UserState:
        # Redis forgets whole lists; single entries that are too old are left out here.
        found = {}
        for name, entries in zip(LIMITS, replies, strict=False):
            stamped = (_parse(entry) for entry in entries)
            found[name] = tuple(s for s in stamped if s.at > now - self._ttl)
        return UserState(**{str(name): entries for name, entries in found.items()})


def _key(user: str, name: History) -> str:
    # The braces put all lists of a user in one slot of a Redis cluster; quoting keeps braces of ids out.
    return f"{_KEY}:{{{quote(user, safe='')}}}:{name}"


def _parse(entry: str) -> Stamped:
    at, _, value = entry.partition(" ")
    return Stamped(float(at), value)


async def _execute(pipe: Pipeline) -> list[list[str]]:
    try:
        replies: list[list[str]] = await pipe.execute()
        return replies
    except (RedisError, OSError, TimeoutError) as error:
        raise StateUnavailable(f"redis: {type(error).__name__}") from error
