"""User state in the SQLite file."""

import sqlite3
from collections.abc import Sequence

import orjson

from service import keywords_sqlite
from service.sqlite_file import SqliteFile
from service.state import LIMITS, History, Stamped, UserState, Visit

_SCHEMA = """
CREATE TABLE IF NOT EXISTS history (
    id INTEGER PRIMARY KEY, user TEXT NOT NULL, list TEXT NOT NULL, at REAL NOT NULL, value TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS history_of_user ON history (user, list, id);
CREATE INDEX IF NOT EXISTS history_by_age ON history (at);
CREATE TABLE IF NOT EXISTS profile (user TEXT PRIMARY KEY, at REAL NOT NULL, value TEXT NOT NULL) WITHOUT ROWID;
"""
_LISTS = ", ".join(f"'{name}'" for name in LIMITS)  # an older file may hold others
# All rows as one: between two rows sqlite3 lets go of the interpreter, and under load it is long in getting it back.
_READ = f"""
SELECT json_group_array(json_array(list, printf('%!.17g', at), value)) FROM (
    SELECT 'profile' AS list, at, value FROM profile WHERE user = ?1 AND at > ?2
    UNION ALL SELECT * FROM (
        SELECT list, at, value FROM history WHERE user = ?1 AND at > ?2 AND list IN ({_LISTS}) ORDER BY id
    )
)
"""
_APPEND = "INSERT INTO history (user, list, at, value) VALUES (?, ?, ?, ?)"
_TRIM = """
DELETE FROM history WHERE user = ? AND list = ? AND id <= (
    SELECT id FROM history WHERE user = ? AND list = ? ORDER BY id DESC LIMIT 1 OFFSET ?
)
"""
_FORGET = "DELETE FROM history WHERE id IN (SELECT id FROM history WHERE at <= ? LIMIT 100)"


class SqliteUsers:
    """A `StateStore` in a file."""

    def __init__(self, file: SqliteFile, ttl_seconds: float) -> None:
        self._file = file
        self._ttl = ttl_seconds
        file.create(_SCHEMA)

    async def read(self, user: str, now: float) -> UserState:
        return await self._file.run(lambda db: self._read(db, user, now))

    async def visit(self, user: str | None, query: str, keys: Sequence[str], now: float) -> Visit:
        def work(db: sqlite3.Connection) -> Visit:
            entries = keywords_sqlite.lookup(db, keys, now)
            if user is None:
                return Visit(UserState(), entries)
            before = self._read(db, user, now)
            append(db, [(user, "queries", now, query)], self._ttl)
            return Visit(before, entries)

        return await self._file.run(work)

    async def set_profile(self, user: str, profile: str, now: float) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM profile WHERE user = ? OR at <= ?", (user, now - self._ttl))
            if profile:
                db.execute("INSERT INTO profile (user, at, value) VALUES (?, ?, ?)", (user, now, profile))

        await self._file.run(work)

    async def forget(self, user: str) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM profile WHERE user = ?", (user,))
            db.execute("DELETE FROM history WHERE user = ?", (user,))

        await self._file.run(work)

    def _read(self, db: sqlite3.Connection, user: str, now: float) -> UserState:
        found: dict[str, list[Stamped]] = {"profile": [], **{name: [] for name in LIMITS}}
        for name, at, value in orjson.loads(db.execute(_READ, (user, now - self._ttl)).fetchone()[0]):
            found[name].append(Stamped(float(at), value))
        profile = found.pop("profile")
        histories = {name: tuple(entries) for name, entries in found.items()}
        return UserState(**histories, profile=profile[0].value if profile else "")


def append(db: sqlite3.Connection, rows: Sequence[tuple[str, History, float, str]], ttl: float) -> None:
    """Append rows of user, history, time and value inside a transaction, and keep the histories short."""
    db.executemany(_APPEND, rows)
    for user, name in {(user, name) for user, name, *_ in rows}:
        db.execute(_TRIM, (user, name, user, name, LIMITS[name]))
    if rows:
        db.execute(_FORGET, (rows[-1][2] - ttl,))
