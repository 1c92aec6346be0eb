"""Pseudo-queries: marked, reproducible, satisfiable, and never in two splits."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from onesearch.errors import DataError
from onesearch.text import normalise
from training import bootstrap as module
from training.bootstrap import MAX_TARGETS, bootstrap
from training.tables import Tables, frame, load_tables, write_tables

BRANDS = ("Acme", "Norwick", "Velby", "Halden")
COLOURS = ("black", "white", "silver")


def catalog(size: int = 240) -> pl.DataFrame:
    """Laptops, cases for laptops, speakers, lamps and bottles of four brands, the first three in three colours."""
    rows: dict[str, list[Any]] = {"item_id": [], "item_title": [], "brand_name": [], "attributes": []}
    for i in range(size):
        brand, colour = BRANDS[i % 4], COLOURS[i % 3]
        laptops = (f"laptop {colour}", f"laptop case {colour}")
        kind = (*laptops, f"bluetooth speaker {colour}", "desk lamp", "water bottle")[i // 12 % 5]
        rows["item_id"].append(1_000 + i)
        rows["item_title"].append(f"{brand} ZX-{i} {kind}")
        rows["brand_name"].append(brand)
        rows["attributes"].append(f'{{"colour":"{colour}","description":"a fine thing, {colour}"}}')
    return frame("items", rows)


def test_rows_are_marked_and_shaped_as_a_recall_table() -> None:
    recall = bootstrap(catalog(), seed=0)
    assert recall.schema == frame("recall", {name: [] for name in recall.columns}).schema
    assert set(recall["source"]) == {"bootstrap"} and set(recall["user_id"]) == {0}
    assert recall["impressed_item_ids"].equals(recall["clicked_item_ids"], check_names=False)
    assert recall["clicked_item_ids"].list.len().is_between(1, MAX_TARGETS).all()
    assert (recall["clicked_item_ids"].list.n_unique() == recall["clicked_item_ids"].list.len()).all()
    assert set(recall["split"]) == {"train", "valid", "test"}


def test_the_same_seed_repeats_and_another_differs() -> None:
    items = catalog()
    assert bootstrap(items, 3, 200).equals(bootstrap(items, 3, 200))
    assert not bootstrap(items, 3, 200).equals(bootstrap(items, 4, 200))


def test_head_queries_are_product_types_shared_by_brands() -> None:
    head = bootstrap(catalog(), seed=0)["query"].value_counts(sort=True)["query"].to_list()[:8]
    assert {"laptop", "laptop case", "bluetooth speaker"} <= set(head)
    assert not set(head) & set(COLOURS)


def test_any_word_that_items_share_is_typed_alone() -> None:
    """`keyboard` may be an attribute value and so no product type; people type it all the same."""
    typed = set(bootstrap(catalog(), seed=0)["query"])
    assert {"bottle", "lamp", "black", "fine"} <= typed


def test_what_bm25_ranks_first_is_clicked_first() -> None:
    said = ["neat"] * 40 + ["that comes along in a bundle of many more rather useful things"] * 40
    first = 1_000 + 240  # the gadgets' ids; the short ones come before the wordy ones
    items, gadgets = catalog(240), catalog(320)[240:]
    gadgets = gadgets.with_columns(
        pl.lit("Acme gadget alpha").alias("item_title"),
        pl.Series("attributes", [f'{{"description":"{words}"}}' for words in said]),
    )
    recall = bootstrap(pl.concat([items, gadgets]), seed=0)
    asked = recall.filter(pl.col("query").str.contains("^(acme )?(gadget|alpha|gadget alpha)$"))
    clicked = asked["clicked_item_ids"].explode()
    assert len(clicked) > 200 and (clicked >= first).all()
    assert (clicked < first + 40).mean() > 0.65


def test_held_out_queries_are_disjoint_from_training_queries_up_to_plural_and_order() -> None:
    recall = bootstrap(catalog(), seed=0)
    words = {
        split: {frozenset(word.rstrip("s") for word in query.split()) for query in rows["query"]}
        for (split,), rows in recall.group_by("split")
    }
    exact = {split: set(rows["query"]) for (split,), rows in recall.group_by("split")}
    assert not exact["train"] & (exact["valid"] | exact["test"])
    assert len(words["train"] & words["test"]) <= 0.02 * len(
        words["train"]
    )  # a misspelling may read as another query


def test_clicked_items_hold_all_words_of_an_unperturbed_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TYPO_SHARE", 0.0)
    monkeypatch.setattr(module, "PLURAL_SHARE", 0.0)
    items = catalog()
    text = {
        i: normalise(f"{title} {extra}")
        for i, title, extra in items.select("item_id", "item_title", "attributes").iter_rows()
    }
    for query, clicked in bootstrap(items, 1, 300).select("query", "clicked_item_ids").iter_rows():
        assert all(word in text[i] for i in clicked for word in query.split())


def test_a_type_query_prefers_the_product_over_its_accessory() -> None:
    titles = dict(catalog().select("item_id", "item_title").iter_rows())
    rows = bootstrap(catalog(), 0).filter(pl.col("query") == "laptop")
    clicked = [titles[i] for i in rows["clicked_item_ids"].explode()]
    assert len(clicked) > 20 and sum("case" in title for title in clicked) < 0.1 * len(clicked)


def test_a_catalog_of_bare_titles_in_another_script_still_gets_queries() -> None:
    items = frame("items", {"item_id": [1, 2], "item_title": ["福利金钻绒床边地毯防尘免洗", "!!!"]})
    recall = bootstrap(items, 0, 10)
    assert len(recall) > 0 and set(recall["clicked_item_ids"].explode()) == {1}


def test_the_command_adds_a_recall_table_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tables(Tables(catalog(60)), tmp_path, "parquet")
    module._command(tmp_path, seed=0, rows=50)
    assert "50 pseudo-sessions" in capsys.readouterr().out
    recall = load_tables(tmp_path).recall
    assert recall is not None and len(recall) == 50
    with pytest.raises(DataError, match="has a recall table already"):
        module._command(tmp_path, seed=0, rows=50)
