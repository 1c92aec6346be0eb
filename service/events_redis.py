"""The event log and item counters in Redis: a stream, a hash per item, and one script that logs and applies.

Redis runs a script as one act and writes it to its append-only file as one transaction; it is also one command for
the client, whose time per command is most of what the log costs a search.
"""

from collections.abc import Sequence
from typing import Any

import orjson
from redis.asyncio import Redis

from service.events import EVENT_HISTORIES, EVENT_TYPES, Counts, Event, Exposure, Logged
from service.redis_client import PREFIX, execute, told
from service.state import LIMITS
from service.state_redis import user_prefix

_LOG, _CHANGED, _SEEN, _ITEM = f"{PREFIX}:log", f"{PREFIX}:changed", f"{PREFIX}:event:", f"{PREFIX}:item:"

# KEYS: log, changed items. ARGV: events as JSON, prefixes of event and item keys, milliseconds of retention and of
# histories, oldest log position to keep. Items rank in `changed` by a number that grows with every change.
_RECORD = """
local new = 0
for _, event in ipairs(cjson.decode(ARGV[1])) do
    if redis.call('SET', ARGV[2] .. event.id, '', 'NX', 'PX', ARGV[4]) then
        new = new + 1
        redis.call('XADD', KEYS[1], 'MINID', '~', ARGV[6], '*', 'event', event.body)
        if event.history then
            redis.call('RPUSH', event.history, event.value)
            redis.call('LTRIM', event.history, -event.limit, -1)
            redis.call('PEXPIRE', event.history, ARGV[5])
        end
        redis.call('HINCRBY', ARGV[3] .. event.item, event.type, 1)
        redis.call('ZADD', KEYS[2], redis.call('INCR', KEYS[2] .. ':mark'), event.item)
    end
end
return new
"""
# KEYS: log. ARGV: oldest log position to keep, then exposures as JSON.
_EXPOSE = """
for place = 2, #ARGV do
    redis.call('XADD', KEYS[1], 'MINID', '~', ARGV[1], '*', 'exposure', ARGV[place])
end
"""


class RedisEvents:
    """An `EventLog` in Redis."""

    def __init__(self, redis: Redis, ttl_seconds: float, retention_seconds: float) -> None:
        """ttl_seconds is that of the histories, retention_seconds that of the log."""
        self._redis = redis
        self._ttl_ms = int(ttl_seconds * 1000)
        self._retention_ms = int(retention_seconds * 1000)
        self._record = redis.register_script(_RECORD)
        self._expose = redis.register_script(_EXPOSE)

    async def record(self, events: Sequence[Event]) -> int:
        if not events:
            return 0
        body = orjson.dumps([_message(event) for event in events])
        arguments: list[str | bytes | int] = [
            body,
            _SEEN,
            _ITEM,
            self._retention_ms,
            self._ttl_ms,
            self._oldest(events[-1].at),
        ]
        return int(await told(self._record(keys=[_LOG, _CHANGED], args=arguments)))

    async def expose(self, exposures: Sequence[Exposure]) -> None:
        if exposures:
            oldest = self._oldest(exposures[-1].at)
            await told(self._expose(keys=[_LOG], args=[oldest, *(exposure.to_json() for exposure in exposures)]))

    async def entries(self, after: str, limit: int) -> list[Logged]:
        start = f"({after}" if after else "-"
        found: Any = await told(self._redis.xrange(_LOG, min=start, count=limit))
        return [Logged(position, *fields.popitem()) for position, fields in found]

    async def counts(self, since: int, limit: int) -> tuple[int, dict[int, Counts]]:
        changed: Any = await told(
            self._redis.zrangebyscore(_CHANGED, f"({since}", "+inf", start=0, num=limit, withscores=True)
        )
        pipe = self._redis.pipeline(transaction=False)
        for item, _ in changed:
            pipe.hmget(_ITEM + item, *EVENT_TYPES)
        rows = await execute(pipe)
        found = {
            int(item): Counts(*(int(n or 0) for n in row)) for (item, _), row in zip(changed, rows, strict=True)
        }
        return int(changed[-1][1]) if changed else since, found

    def _oldest(self, now: float) -> int:
        return max(0, int(now * 1000) - self._retention_ms)


def _message(event: Event) -> dict[str, object]:
    """What the script needs of an event. The item id travels as text: Lua's numbers do not hold 64 bits."""
    item, body = str(event.item_id), event.to_json().decode()
    message: dict[str, object] = {"id": event.event_id, "type": event.type, "item": item, "body": body}
    if name := EVENT_HISTORIES.get(event.type):
        message["history"] = user_prefix(event.user_id) + name
        message |= {"value": f"{event.at!r} {item}", "limit": LIMITS[name]}
    return message
