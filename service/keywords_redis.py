"""Keyword entries and their queue in Redis.

The queue is a sorted set of keys by due time beside a hash of jobs, not a stream: one structure deduplicates by key,
delays a retry, and hands a claimed job to the next worker when its lease ends.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from redis.asyncio import Redis

from service.keywords import DEAD_SECONDS, MAX_JOBS, Claim, Entry, Job, QueueState, kept_until
from service.redis_client import PREFIX, execute, told

_ENTRY = f"{PREFIX}:keywords:"
_JOBS, _DUE, _DEAD, _ATTEMPTS, _ASKED = (
    f"{PREFIX}:jobs:{name}" for name in ("body", "due", "dead", "tries", "at")
)
_QUEUE = [_JOBS, _DUE, _DEAD, _ATTEMPTS, _ASKED]

# All scripts get the keys of _QUEUE.
_ENQUEUE = """
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', ARGV[2])) do
    redis.call('ZREM', KEYS[3], key)
    redis.call('HDEL', KEYS[1], key)
    redis.call('HDEL', KEYS[4], key)
end
for _, job in ipairs(cjson.decode(ARGV[4])) do
    if redis.call('HLEN', KEYS[1]) < tonumber(ARGV[3]) and redis.call('HSETNX', KEYS[1], job.key, job.body) == 1 then
        redis.call('ZADD', KEYS[2], ARGV[1], job.key)
        redis.call('ZADD', KEYS[5], job.at, job.key)
    end
end
"""
_CLAIM = """
local claimed = {}
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])) do
    redis.call('ZADD', KEYS[2], ARGV[2], key)
    claimed[#claimed + 1] = redis.call('HGET', KEYS[1], key)
    claimed[#claimed + 1] = redis.call('HINCRBY', KEYS[4], key, 1)
end
return claimed
"""


class RedisKeywords:
    """A `KeywordStore` in Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._enqueue = redis.register_script(_ENQUEUE)
        self._claim = redis.register_script(_CLAIM)

    async def lookup(self, keys: Sequence[str], now: float) -> dict[str, Entry]:
        return entries(keys, await told(self._redis.mget([entry_name(key) for key in keys])) if keys else [])

    async def enqueue(self, jobs: Sequence[Job], now: float) -> None:
        body = orjson.dumps([{"key": job.key, "at": job.at, "body": job.to_json().decode()} for job in jobs])
        await told(self._enqueue(keys=_QUEUE, args=[repr(now), repr(now - DEAD_SECONDS), MAX_JOBS, body]))

    async def claim(self, limit: int, lease_seconds: float, now: float) -> list[Claim]:
        found = await told(self._claim(keys=_QUEUE, args=[repr(now), repr(now + lease_seconds), limit]))
        pairs = zip(found[::2], found[1::2], strict=True)
        return [Claim(Job(**orjson.loads(body)), int(attempts)) for body, attempts in pairs]

    async def finish(self, key: str, entries: Mapping[str, Entry], now: float) -> None:
        pipe = self._redis.pipeline(transaction=True)
        for name, entry in entries.items():
            kept_ms = int((kept_until(entry, now) - now) * 1000)
            pipe.set(_ENTRY + name, orjson.dumps([entry.fresh_until, entry.keywords]), px=max(1, kept_ms))
        pipe.hdel(_JOBS, key)
        pipe.hdel(_ATTEMPTS, key)
        pipe.zrem(_DUE, key)
        pipe.zrem(_ASKED, key)
        await execute(pipe)

    async def retry(self, key: str, due: float) -> None:
        await told(self._redis.zadd(_DUE, {key: due}, xx=True))

    async def bury(self, key: str, now: float) -> None:
        pipe = self._redis.pipeline(transaction=True)
        pipe.zrem(_DUE, key)
        pipe.zrem(_ASKED, key)
        pipe.zadd(_DEAD, {key: now})
        await execute(pipe)

    async def queue(self, now: float) -> QueueState:
        pipe = self._redis.pipeline(transaction=True)
        pipe.zcard(_DUE)
        pipe.zcard(_DEAD)
        pipe.zrange(_ASKED, 0, 0, withscores=True)
        waiting, dead, oldest = await execute(pipe)
        return QueueState(waiting, dead, max(0.0, now - oldest[0][1]) if oldest else 0.0)


def entry_name(key: str) -> str:
    """The name of an entry in Redis."""
    return _ENTRY + key


def entries(keys: Sequence[str], reply: Sequence[Any]) -> dict[str, Entry]:
    """What Redis has under the names of keys."""
    found = {}
    for key, value in zip(keys, reply, strict=True):
        if value is not None:
            fresh_until, words = orjson.loads(value)
            found[key] = Entry(tuple(words), fresh_until)
    return found
