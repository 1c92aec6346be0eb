"""The state of a stream (spec §4.13): its folder with the ledger, and the link to the bundle that is to be served."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from onesearch.arrays import write_atomically
from onesearch.errors import ConfigError, DataError

CURRENT, LEDGER = "current", "ledger.jsonl"


@dataclass(frozen=True)
class Row:
    """A line of the ledger: what became of the page views with start < time <= end.

    published, and if not, the reason. bundle: the one to serve from here on, a path from the ledger's folder; the
    versions are its. views: page views of the window; fresh and replayed: those learned from. numbers: of the window's
    model on the probe, None if it could not be searched; found: HR@10 by request; gain: of HR@10 over the first line,
    paired, with its 95 % interval.
    """

    window: int
    start: int
    end: int
    published: bool
    reason: str
    bundle: str
    model_version: str
    catalog_version: str
    views: int = 0
    fresh: int = 0
    replayed: int = 0
    new_items: int = 0
    loss: dict[str, dict[str, float]] = field(default_factory=dict)
    numbers: dict[str, float | None] | None = None
    gain: tuple[float, float, float] | None = None
    found: tuple[float, ...] = ()

    def line(self) -> str:
        """The row for people."""
        fate = "published" if self.published else f"refused, {self.reason}"
        seen = f"{self.views} page views, {self.fresh} + {self.replayed} old learned, {self.new_items} new items"
        shown = ", ".join(f"{k} {v:.3f}" for k, v in (self.numbers or {}).items() if v is not None)
        return f"window {self.window}: {seen}; {shown}; {fate}"


def read_ledger(folder: Path) -> list[Row]:
    """Rows of a folder's ledger, none if it has none. Raises DataError naming the line."""
    rows: list[Row] = []
    path = folder / LEDGER
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            rows.append(Row(**orjson.loads(line)))
        except (orjson.JSONDecodeError, TypeError) as error:
            raise DataError(str(path), [f"line {number}: {error}, expected what this command wrote"]) from error
    return rows


def write_ledger(folder: Path, rows: Sequence[Row]) -> None:
    """Write all rows, then let `current` lead to the bundle of the last: the old one or the new one, never nothing."""
    lines = (orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    write_atomically(folder / LEDGER, b"".join(lines))
    fresh = folder / f".{CURRENT}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(rows[-1].bundle)
    fresh.replace(folder / CURRENT)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Have a folder to oneself. Raises ConfigError when another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(f"{folder}: is in use by another process") from error
    finally:
        os.close(opened)
