"""The SQLite file that all parts of the embedded store share: one connection on a thread of its own.

So the event loop never waits. Several processes may share the file (write-ahead log). A commit survives the death of
the process; the last moments before a power failure may be lost.
"""

import asyncio
import fcntl
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from onesearch.errors import ConfigError
from service.state import StateUnavailable

T = TypeVar("T")


class SqliteFile:
    """An open file."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises ConfigError when it is not usable."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="state")
        try:
            self._db = self._thread.submit(_connect, path).result()
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise ConfigError(f"state file {path}: cannot be used ({error})") from error

    def create(self, schema: str) -> None:
        """Create the tables of one part."""
        self._thread.submit(self._db.executescript, schema).result()

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The outcome of some work in one transaction. Raises StateUnavailable."""

        def transaction() -> T:
            with self._db:
                return work(self._db)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)
        except sqlite3.Error as error:
            raise StateUnavailable(f"state file: {type(error).__name__}") from error

    async def close(self) -> None:
        """Close the file; it is not used afterwards."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._db.close)
        self._thread.shutdown()


def _connect(path: Path) -> sqlite3.Connection:
    # The connection is made and used on the store's thread only. Processes that start together make the file one
    # after the other: SQLite does not wait for whoever switches to the write-ahead log.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        db = sqlite3.connect(path, timeout=1.0)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        return db
