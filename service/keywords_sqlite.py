"""Keyword entries and their queue in the SQLite file. A claim moves a job's due time to the end of its lease."""

import sqlite3
from collections.abc import Mapping, Sequence

import orjson

from service.keywords import DEAD_SECONDS, MAX_JOBS, Claim, Entry, Job, QueueState, kept_until
from service.sqlite_file import SqliteFile

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keywords (
    key TEXT PRIMARY KEY, fresh_until REAL NOT NULL, kept_until REAL NOT NULL, value BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS keywords_by_age ON keywords (kept_until);
CREATE TABLE IF NOT EXISTS jobs (
    key TEXT PRIMARY KEY, at REAL NOT NULL, due REAL NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    dead INTEGER NOT NULL DEFAULT 0, body BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS jobs_by_due ON jobs (dead, due);
"""
_PUT = "INSERT OR REPLACE INTO keywords (key, fresh_until, kept_until, value) VALUES (?, ?, ?, ?)"
_EXPIRE = "DELETE FROM keywords WHERE key IN (SELECT key FROM keywords WHERE kept_until <= ? LIMIT 100)"
_ENQUEUE = """
INSERT OR IGNORE INTO jobs (key, at, due, body) SELECT ?, ?, ?, ? WHERE (SELECT count(*) FROM jobs) < ?
"""
_CLAIM = """
UPDATE jobs SET due = ?, attempts = attempts + 1
WHERE key IN (SELECT key FROM jobs WHERE NOT dead AND due <= ? ORDER BY due, at LIMIT ?)
RETURNING at, body, attempts
"""
_QUEUE = """
SELECT count(*) FILTER (WHERE NOT dead), count(*) FILTER (WHERE dead), min(at) FILTER (WHERE NOT dead) FROM jobs
"""


class SqliteKeywords:
    """A `KeywordStore` in a file."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        file.create(_SCHEMA)

    async def lookup(self, keys: Sequence[str], now: float) -> dict[str, Entry]:
        return await self._file.run(lambda db: lookup(db, keys, now))

    async def enqueue(self, jobs: Sequence[Job], now: float) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM jobs WHERE dead AND due <= ?", (now - DEAD_SECONDS,))
            db.executemany(_ENQUEUE, [(job.key, job.at, now, job.to_json(), MAX_JOBS) for job in jobs])

        await self._file.run(work)

    async def claim(self, limit: int, lease_seconds: float, now: float) -> list[Claim]:
        rows = await self._file.run(lambda db: db.execute(_CLAIM, (now + lease_seconds, now, limit)).fetchall())
        return [Claim(Job(**orjson.loads(body)), attempts) for _, body, attempts in sorted(rows)]

    async def finish(self, key: str, entries: Mapping[str, Entry], now: float) -> None:
        def work(db: sqlite3.Connection) -> None:
            for name, entry in entries.items():
                value = orjson.dumps(entry.keywords)
                db.execute(_PUT, (name, entry.fresh_until, kept_until(entry, now), value))
            db.execute("DELETE FROM jobs WHERE key = ?", (key,))
            db.execute(_EXPIRE, (now,))

        await self._file.run(work)

    async def retry(self, key: str, due: float) -> None:
        await self._file.run(lambda db: db.execute("UPDATE jobs SET due = ? WHERE key = ?", (due, key)))

    async def bury(self, key: str, now: float) -> None:
        await self._file.run(lambda db: db.execute("UPDATE jobs SET dead = 1, due = ? WHERE key = ?", (now, key)))

    async def queue(self, now: float) -> QueueState:
        waiting, dead, oldest = await self._file.run(lambda db: db.execute(_QUEUE).fetchone())
        return QueueState(waiting, dead, 0.0 if oldest is None else max(0.0, now - oldest))


def lookup(db: sqlite3.Connection, keys: Sequence[str], now: float) -> dict[str, Entry]:
    """The entries that are known of some keys, inside a transaction."""
    marks = ", ".join("?" * len(keys))
    query = f"SELECT key, value, fresh_until FROM keywords WHERE key IN ({marks}) AND kept_until > ?"
    return {key: Entry(tuple(orjson.loads(v)), fresh) for key, v, fresh in db.execute(query, (*keys, now))}
