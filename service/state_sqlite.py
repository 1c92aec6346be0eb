"""The embedded state store: one SQLite file, one connection on a thread of its own, so the loop never waits."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from onesearch.errors import ConfigError
from service.state import LIMITS, History, Stamped, StateUnavailable, UserState

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS history (
    id INTEGER PRIMARY KEY, user TEXT NOT NULL, list TEXT NOT NULL, at REAL NOT NULL, value TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS history_of_user ON history (user, list, id);
CREATE INDEX IF NOT EXISTS history_by_age ON history (at);
"""
_READ = "SELECT list, at, value FROM history WHERE user = ? AND at > ? ORDER BY id"
_APPEND = "INSERT INTO history (user, list, at, value) VALUES (?, ?, ?, ?)"
_TRIM = """
DELETE FROM history WHERE user = ? AND list = ? AND id <= (
    SELECT id FROM history WHERE user = ? AND list = ? ORDER BY id DESC LIMIT 1 OFFSET ?
)
"""
_FORGET = "DELETE FROM history WHERE id IN (SELECT id FROM history WHERE at <= ? LIMIT 100)"


class SqliteStore:
    """A `StateStore` in one file; several processes may share it (write-ahead log)."""

    def __init__(self, path: Path, ttl_seconds: float) -> None:
        """Open or create the file. Raises ConfigError when it is not usable."""
        self._ttl = ttl_seconds
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        try:
            self._db = self._thread.submit(_connect, path).result()
        except sqlite3.Error as error:
            self._thread.shutdown()
            raise ConfigError(f"state file {path}: cannot be used ({error})") from error

    async def read(self, user: str, now: float) -> UserState:
        return await self._run(lambda: self._read(user, now))

    async def visit(self, user: str, query: str, now: float) -> UserState:
        def work() -> UserState:
            before = self._read(user, now)
            self._append(user, query, ("queries",), now)
            return before

        return await self._run(work)

    async def append(self, user: str, item_id: int, histories: Iterable[History], now: float) -> None:
        await self._run(lambda: self._append(user, str(item_id), histories, now))

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise StateUnavailable(f"state file: {error}") from error

    def _read(self, user: str, now: float) -> UserState:
        found: dict[str, list[Stamped]] = {name: [] for name in LIMITS}
        for name, at, value in self._db.execute(_READ, (user, now - self._ttl)):
            found[name].append(Stamped(at, value))
        return UserState(**{name: tuple(entries) for name, entries in found.items()})

    def _append(self, user: str, value: str, histories: Iterable[History], now: float) -> None:
        with self._db:
            for name in histories:
                self._db.execute(_APPEND, (user, name, now, value))
                self._db.execute(_TRIM, (user, name, user, name, LIMITS[name]))
            self._db.execute(_FORGET, (now - self._ttl,))


def _connect(path: Path) -> sqlite3.Connection:
    # The connection is made and used on the store's thread only.
    db = sqlite3.connect(path, timeout=1.0)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.executescript(_SCHEMA)
    return db
