"""The Icecat converter on a two-product archive, and on the real one where it is present."""

import zipfile
from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks import icecat
from benchmarks.icecat import RATINGS, load_judgements, read_items, read_judgements, summary, write_judgements
from onesearch.errors import DataError
from training.tables import load_tables

REAL = Path(__file__).parents[2] / "shared/data/icecat"


def product(**more: Any) -> dict[str, Any]:
    row = {
        "id": "12",
        "title": "Acme T1 notebook",
        "supplier": "Acme",
        "price": 10995,
        "img_500x500": "http://x/1.jpg",
    }
    return {**row, "date_released": "2009-12-10T00:00:00Z", "short_description": "Thin", **more}


def put(directory: Path, *products: dict[str, Any], ratings: str = "query,docid,rating\nlaptop,12,3\n") -> Path:
    with zipfile.ZipFile(directory / "1.json.zip", "w") as archive:
        archive.writestr("1.json", orjson.dumps(list(products)))
    (directory / RATINGS).write_text(ratings)
    return directory


def test_a_product_becomes_an_item(tmp_path: Path) -> None:
    extra = {"attr_t_product_type": "Notebook", "attr_n_width": 3.5, "attr_b_touch": False, "attr_t_width": "slim"}
    items = read_items(put(tmp_path, product(**extra), product(id="13", attr_t_product_type="1")))
    row, other = items.iter_rows(named=True)
    assert (row["item_id"], row["price"], row["brand_name"], row["published_at"]) == (
        12,
        109.95,
        "Acme",
        1_260_403_200,
    )
    assert (row["category_level1_name"], other["category_level1_name"]) == ("Notebook", "UNKNOWN")
    assert orjson.loads(row["attributes"]) == {
        "product_type": "Notebook",
        "width": 3.5,
        "touch": False,
        "attr_t_width": "slim",  # shares its name with a number, so it keeps its prefix
        "description": "Thin",
    }


def test_judgements_survive_writing_and_bad_ratings_are_faults(tmp_path: Path) -> None:
    judgements = read_judgements(put(tmp_path, product()))
    write_judgements(judgements, tmp_path / "judgements.jsonl")
    assert load_judgements(tmp_path / "judgements.jsonl") == judgements
    put(tmp_path, product(), ratings="query,docid,rating\nlaptop,12,4\n,12,1\nlaptop,x,1\n")
    with pytest.raises(DataError) as caught:
        read_judgements(tmp_path)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["line 2", "line 3", "line 4"]


def test_missing_and_damaged_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.json\.zip"):
        read_items(tmp_path)
    with pytest.raises(DataError, match=RATINGS):
        read_judgements(tmp_path)
    (tmp_path / "1.json.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="not a zip of one JSON array"):
        read_items(tmp_path)


def test_the_command_writes_tables_the_strict_loader_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    icecat._command(put(tmp_path, product(), product(id="13", short_description="")), tmp_path / "out")
    assert "2 items of 1 brands; 2 without a product type, 1 without a description" in capsys.readouterr().out
    assert len(load_tables(tmp_path / "out").items) == 2
    assert len(load_judgements(tmp_path / "out/judgements.jsonl")) == 1


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")
def test_the_real_catalog_converts_completely() -> None:
    items, judgements = read_items(REAL), read_judgements(REAL)
    assert (len(items), items["brand_name"].n_unique(), len(judgements)) == (19_406, 161, 3_668)
    assert "3668 judgements of 135 queries, 0 repeated, 0 of unknown items" in summary(items, judgements)
