"""The event log and item counters in the SQLite file; applying an event shares the transaction that logs it."""

import sqlite3
from collections.abc import Sequence

from service.events import EVENT_HISTORIES, EVENT_TYPES, Counts, Event, Exposure, Logged
from service.sqlite_file import SqliteFile
from service.state import History
from service.state_sqlite import append

_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, kind TEXT NOT NULL, event_id TEXT UNIQUE, body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS log_by_age ON log (at);
CREATE TABLE IF NOT EXISTS counts (
    item_id INTEGER PRIMARY KEY, changed INTEGER NOT NULL, impression INTEGER NOT NULL DEFAULT 0,
    click INTEGER NOT NULL DEFAULT 0, cart INTEGER NOT NULL DEFAULT 0, "order" INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS counts_by_change ON counts (changed);
"""
_LOG = "INSERT INTO log (at, kind, event_id, body) VALUES (?, ?, ?, ?) ON CONFLICT (event_id) DO NOTHING"
_COUNT = {
    kind: f"""
        INSERT INTO counts (item_id, changed, "{kind}") VALUES (?, ?, 1)
        ON CONFLICT (item_id) DO UPDATE SET "{kind}" = "{kind}" + 1, changed = excluded.changed
    """
    for kind in EVENT_TYPES
}
_COUNTS = """
SELECT item_id, changed, impression, click, cart, "order" FROM counts WHERE changed > ? ORDER BY changed LIMIT ?
"""
_ENTRIES = "SELECT id, kind, body FROM log WHERE id > ? ORDER BY id LIMIT ?"
_EXPIRE = "DELETE FROM log WHERE id IN (SELECT id FROM log WHERE at <= ? LIMIT 1000)"


class SqliteEvents:
    """An `EventLog` in a file."""

    def __init__(self, file: SqliteFile, ttl_seconds: float, retention_seconds: float) -> None:
        """ttl_seconds is that of the histories, retention_seconds that of the log."""
        self._file = file
        self._ttl = ttl_seconds
        self._retention = retention_seconds
        file.create(_SCHEMA)

    async def record(self, events: Sequence[Event]) -> int:
        return await self._file.run(lambda db: self._record(db, events))

    async def expose(self, exposures: Sequence[Exposure]) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.executemany(_LOG, [(e.at, "exposure", None, e.to_json()) for e in exposures])
            if exposures:
                db.execute(_EXPIRE, (exposures[-1].at - self._retention,))

        await self._file.run(work)

    async def entries(self, after: str, limit: int) -> list[Logged]:
        def work(db: sqlite3.Connection) -> list[Logged]:
            found = db.execute(_ENTRIES, (int(after or 0), limit))
            return [Logged(str(position), kind, body) for position, kind, body in found]

        return await self._file.run(work)

    async def counts(self, since: int, limit: int) -> tuple[int, dict[int, Counts]]:
        rows = await self._file.run(lambda db: db.execute(_COUNTS, (since, limit)).fetchall())
        changed = {item: Counts(*numbers) for item, _, *numbers in rows}
        return rows[-1][1] if rows else since, changed

    def _record(self, db: sqlite3.Connection, events: Sequence[Event]) -> int:
        rows: list[tuple[str, History, float, str]] = []
        new = 0
        for event in events:
            logged = db.execute(_LOG, (event.at, "event", event.event_id, event.to_json()))
            if logged.rowcount:
                new += 1
                db.execute(_COUNT[event.type], (event.item_id, logged.lastrowid))
                if name := EVENT_HISTORIES.get(event.type):
                    rows.append((event.user_id, name, event.at, str(event.item_id)))
        append(db, rows, self._ttl)
        return new
