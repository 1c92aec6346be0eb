"""The Redis connection that all parts of the shared store use, and how its failures are told.

One Redis server (6.2 or later); scripts touch keys of several users and items, so a cluster is not supported.
"""

from collections.abc import Awaitable
from typing import Any, TypeVar, cast

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from onesearch.errors import ConfigError
from service.state import StateUnavailable

T = TypeVar("T")
PREFIX = "onesearch"


def connect(url: str, timeout_seconds: float) -> Redis:
    """A client that connects when first used, so the service starts while Redis is away.

    Raises ConfigError for an address that Redis clients do not understand.
    """
    try:
        # No client retries: a search that cannot have its history in time is served without.
        return Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise ConfigError(f"state: not a Redis address ({error})") from error


async def execute(pipe: Pipeline) -> list[Any]:
    """The replies of a pipeline, in one round trip. Raises StateUnavailable."""
    return cast(list[Any], await told(pipe.execute()))


async def told(reply: Awaitable[T]) -> T:
    """A reply; failures become StateUnavailable."""
    try:
        return await reply
    except (RedisError, OSError, TimeoutError) as error:
        raise StateUnavailable(f"redis: {type(error).__name__}") from error
