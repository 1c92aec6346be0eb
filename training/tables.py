"""Reading and writing the KuaiSearch tables (spec §2.1) as JSONL or Parquet; the contract itself is `columns`.

Strict: every fault of every file is collected (capped per file) and raised as one DataError that names file, line
(row for Parquet, both 1-based), field, value and expectation. Nothing is half-loaded.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import orjson
import polars as pl

from onesearch.errors import DataError
from training.columns import IDS, KEYS, REQUIRED, SCHEMAS, Column, frame_schema

Format = Literal["jsonl", "parquet"]
Row = dict[str, Any]
MAX_FAULTS = 50


@dataclass(frozen=True)
class Tables:
    """Validated tables with the columns, order and dtypes of `columns.SCHEMAS`; a table that is absent is None."""

    items: pl.DataFrame
    users: pl.DataFrame | None = None
    recall: pl.DataFrame | None = None
    rank: pl.DataFrame | None = None
    relevance: pl.DataFrame | None = None

    def dangling(self) -> int:
        """Number of distinct impressed items that the catalog does not have (allowed: logs outlive items)."""
        if self.recall is None:
            return 0
        seen = self.recall["impressed_item_ids"].explode().drop_nulls().unique()
        return int((~seen.is_in(self.items["item_id"].implode())).sum())


@dataclass
class _Faults:
    """Faults of one file, kept with their line so that they can be reported in file order."""

    file: str
    unit: str
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, name: str, value: Any, expected: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        self.say(line, f"{name}: {shown}, expected {expected}")

    def say(self, line: int, message: str) -> None:
        where = f"{self.file} {self.unit} {line}" if line else self.file
        self.found.append((line, f"{where}: {message}"))

    def listed(self) -> list[str]:
        ordered = [text for _, text in sorted(self.found, key=lambda fault: fault[0])]
        more = len(ordered) - MAX_FAULTS
        return ordered if more <= 0 else [*ordered[:MAX_FAULTS], f"{self.file}: and {more} more"]


def load_tables(directory: str | Path) -> Tables:
    """Read all tables of a directory (`items.jsonl` or `items.parquet`, …); only `items` must be there.

    Raises DataError listing the faults of all files at once, at most 50 per file.
    """
    directory = Path(directory)
    frames: dict[str, pl.DataFrame] = {}
    faults: list[str] = []
    for table in SCHEMAS:
        paths = [path for path in _paths(directory, table) if path.is_file()]
        if len(paths) > 1:
            faults.append(f"{paths[0].name} and {paths[1].name} are both there, expected one of them")
        elif paths:
            frame, found = _load(paths[0], table)
            frames[table] = frame
            faults += found
        elif table == "items":
            faults.append("items.jsonl or items.parquet is missing")
    if faults:
        raise DataError(str(directory), faults)
    return Tables(**frames)


def write_tables(tables: Tables, directory: str | Path, format: Format = "jsonl") -> None:
    """Write every table that is present, each to a temporary file that is then renamed.

    Raises DataError when the directory holds table files that this call would not replace (they would be read
    back as part of the data set), ValueError for an unknown format.
    """
    if format not in get_args(Format):
        raise ValueError(f"format: {format!r}, expected one of {', '.join(get_args(Format))}")
    directory = Path(directory)
    frames = {table: frame for table in SCHEMAS if (frame := getattr(tables, table)) is not None}
    stale = [
        path.name
        for table in SCHEMAS
        for path in _paths(directory, table)
        if path.exists() and (table not in frames or path.suffix != f".{format}")
    ]
    if stale:
        raise DataError(str(directory), [f"{name} belongs to another data set; remove it first" for name in stale])
    directory.mkdir(parents=True, exist_ok=True)
    for table, frame in frames.items():
        final = directory / f"{table}.{format}"
        temporary = directory / f".{final.name}.{os.getpid()}.tmp"
        if format == "parquet":
            frame.write_parquet(temporary)
        else:
            with temporary.open("wb") as file:
                file.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in _records(frame))
        temporary.replace(final)


def table_format(directory: str | Path) -> Format:
    """The format that a directory's items table is in."""
    return "parquet" if (Path(directory) / "items.parquet").is_file() else "jsonl"


def frame(table: str, columns: Mapping[str, Any]) -> pl.DataFrame:
    """Build a table from trusted columns (sequences of equal length), filling the optional ones that are absent."""
    size = len(next(iter(columns.values())))
    return pl.DataFrame(
        [_series(column, columns.get(column.name, [column.default] * size)) for column in SCHEMAS[table]]
    )


def _series(column: Column, values: Any) -> pl.Series:
    if column.kind is not IDS:
        return pl.Series(column.name, values, dtype=column.kind.dtype)
    # polars builds a list column from Python lists one list at a time, ten times slower than this
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    flat = np.fromiter(chain.from_iterable(values), np.int64, int(lengths.sum()))
    rows = pl.DataFrame({"row": np.arange(len(values))})
    grouped = pl.DataFrame({"row": np.repeat(rows["row"].to_numpy(), lengths), column.name: flat})
    joined = rows.join(grouped.group_by("row").agg(column.name), on="row", how="left", maintain_order="left")
    return joined[column.name].fill_null(pl.Series([[]], dtype=pl.List(pl.Int64)))


def _paths(directory: Path, table: str) -> list[Path]:
    return [directory / f"{table}.{suffix}" for suffix in get_args(Format)]


def _records(frame: pl.DataFrame) -> Iterator[Row]:
    """Rows as they are written to JSONL: nulls left out, attributes as an object."""
    for row in frame.iter_rows(named=True):
        if "attributes" in row:
            row["attributes"] = orjson.Fragment(row["attributes"])
        yield {name: value for name, value in row.items() if value is not None}


def _load(path: Path, table: str) -> tuple[pl.DataFrame, list[str]]:
    faults = _Faults(path.name, "row" if path.suffix == ".parquet" else "line")
    rows = _read_parquet(path, faults) if path.suffix == ".parquet" else _read_jsonl(path, faults)
    if table == "items" and not rows and not faults.found:
        faults.say(0, "no rows, expected at least one item")
    _check_names(rows, table, faults)
    columns = {column.name: _parse_column(column, rows, faults) for column in SCHEMAS[table]}
    _check_key(columns, rows, KEYS.get(table), faults)
    if table == "recall":
        _check_funnel(columns, rows, faults)
    if faults.found:
        return pl.DataFrame(), faults.listed()
    return pl.DataFrame([_series(column, columns[column.name]) for column in SCHEMAS[table]]), []


def _read_jsonl(path: Path, faults: _Faults) -> dict[int, Row]:
    rows: dict[int, Row] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                faults.say(number, f"{line[:40]!r} is not JSON ({error})")
                continue
            if isinstance(row, dict):
                rows[number] = row
            else:
                faults.say(number, f"{line[:40]!r}, expected a JSON object")
    return rows


def _read_parquet(path: Path, faults: _Faults) -> dict[int, Row]:
    try:
        return dict(enumerate(pl.read_parquet(path).iter_rows(named=True), 1))
    except (pl.exceptions.PolarsError, OSError) as error:
        faults.say(0, f"is not a readable Parquet file ({str(error)[:80]})")
        return {}


def _check_names(rows: dict[int, Row], table: str, faults: _Faults) -> None:
    known = set(frame_schema(table))
    for number, row in rows.items():
        if not row.keys() <= known:
            for name in sorted(row.keys() - known):
                faults.say(number, f"{name}: unknown column, expected one of {', '.join(frame_schema(table))}")


def _parse_column(column: Column, rows: dict[int, Row], faults: _Faults) -> list[Any]:
    """One value per row; a value with a fault is None, which the checks across columns skip."""
    name, parse, default = column.name, column.kind.parse, column.default
    values: list[Any] = []
    for number, row in rows.items():
        value = row.get(name)
        if value is None and default is not REQUIRED:
            values.append(default)
            continue
        try:
            values.append(parse(value))
        except (ValueError, OverflowError):
            values.append(None)
            if name in row:
                faults.add(number, name, value, column.kind.expected)
            else:
                faults.say(number, f"{name}: missing, expected {column.kind.expected}")
    return values


def _check_key(columns: Row, rows: dict[int, Row], key: str | None, faults: _Faults) -> None:
    if key is None or len(set(columns[key])) == len(rows):
        return
    first: dict[int, int] = {}
    for number, value in zip(rows, columns[key], strict=True):
        if value is not None and first.setdefault(value, number) != number:
            faults.add(number, key, value, f"a unique value (first seen in {faults.unit} {first[value]})")


def _check_funnel(columns: Row, rows: dict[int, Row], faults: _Faults) -> None:
    """Clicked, carted and purchased items must have been impressed (a purchase without a click does occur)."""
    names = ("clicked_item_ids", "carted_item_ids", "purchased_item_ids")
    for name in names:
        for number, impressed, chosen in zip(rows, columns["impressed_item_ids"], columns[name], strict=True):
            if chosen and impressed is not None and not set(chosen).issubset(impressed):
                faults.add(number, name, sorted(set(chosen) - set(impressed)), "only ids from impressed_item_ids")
