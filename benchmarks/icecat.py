"""The Chorus / Icecat electronics catalog and its human ratings as our tables.

Source: querqy/chorus, `data-encoder/ecommerce/vectors/data/*.json.zip` and `katas/Broad_Query_Set_rated.csv`. Writes
`items` (19,406 products) and `judgements.jsonl` (query, item_id, rating 0–3). Nothing is dropped or merged silently:
a row that cannot be converted is an error, and the summary counts what was empty.
"""

import csv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import typer

from onesearch.arrays import write_atomically
from onesearch.command import run
from onesearch.errors import DataError
from training.columns import UNKNOWN
from training.tables import Tables, frame, write_tables

RATINGS = "Broad_Query_Set_rated.csv"
PRODUCT_TYPE = "attr_t_product_type"


@dataclass(frozen=True)
class Judgement:
    """A person's rating 0–3 of an item for a query."""

    query: str
    item_id: int
    rating: int


def read_items(source: str | Path) -> pl.DataFrame:
    """Items table of all `*.json.zip` files, in file order. Raises DataError when there are none or one is broken."""
    paths = sorted(Path(source).glob("*.json.zip"))
    if not paths:
        raise DataError(str(source), ["no *.json.zip, expected the Icecat catalog files"])
    products = [product for path in paths for product in _read_zip(path)]
    brands = {name: i for i, name in enumerate(sorted({p["supplier"] for p in products}), 1)}
    types = {name: i for i, name in enumerate(sorted({_type(p) for p in products} - {UNKNOWN}), 1)}
    columns: dict[str, list[Any]] = {
        "item_id": [int(p["id"]) for p in products],
        "item_title": [p["title"] for p in products],
        "brand_id": [brands[p["supplier"]] for p in products],
        "brand_name": [p["supplier"] for p in products],
        "category_level1_id": [types.get(_type(p), 0) for p in products],
        "category_level1_name": [_type(p) for p in products],
        "price": [p["price"] / 100 for p in products],
        "image_url": [p["img_500x500"] for p in products],
        "attributes": [orjson.dumps(_attributes(p)).decode() for p in products],
        "published_at": pl.Series([p["date_released"] for p in products])
        .str.to_datetime()
        .dt.epoch("s")
        .to_list(),
    }
    return frame("items", columns)


def read_judgements(source: str | Path) -> list[Judgement]:
    """The rated query set, in file order. Raises DataError listing rows that are not (text, integer id, 0–3)."""
    path = Path(source) / RATINGS
    if not path.is_file():
        raise DataError(str(source), [f"no {RATINGS}"])
    judgements: list[Judgement] = []
    faults: list[str] = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in (reader := csv.DictReader(file)):
            query, docid, rating = row["query"], row["docid"], row["rating"]
            if query and docid.isdecimal() and rating in ("0", "1", "2", "3"):
                judgements.append(Judgement(query, int(docid), int(rating)))
            else:
                faults.append(
                    f"line {reader.line_num}: {row}, expected a query, an integer docid and a rating 0-3"
                )
    if faults:
        raise DataError(str(path), faults)
    return judgements


def write_judgements(judgements: Sequence[Judgement], path: Path) -> None:
    """JSON lines, one judgement each."""
    write_atomically(path, b"".join(orjson.dumps(j, option=orjson.OPT_APPEND_NEWLINE) for j in judgements))


def load_judgements(path: str | Path) -> list[Judgement]:
    """Read what `write_judgements` wrote."""
    return [Judgement(**orjson.loads(line)) for line in Path(path).read_bytes().splitlines()]


def _read_zip(path: Path) -> list[dict[str, Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            products: list[dict[str, Any]] = orjson.loads(archive.read(archive.namelist()[0]))
    except (zipfile.BadZipFile, orjson.JSONDecodeError, IndexError) as error:
        raise DataError(str(path), [f"not a zip of one JSON array ({error})"]) from error
    return products


def _type(product: dict[str, Any]) -> str:
    """The product type where the source has a word for it (142 rows say `1`)."""
    value = str(product.get(PRODUCT_TYPE, UNKNOWN))
    return UNKNOWN if value.isdecimal() else value


def _attributes(product: dict[str, Any]) -> dict[str, Any]:
    """attr_t_/attr_n_/attr_b_ keys without their prefix (kept where a text and a number share a name), and the short
    description under `description`."""
    attributes: dict[str, Any] = {}
    for key, value in product.items():
        if key.startswith(("attr_t_", "attr_n_", "attr_b_")):
            attributes[key if key[7:] in attributes else key[7:]] = value
    if product.get("short_description"):
        attributes["description"] = product["short_description"]
    return attributes


def _command(source_dir: Path, out_dir: Path, format: str = "jsonl") -> None:
    """Convert the Icecat catalog and ratings in SOURCE_DIR to tables in OUT_DIR."""
    if format not in ("jsonl", "parquet"):
        raise typer.BadParameter(f"{format!r}, expected jsonl or parquet", param_hint="--format")
    items, judgements = read_items(source_dir), read_judgements(source_dir)
    write_tables(Tables(items), out_dir, "jsonl" if format == "jsonl" else "parquet")
    write_judgements(judgements, out_dir / "judgements.jsonl")
    typer.echo(summary(items, judgements))


def summary(items: pl.DataFrame, judgements: Sequence[Judgement]) -> str:
    """One line of counts: what was converted and what the source left empty."""
    known = set(items["item_id"])
    described = items["attributes"].str.contains('"description":', literal=True).sum()
    typeless = items.filter(pl.col("category_level1_name") == UNKNOWN)
    pairs = {(j.query, j.item_id) for j in judgements}
    return (
        f"{len(items)} items of {items['brand_name'].n_unique()} brands; {len(typeless)} without a product type, "
        f"{len(items) - described} without a description, "
        f"{len(items) - items['item_title'].n_unique()} with another's title; {len(judgements)} judgements of "
        f"{len({j.query for j in judgements})} queries, {len(judgements) - len(pairs)} repeated, "
        f"{sum(j.item_id not in known for j in judgements)} of unknown items"
    )


if __name__ == "__main__":
    run(_command)
