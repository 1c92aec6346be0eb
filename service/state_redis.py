"""User state in Redis: one list per user and history, one pipelined round trip per call."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline

from service import keywords_redis
from service.redis_client import PREFIX, execute
from service.state import LIMITS, Stamped, UserState, Visit


class RedisUsers:
    """A `StateStore` in Redis."""

    def __init__(self, redis: Redis, ttl_seconds: float) -> None:
        self._redis = redis
        self._ttl = ttl_seconds

    async def read(self, user: str, now: float) -> UserState:
        pipe = self._redis.pipeline(transaction=True)
        self._queue_read(pipe, user)
        return self._state(await execute(pipe), now)

    async def visit(self, user: str | None, query: str, keys: Sequence[str], now: float) -> Visit:
        if user is None and not keys:
            return Visit(UserState(), {})
        pipe = self._redis.pipeline(transaction=True)
        if user is not None:
            self._queue_read(pipe, user)
            self._queue_append(pipe, user, query, now)
        if keys:
            keywords_redis.queue_lookup(pipe, keys)
        replies = await execute(pipe)
        entries = keywords_redis.entries(keys, replies.pop()) if keys else {}
        return Visit(self._state(replies, now) if user is not None else UserState(), entries)

    async def set_profile(self, user: str, profile: str, now: float) -> None:
        pipe = self._redis.pipeline(transaction=True)
        key = _key(user, "profile")
        if profile:
            pipe.set(key, f"{now!r} {profile}", px=int(self._ttl * 1000))
        else:
            pipe.delete(key)
        await execute(pipe)

    async def forget(self, user: str) -> None:
        pipe = self._redis.pipeline(transaction=True)
        pipe.delete(*(_key(user, name) for name in ("profile", *LIMITS)))
        await execute(pipe)

    def _queue_read(self, pipe: Pipeline, user: str) -> None:
        pipe.get(_key(user, "profile"))
        for name in LIMITS:
            pipe.lrange(_key(user, name), 0, -1)

    def _queue_append(self, pipe: Pipeline, user: str, query: str, now: float) -> None:
        key = _key(user, "queries")
        pipe.rpush(key, f"{now!r} {query}")
        pipe.ltrim(key, -LIMITS["queries"], -1)
        pipe.pexpire(key, int(self._ttl * 1000))

    def _state(self, replies: list[Any], now: float) -> UserState:
        # Redis forgets whole keys; what is too old in them is left out here.
        profile, *lists = replies
        stamped = [_parse(profile)] if profile is not None else []
        kept = [entry.value for entry in stamped if entry.at > now - self._ttl]
        histories = {}
        for name, entries in zip(LIMITS, lists, strict=False):
            histories[name] = tuple(s for s in map(_parse, entries) if s.at > now - self._ttl)
        return UserState(
            **{str(name): found for name, found in histories.items()}, profile=kept[0] if kept else ""
        )


def user_prefix(user: str) -> str:
    """What the keys of a user begin with; quoting keeps separators of ids out."""
    return f"{PREFIX}:user:{quote(user, safe='')}:"


def _key(user: str, name: str) -> str:
    return user_prefix(user) + name


def _parse(entry: str) -> Stamped:
    at, _, value = entry.partition(" ")
    return Stamped(float(at), value)
