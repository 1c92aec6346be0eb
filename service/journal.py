"""The journal of catalog changes: one SQLite file beside the bundles, which are immutable. Accepted is durable.

A row per change, numbered from 1 in the order of acceptance; a batch is one transaction, so it is there whole or not
at all, also after a kill or a power failure. Changes are about items, not about a bundle: every served bundle, and
the next one that is trained, applies them to what it has. Versions mark points to roll back to; a rollback is a
batch of changes like any other, which puts every item changed since back to what it was.

One thread writes and reads; `stamp` alone is asked from another one.
"""

import fcntl
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from onesearch.catalog import Item
from onesearch.errors import ConfigError, OneSearchError
from onesearch.live import Change

T = TypeVar("T")
JOURNAL = "journal.sqlite3"  # its name in the folder of a live catalog

_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS changes (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, item_id INTEGER NOT NULL, kind TEXT NOT NULL, item BLOB, published_at INTEGER
);
CREATE INDEX IF NOT EXISTS changes_of_item ON changes (item_id, seq);
CREATE TABLE IF NOT EXISTS versions (seq INTEGER PRIMARY KEY, previous INTEGER);
INSERT OR IGNORE INTO versions VALUES (0, NULL);
"""
_APPEND = "INSERT INTO changes (item_id, kind, item, published_at) VALUES (?, ?, ?, ?)"
_SINCE = "SELECT seq, item_id, kind, item, published_at FROM changes WHERE seq > ? ORDER BY seq"
_HEAD = "SELECT coalesce(max(seq), 0) FROM changes"
_VERSION = "SELECT seq, previous FROM versions ORDER BY seq DESC LIMIT 1"
# Every item changed after a point, as its last change until then left it, or as the bundle has it.
_RESTORE = """
INSERT INTO changes (item_id, kind, item, published_at)
SELECT late.item_id, coalesce(then_.kind, 'reset'), then_.item, then_.published_at
FROM (SELECT DISTINCT item_id FROM changes WHERE seq > :point) AS late
LEFT JOIN changes AS then_
    ON then_.seq = (SELECT max(seq) FROM changes WHERE item_id = late.item_id AND seq <= :point)
"""
# Changes that no version to roll back to and no replay needs: another one of the same item followed before `point`.
_PRUNE = """
DELETE FROM changes WHERE seq < :point AND EXISTS (
    SELECT 1 FROM changes AS later
    WHERE later.item_id = changes.item_id AND later.seq > changes.seq AND later.seq <= :point
)
"""


class JournalUnavailable(OneSearchError):
    """The journal cannot be written or read; nothing was accepted."""

    code = "catalog-unavailable"
    status = 503


class NothingToRollBack(OneSearchError):
    """The catalog is as the first version that is kept has it."""

    code = "nothing-to-roll-back"
    status = 409


class Journal:
    """An open journal. Several processes may share the file."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises ConfigError when it is not usable."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = self._thread.submit(_connect, path).result()
            self._watch = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self.id = self._write(_identity)
        except (sqlite3.Error, OSError) as error:
            self._thread.shutdown()
            raise ConfigError(f"catalog journal {path}: cannot be used ({error})") from error

    def stamp(self) -> int:
        """A number that is another one whenever any process has written. Takes microseconds.

        Asked from one thread only, which need not be the journal's. Raises JournalUnavailable.
        """
        try:
            return int(self._watch.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error as error:
            raise JournalUnavailable(f"catalog journal: {error}") from error

    def head(self) -> int:
        """Number of the last change, 0 if there is none."""
        return self._run(lambda db: int(db.execute(_HEAD).fetchone()[0]))

    def since(self, seq: int) -> list[Change]:
        """All changes after one, in order."""
        return self._run(lambda db: [_change(*row) for row in db.execute(_SINCE, (seq,))])

    def append(self, changes: Sequence[tuple[int, Item | None]]) -> None:
        """Accept a batch: item ids with the new item, None to remove it. On disk when this returns."""
        rows = [
            (item_id, "put", item.to_json(), item.published_at) if item else (item_id, "remove", None, None)
            for item_id, item in changes
        ]
        self._write(lambda db: db.executemany(_APPEND, rows))

    def roll_back(self) -> int:
        """Put the items back to the newest version that differs, and mark that as a version; its number.

        Without changes since the current version that is the one before it. Raises NothingToRollBack.
        """

        def work(db: sqlite3.Connection) -> int:
            (head,), (current, previous) = db.execute(_HEAD).fetchone(), db.execute(_VERSION).fetchone()
            point = current if head > current else previous
            if point is None:
                raise NothingToRollBack("there is no earlier version of the catalog")
            db.execute(_RESTORE, {"point": point})
            (before,) = db.execute("SELECT previous FROM versions WHERE seq = ?", (point,)).fetchone() or (None,)
            db.execute("INSERT INTO versions SELECT max(seq), ? FROM changes", (before,))
            return int(point)

        return self._write(work)

    def seal(self, seq: int) -> None:
        """Mark a version that has been compacted. Forgets what only older rollbacks than to the one before need."""

        def work(db: sqlite3.Connection) -> None:
            current, _ = db.execute(_VERSION).fetchone()
            if seq > current:
                db.execute("INSERT INTO versions VALUES (?, ?)", (seq, current))
                db.execute("UPDATE versions SET previous = NULL WHERE seq = ?", (current,))
                db.execute("DELETE FROM versions WHERE seq < ?", (current,))
                db.execute(_PRUNE, {"point": current})

        self._write(work)

    def close(self) -> None:
        """Close the file; it is not used afterwards."""
        self._watch.close()
        self._thread.submit(self._db.close).result()
        self._thread.shutdown()

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The outcome of some work in one transaction, while which no other process writes."""

        def transaction(db: sqlite3.Connection) -> T:
            with db:  # commits, or rolls back what failed
                db.execute("BEGIN IMMEDIATE")
                return work(db)

        return self._run(transaction)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            return self._thread.submit(work, self._db).result()
        except sqlite3.Error as error:
            raise JournalUnavailable(f"catalog journal: {error}") from error


def _connect(path: Path) -> sqlite3.Connection:
    # The connection is made and used on the journal's thread only. Processes that start together make the file one
    # after the other: SQLite does not wait for whoever switches to the write-ahead log.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        db = sqlite3.connect(path, timeout=5.0, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(_SCHEMA)
        return db


def _identity(db: sqlite3.Connection) -> str:
    db.execute("INSERT INTO journal SELECT ? WHERE NOT EXISTS (SELECT 1 FROM journal)", (uuid4().hex[:12],))
    return str(db.execute("SELECT id FROM journal").fetchone()[0])


def _change(seq: int, item_id: int, kind: str, body: bytes | None, published_at: int | None) -> Change:
    item = Item.from_json(body, published_at or 0) if body else None
    return Change(seq, item_id, item, reset=kind == "reset")
