"""The strict table loader: what it accepts, and that every fault is named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pytest

from onesearch.errors import DataError
from training.columns import SCHEMAS
from training.tables import MAX_FAULTS, Tables, frame, load_tables, write_tables

DEMO = Path(__file__).parents[2] / "shared/data/kuaisearch_demo"


def put(directory: Path, table: str, *rows: Mapping[str, Any]) -> None:
    text = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    (directory / f"{table}.jsonl").write_bytes(text)


def item(item_id: int = 1, **more: Any) -> dict[str, Any]:
    return {"item_id": item_id, "item_title": f"item {item_id}", **more}


def session(session_id: int = 1, **more: Any) -> dict[str, Any]:
    row = {"user_id": 1, "session_id": session_id, "query": "lamp", "time_index": session_id}
    return {**row, "impressed_item_ids": [1, 2, 3], "clicked_item_ids": [2], **more}


def faults_of(directory: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_tables(directory)
    return list(caught.value.faults)


def test_a_catalog_of_titles_alone_gets_the_documented_defaults(tmp_path: Path) -> None:
    put(tmp_path, "items", item())
    tables = load_tables(tmp_path)
    assert tables.recall is None
    row = tables.items.row(0, named=True)
    assert (row["brand_id"], row["brand_name"], row["category_level3_name"]) == (0, "UNKNOWN", "UNKNOWN")
    assert (row["price"], row["attributes"], row["in_stock"], row["published_at"]) == (None, "{}", True, None)
    assert tables.items.schema == frame("items", {"item_id": [1], "item_title": ["x"]}).schema


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("1970-01-02", 86_400),
        ("1970-01-01T01:00:00Z", 3_600),
        ("1970-01-01T01:00:00+01:00", 0),
        (12, 12),
        (None, None),
    ],
)
def test_published_at_is_epoch_seconds_or_iso_8601(tmp_path: Path, written: Any, seconds: int | None) -> None:
    put(tmp_path, "items", item(published_at=written))
    assert load_tables(tmp_path).items["published_at"].to_list() == [seconds]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"item_title": "no id"}, "item_id: missing"),
        (item(-1), "item_id: -1"),
        (item(1.0), "item_id: 1.0"),  # type: ignore[arg-type]
        (item(True), "item_id: True"),
        (item(2**64 - 1), "item_id: 18446744073709551615"),
        (item(item_title="  "), "item_title: '  '"),
        (item(item_title=None), "item_title: None"),
        (item(price=-0.01), "price: -0.01"),
        (item(price="9.99"), "price: '9.99'"),
        (item(in_stock=1), "in_stock: 1"),
        (item(published_at="yesterday"), "published_at: 'yesterday'"),
        (item(published_at=1.5), "published_at: 1.5"),
        (item(attributes={"a": [1]}), "attributes: {'a': [1]}"),
        (item(attributes="not json"), "attributes: 'not json'"),
        (item(brand_name=3), "brand_name: 3"),
        (item(colour="red"), "colour: unknown column"),
    ],
)
def test_a_bad_value_is_named_with_its_line_field_and_expectation(
    tmp_path: Path, row: dict[str, Any], field: str
) -> None:
    put(tmp_path, "items", item(7), row)
    (fault,) = faults_of(tmp_path)
    assert fault.startswith(f"items.jsonl line 2: {field}") and "expected" in fault


def test_a_repeated_key_names_where_it_was_first_seen(tmp_path: Path) -> None:
    put(tmp_path, "items", item(5), item(6), item(5))
    assert faults_of(tmp_path) == [
        "items.jsonl line 3: item_id: 5, expected a unique value (first seen in line 1)"
    ]


def test_lines_that_are_not_json_objects_are_faults_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_bytes(b'{"item_id": 1\n\n[1]\n{"item_id": 2, "item_title": ""}\n')
    faults = faults_of(tmp_path)
    assert [fault.split(":")[0] for fault in faults] == [f"items.jsonl line {n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"clicked_item_ids": [9]}, "clicked_item_ids: [9]"),
        ({"carted_item_ids": [1, 8]}, "carted_item_ids: [8]"),
        ({"purchased_item_ids": [4]}, "purchased_item_ids: [4]"),
        ({"impressed_item_ids": [1, "2"]}, "impressed_item_ids"),
        ({"impressed_item_ids": [1, True]}, "impressed_item_ids"),
        ({"split": "dev"}, "split: 'dev'"),
        ({"source": "made up"}, "source: 'made up'"),
        ({"query": " "}, "query: ' '"),
    ],
)
def test_a_session_must_be_a_funnel_with_a_query_and_a_split(
    tmp_path: Path, more: dict[str, Any], field: str
) -> None:
    put(tmp_path, "items", item())
    put(tmp_path, "recall", session(1), session(2, **more))
    (fault,) = faults_of(tmp_path)
    assert fault.startswith(f"recall.jsonl line 2: {field}")


def test_a_purchase_without_a_click_is_allowed(tmp_path: Path) -> None:
    put(tmp_path, "items", item())
    put(tmp_path, "recall", session(purchased_item_ids=[3]))
    recall = load_tables(tmp_path).recall
    assert recall is not None and recall["purchased_item_ids"].to_list() == [[3]]


def test_faults_of_all_files_come_together_capped_per_file(tmp_path: Path) -> None:
    put(tmp_path, "items", *(item(n, price=-1) for n in range(70)))
    put(tmp_path, "users", {"user_id": 1, "gender": "X"})
    faults = faults_of(tmp_path)
    assert len(faults) == MAX_FAULTS + 2
    assert faults[MAX_FAULTS] == "items.jsonl: and 20 more"
    assert faults[-1].startswith("users.jsonl line 1: gender: 'X', expected one of F, M, UNKNOWN")


def test_long_values_are_shortened_in_faults(tmp_path: Path) -> None:
    put(tmp_path, "items", item(price="x" * 500))
    (fault,) = faults_of(tmp_path)
    assert len(fault) < 160


def test_missing_empty_doubled_and_damaged_files_are_faults(tmp_path: Path) -> None:
    assert faults_of(tmp_path) == ["items.jsonl or items.parquet is missing"]
    put(tmp_path, "items")
    assert faults_of(tmp_path) == ["items.jsonl: no rows, expected at least one item"]
    (tmp_path / "items.parquet").write_bytes(b"PAR1 not really")
    assert "both there" in faults_of(tmp_path)[0]
    (tmp_path / "items.jsonl").unlink()
    assert "not a readable Parquet file" in faults_of(tmp_path)[0]


def test_parquet_faults_name_the_row(tmp_path: Path) -> None:
    pl.DataFrame({"item_id": [1, -2], "item_title": ["a", "b"]}).write_parquet(tmp_path / "items.parquet")
    assert faults_of(tmp_path) == ["items.parquet row 2: item_id: -2, expected an integer >= 0"]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_written_tables_read_back_equal(tmp_path: Path, format: Any) -> None:
    put(tmp_path, "items", item(1, price=3, attributes={"wide": True, "watt": 5, "cap": "E27"}), item(2))
    put(tmp_path, "recall", session(1), session(2, impressed_item_ids=[], clicked_item_ids=[]))
    rank = {"user_id": 1, "session_id": 1, "query": "q", "time_index": 1, "target_item_id": 1, "is_clicked": 1}
    put(tmp_path, "rank", rank, {**rank, "user_statistical_features": {"user_gmv_30d_hist": 2}})
    first = load_tables(tmp_path)
    write_tables(first, tmp_path / "copy", format)
    again = load_tables(tmp_path / "copy")
    for table in SCHEMAS:
        one, other = getattr(first, table), getattr(again, table)
        assert (one is None and other is None) or one.equals(other)
    assert not list((tmp_path / "copy").glob(".*"))


def test_writing_beside_another_data_set_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "items", item())
    put(tmp_path, "recall", session())
    tables = load_tables(tmp_path)
    with pytest.raises(DataError, match=r"recall\.jsonl belongs to another data set"):
        write_tables(Tables(tables.items), tmp_path)
    with pytest.raises(DataError, match=r"items\.jsonl belongs"):
        write_tables(tables, tmp_path, "parquet")
    write_tables(tables, tmp_path)


def test_dangling_counts_distinct_impressed_ids_without_an_item(tmp_path: Path) -> None:
    put(tmp_path, "items", item(1))
    assert load_tables(tmp_path).dangling() == 0
    put(tmp_path, "recall", session(1), session(2))
    assert load_tables(tmp_path).dangling() == 2


@pytest.mark.skipif(not DEMO.is_dir(), reason=f"{DEMO} is absent")
def test_the_kuaisearch_demo_loads_without_faults() -> None:
    tables = load_tables(DEMO)
    assert [len(getattr(tables, table)) for table in SCHEMAS] == [200] * 5
    assert tables.dangling() > 20_000
