"""User state in Redis: one list per user and history, one round trip per call.

What every search does is one script, not a pipeline: to the client a command costs more time than to Redis.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from redis.asyncio import Redis

from service import keywords_redis
from service.redis_client import PREFIX, execute, told
from service.state import LIMITS, Stamped, UserState, Visit

# KEYS: profile and histories of the user, then keyword entries. ARGV: the query as a list entry, how many queries to
# keep, milliseconds of retention. Answers with the profile, the histories without this query, and the entries.
_VISIT = f"""
local found = {{redis.call('GET', KEYS[1])}}
for place = 2, {1 + len(LIMITS)} do
    found[place] = redis.call('LRANGE', KEYS[place], 0, -1)
end
for place = {2 + len(LIMITS)}, #KEYS do
    found[place] = redis.call('GET', KEYS[place])
end
redis.call('RPUSH', KEYS[2], ARGV[1])
redis.call('LTRIM', KEYS[2], -ARGV[2], -1)
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return found
"""
assert next(iter(LIMITS)) == "queries", "the script appends to the first history"


class RedisUsers:
    """A `StateStore` in Redis."""

    def __init__(self, redis: Redis, ttl_seconds: float) -> None:
        self._redis = redis
        self._ttl, self._ttl_ms = ttl_seconds, int(ttl_seconds * 1000)
        self._visit = redis.register_script(_VISIT)

    async def read(self, user: str, now: float) -> UserState:
        pipe = self._redis.pipeline(transaction=True)
        profile, *histories = _keys(user)
        pipe.get(profile)
        for key in histories:
            pipe.lrange(key, 0, -1)
        return self._state(await execute(pipe), now)

    async def visit(self, user: str | None, query: str, keys: Sequence[str], now: float) -> Visit:
        names = [keywords_redis.entry_name(key) for key in keys]
        if user is None:
            found = await told(self._redis.mget(names)) if names else []
            return Visit(UserState(), keywords_redis.entries(keys, found))
        own = _keys(user)
        arguments: list[str | int] = [f"{now!r} {query}", LIMITS["queries"], self._ttl_ms]
        replies: Any = await told(self._visit(keys=[*own, *names], args=arguments))
        return Visit(self._state(replies[: len(own)], now), keywords_redis.entries(keys, replies[len(own) :]))

    async def set_profile(self, user: str, profile: str, now: float) -> None:
        pipe = self._redis.pipeline(transaction=True)
        key = _keys(user)[0]
        if profile:
            pipe.set(key, f"{now!r} {profile}", px=self._ttl_ms)
        else:
            pipe.delete(key)
        await execute(pipe)

    async def forget(self, user: str) -> None:
        pipe = self._redis.pipeline(transaction=True)
        pipe.delete(*_keys(user), user_prefix(user) + "long")  # a list that former versions kept
        await execute(pipe)

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


def _keys(user: str) -> list[str]:
    """Of the profile, then of the histories."""
    prefix = user_prefix(user)
    return [prefix + name for name in ("profile", *LIMITS)]


def _parse(entry: str) -> Stamped:
    at, _, value = entry.partition(" ")
    return Stamped(float(at), value)
