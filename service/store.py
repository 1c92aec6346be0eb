"""The store: user state, event log and keywords in one place, embedded or shared, as the settings say."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from onesearch.errors import ConfigError
from service.events import EventLog
from service.events_redis import RedisEvents
from service.events_sqlite import SqliteEvents
from service.keywords import KeywordStore
from service.keywords_redis import RedisKeywords
from service.keywords_sqlite import SqliteKeywords
from service.redis_client import connect, told
from service.settings import Settings
from service.sqlite_file import SqliteFile
from service.state import StateStore
from service.state_redis import RedisUsers
from service.state_sqlite import SqliteUsers

_SQLITE = "sqlite:"
_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Store:
    """The parts. ping raises StateUnavailable while the store is away; close releases all of them."""

    users: StateStore
    events: EventLog
    keywords: KeywordStore
    ping: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]]


def open_store(settings: Settings, create: bool = True) -> Store:
    """The store that the settings name. Raises ConfigError when it cannot be used.

    create: make an embedded store that is not there yet; for who only reads, that is an error.
    """
    ttl = settings.state_ttl_days * _SECONDS_PER_DAY
    retention = settings.log_retention_days * _SECONDS_PER_DAY
    if settings.state.startswith(_SQLITE):
        path = Path(settings.state.removeprefix(_SQLITE))
        if not create and not path.is_file():
            raise ConfigError(f"state: {path} is no file, expected the store of a service")
        return sqlite_store(path, ttl, retention)
    return redis_store(
        settings.state, ttl, retention, max(settings.state_timeout_ms, settings.state_write_timeout_ms) / 1e3
    )


def sqlite_store(path: Path, ttl_seconds: float, retention_seconds: float) -> Store:
    """The embedded store, opened or created. Raises ConfigError."""
    file = SqliteFile(path)

    async def ping() -> None:
        await file.run(lambda db: db.execute("SELECT 1 FROM profile LIMIT 1").fetchone())

    keywords = SqliteKeywords(file)
    users = SqliteUsers(file, ttl_seconds)
    return Store(users, SqliteEvents(file, ttl_seconds, retention_seconds), keywords, ping, file.close)


def redis_store(url: str, ttl_seconds: float, retention_seconds: float, timeout_seconds: float) -> Store:
    """The shared store, which may be away for now. Raises ConfigError for a wrong address."""
    redis = connect(url, timeout_seconds)

    async def ping() -> None:
        await told(redis.ping())

    events = RedisEvents(redis, ttl_seconds, retention_seconds)
    return Store(RedisUsers(redis, ttl_seconds), events, RedisKeywords(redis), ping, redis.aclose)
