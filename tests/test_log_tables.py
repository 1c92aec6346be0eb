"""Folders of tables: both formats read alike, faults named, a new folder there whole or not at all."""

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest
from tiny_bundle import tiny_items

from onesearch.errors import ConfigError, DataError
from service.log_tables import ITEMS, RECALL, USERS, Row, read_rows, write_tables
from training.tables import Tables, load_tables
from training.tables import write_tables as write_checked


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_training_wrote_is_read_and_what_is_written_training_reads(tmp_path: Path, kind: Any) -> None:
    write_checked(Tables(tiny_items()), tmp_path / "one", kind)
    rows = list(read_rows(tmp_path / "one", ITEMS))
    assert rows[1]["item_title"] == "blue shoes" and "published_at" not in rows[1]  # null
    assert list(read_rows(tmp_path / "one", USERS)) == []
    assert write_tables(tmp_path / "two", {ITEMS: rows, USERS: []}, copied=tmp_path / "one") == {
        ITEMS: 30,
        USERS: 0,
    }
    assert load_tables(tmp_path / "two").items.equals(tiny_items())


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"nonsense", "row 2: b'nonsense' is not JSON"),
        (b"[1]", "row 2: b'[1]', expected a JSON object"),
        (b'{"session_id": 1}', "row 2: time_index: None, expected an integer"),
        (b'{"session_id": "1", "time_index": 1}', "row 2: session_id: '1', expected an integer"),
    ],
)
def test_a_fault_names_its_row(tmp_path: Path, line: bytes, fault: str) -> None:
    (tmp_path / "recall.jsonl").write_bytes(b'{"session_id": 1, "time_index": 1}\n' + line)
    with pytest.raises(DataError) as raised:
        list(read_rows(tmp_path, RECALL))
    assert fault in str(raised.value) and "recall.jsonl" in str(raised.value)


def test_two_formats_of_one_table_and_a_broken_file_are_errors(tmp_path: Path) -> None:
    (tmp_path / "items.parquet").write_bytes(b"PAR0")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_rows(tmp_path, ITEMS))
    (tmp_path / "items.jsonl").write_bytes(b'{"item_id": 1}')
    with pytest.raises(DataError, match=r"items\.jsonl and items\.parquet are both there"):
        list(read_rows(tmp_path, ITEMS))


def test_parquet_without_polars_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pl.DataFrame({"item_id": [1]}).write_parquet(tmp_path / "items.parquet")
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "polars":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"needs the extra onesearch\[train\]"):
        list(read_rows(tmp_path, ITEMS))


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Iterator[Row]:
        yield {"item_id": 1}
        raise DataError("items", ["broken"])

    source = tmp_path / "source"
    source.mkdir()
    (source / "relevance.jsonl").write_bytes(b"{}")
    (source / "rank.parquet").write_bytes(b"PAR1")
    (source / "notes.txt").write_bytes(b"?")
    out = tmp_path / "deep" / "out"
    with pytest.raises(DataError, match="broken"):
        write_tables(out, {ITEMS: broken()}, source)
    assert not out.exists()
    write_tables(out, {ITEMS: [{"item_id": 1}]}, source)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        "items.jsonl": orjson.dumps({"item_id": 1}) + b"\n",
        "relevance.jsonl": b"{}",
        "rank.parquet": b"PAR1",
    }
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(DataError, match="exists already"):
        write_tables(out, {ITEMS: []}, source)
    assert (out / "items.jsonl").stat().st_size > 0
