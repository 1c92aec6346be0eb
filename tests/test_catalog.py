"""Catalog: expansion order, filters against brute force, and damage that is reported."""

from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onesearch.catalog import Catalog, Filters, Item, columns_of, write_catalog
from onesearch.errors import BundleError

BRANDS = ("Acme", "Étoile", "")
CATEGORIES = (("Home", "Lamps", "Desk"), ("Home", "Rugs"), ())


def make_items(count: int, seed: int) -> tuple[list[Item], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    items = [
        Item(
            item_id=int(item_id),
            title=f"item {item_id}",
            brand=BRANDS[rng.integers(3)],
            category=CATEGORIES[rng.integers(3)],
            price=None if rng.random() < 0.2 else float(rng.integers(1, 50)),
            in_stock=bool(rng.random() < 0.7),
            attributes=(("colour", "red"),),
            published_at=int(rng.integers(0, 5)) * 1000,
        )
        for item_id in rng.permutation(10 * count)[:count]
    ]
    return items, rng.integers(0, 3, (count, 5)).astype(np.uint16), rng.random(count).astype(np.float32).round(1)


def write(folder: Path, count: int = 200, seed: int = 0) -> tuple[Catalog, list[Item], np.ndarray, np.ndarray]:
    items, sids, popularity = make_items(count, seed)
    write_catalog(folder, items, sids, popularity)
    return Catalog(folder), items, sids, popularity


def test_rows_are_sorted_by_sid_then_popularity_then_id(tmp_path: Path) -> None:
    catalog, items, sids, popularity = write(tmp_path)
    keys = sorted((*sids[i].tolist(), -float(popularity[i]), items[i].item_id) for i in range(len(items)))
    assert catalog.item_ids.tolist() == [key[-1] for key in keys]
    assert catalog.sids.tolist() == [list(key[:5]) for key in keys]


def test_a_body_is_the_item_as_json(tmp_path: Path) -> None:
    catalog, items, _, _ = write(tmp_path)
    for item in items[:20]:
        row = catalog.row_of(item.item_id)
        assert row is not None
        body = orjson.loads(catalog.item_json(row))
        assert body["item_id"] == item.item_id
        assert body["price"] == item.price
        assert body["category"] == list(item.category)
        assert body["attributes"] == {"colour": "red"}


def test_unknown_ids_are_left_out(tmp_path: Path) -> None:
    catalog, items, sids, _ = write(tmp_path)
    assert catalog.row_of(10**9) is None
    assert catalog.index([10**9, items[3].item_id, -1]).tolist() == [-1, catalog.row_of(items[3].item_id), -1]
    found = catalog.sids_of([items[3].item_id, 10**9, items[1].item_id])
    assert found.tolist() == sids[[3, 1]].tolist()
    assert catalog.sids_of([]).shape == (0, 5)


@given(
    category=st.sampled_from([None, "home", " LAMPS ", "desk", "nothing"]),
    brand=st.sampled_from([None, "acme", "étoile", "none such"]),
    price=st.tuples(st.none() | st.integers(0, 50), st.none() | st.integers(0, 50)),
    in_stock=st.none() | st.booleans(),
    published=st.none() | st.integers(0, 4000),
    seed=st.integers(0, 3),
)
def test_filters_equal_a_plain_reading_of_each_item(
    tmp_path_factory: pytest.TempPathFactory,
    category: str | None,
    brand: str | None,
    price: tuple[int | None, int | None],
    in_stock: bool | None,
    published: int | None,
    seed: int,
) -> None:
    catalog, items, _, _ = write(tmp_path_factory.mktemp("catalog"), 60, seed)
    excluded = items[0].item_id
    low, high = (None if p is None else float(p) for p in price)
    eligible = catalog.eligible(Filters(category, brand, low, high, in_stock, (excluded, 10**9), published))

    def passes(item: Item) -> bool:
        return (
            item.item_id != excluded
            and (category is None or category.strip().casefold() in [c.casefold() for c in item.category])
            and (brand is None or item.brand.casefold() == brand)
            and (low is None or (item.price is not None and item.price >= low))
            and (high is None or (item.price is not None and item.price <= high))
            and (in_stock is None or item.in_stock == in_stock)
            and (published is None or 0 < item.published_at >= published)
        )

    assert set(catalog.item_ids[eligible].tolist()) == {i.item_id for i in items if passes(i)}
    legal = {tuple(s) for s in catalog.sids[eligible].tolist()}
    distinct = np.unique(catalog.sids, axis=0)
    assert [tuple(s) in legal for s in distinct.tolist()] == catalog.sid_mask(eligible).tolist()


def test_a_price_bound_beyond_all_numbers_of_prices_is_infinite(tmp_path: Path) -> None:
    catalog, items, _, _ = write(tmp_path, 60)
    assert catalog.eligible(Filters(price_max=1e300)).sum() == sum(i.price is not None for i in items)
    assert not catalog.eligible(Filters(price_min=1e300)).any()


@given(st.integers(0, 5))
def test_rows_under_sids_come_sid_by_sid_in_the_order_asked(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    catalog, _, _, _ = write(tmp_path_factory.mktemp("catalog"), 80, seed)
    leaves = np.random.default_rng(seed).permutation(catalog.num_sids)[:30]
    rows, sources = catalog.rows_under(leaves)
    distinct = np.unique(catalog.sids, axis=0)
    expected = [
        (row, place)
        for place, leaf in enumerate(leaves)
        for row in range(catalog.num_items)
        if catalog.sids[row].tolist() == distinct[leaf].tolist()
    ]
    assert list(zip(rows.tolist(), sources.tolist(), strict=True)) == expected
    assert catalog.leaves_at(rows).tolist() == leaves[sources].tolist()


def test_an_item_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    catalog, items, _, _ = write(tmp_path)
    for item in items[:20]:
        row = catalog.row_of(item.item_id)
        assert row is not None
        assert catalog.item(row) == item


def test_a_catalog_in_memory_may_be_empty() -> None:
    empty = Catalog.of(columns_of([], np.zeros((0, 5), dtype=np.uint16), np.zeros(0, dtype=np.float32)))
    assert (empty.num_items, empty.num_sids, empty.row_of(1)) == (0, 0, None)
    assert empty.sid_mask(empty.eligible(Filters(category="home"))).shape == (0,)
    assert [len(part) for part in empty.rows_under(np.zeros(0, dtype=np.int64))] == [0, 0]


def test_all_damaged_files_are_listed_at_once(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "price.npy").unlink()
    (tmp_path / "brand.npy").write_bytes(b"\x93NUMPY garbage")
    (tmp_path / "words.npy").unlink()
    with pytest.raises(BundleError) as caught:
        Catalog(tmp_path)
    assert {fault.split(":")[0] for fault in caught.value.faults} == {"price.npy", "brand.npy", "words.npy"}


def test_rows_that_do_not_match_are_a_fault(tmp_path: Path) -> None:
    write(tmp_path)
    np.save(tmp_path / "price.npy", np.zeros(3, dtype=np.float32))
    (tmp_path / "items.bin").write_bytes(b"{}")
    np.save(tmp_path / "word_rows.npy", np.full(1, 7, dtype=np.uint32))
    with pytest.raises(BundleError) as caught:
        Catalog(tmp_path)
    assert len(caught.value.faults) == 3
