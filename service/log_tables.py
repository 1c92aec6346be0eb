"""Folders of tables (spec §2.1) as the service reads and writes them: row by row, and checked no more than it needs.

What a table may hold is the contract of training, which checks it when it reads them (`training.tables`).
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from onesearch.errors import ConfigError, DataError

Row = dict[str, Any]
ITEMS, USERS, RECALL = "items", "users", "recall"
_KEYS = {ITEMS: ("item_id",), USERS: ("user_id",), RECALL: ("session_id", "time_index")}  # what the service reads
_COPIED = ("rank", "relevance")


def read_rows(folder: Path, table: str) -> Iterator[Row]:
    """The rows of a table, in JSON lines or Parquet, without what is null; none if the folder does not have it.

    Raises DataError naming the line when it is no row or lacks a key, ConfigError for Parquet without polars.
    """
    lines, columns = (folder / f"{table}.{suffix}" for suffix in ("jsonl", "parquet"))
    if lines.is_file() and columns.is_file():
        raise DataError(str(folder), [f"{lines.name} and {columns.name} are both there, expected one of them"])
    path = columns if columns.is_file() else lines
    for number, row in enumerate(_read_parquet(path) if path == columns else _read_lines(path), 1):
        for key in _KEYS[table]:
            if type(row.get(key)) is not int:
                raise DataError(str(path), [f"row {number}: {key}: {row.get(key)!r}, expected an integer"])
        yield {name: value for name, value in row.items() if value is not None}


def must_be_new(out: Path) -> None:
    """Raises DataError if a folder is there already."""
    if out.exists():
        raise DataError(str(out), ["exists already, expected a name for a new data set"])


def write_tables(out: Path, tables: Mapping[str, Iterable[Row]], copied: Path) -> dict[str, int]:
    """Write tables as JSON lines into the new folder `out`, which appears whole or not at all, and copy those of the
    folder `copied` that the service knows nothing of; how many rows each one has got. Raises DataError if `out` exists.
    """
    must_be_new(out)
    parts = out.with_name(f".{out.name}.partial")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    sizes = {table: _write(parts / f"{table}.jsonl", rows) for table, rows in tables.items()}
    for path in (copied / f"{table}.{suffix}" for table in _COPIED for suffix in ("jsonl", "parquet")):
        if path.is_file():
            shutil.copyfile(path, parts / path.name)
    parts.rename(out)
    return sizes


def _write(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    with path.open("wb") as file:
        for row in rows:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def _read_lines(path: Path) -> Iterator[Row]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise DataError(str(path), [f"row {number}: {line[:40]!r} is not JSON ({error})"]) from error
            if not isinstance(row, dict):
                raise DataError(str(path), [f"row {number}: {line[:40]!r}, expected a JSON object"])
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import polars
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs the extra onesearch[train]; JSON lines do not") from error
    try:
        yield from polars.read_parquet(path).iter_rows(named=True)
    except (polars.exceptions.PolarsError, OSError) as error:
        raise DataError(str(path), [f"is not a readable Parquet file ({str(error)[:80]})"]) from error
