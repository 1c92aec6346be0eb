"""Facets against counting the candidates one by one, with and without changed items."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from service_fakes import FIRST_ID, TITLES, tiny_catalog
from tiny_bundle import GOLDEN, write_tiny_bundle

from onesearch.bundle import open_bundle
from onesearch.catalog import Filters, Item
from onesearch.facets import MAX_VALUES, PRICE_BANDS, Count, Facets, PriceBand, _bands, count_facets
from onesearch.live import Change, Snapshot
from onesearch.model import TorchDecoder, open_model
from onesearch.search import Searcher, SearchOptions


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """The tiny bundle, of which two items have since changed."""
    path, _ = write_tiny_bundle(tmp_path_factory.mktemp("facets"))
    bundle = open_bundle(path)
    made = Searcher(bundle, TorchDecoder(open_model(path), bundle.renderer))
    moved = replace(bundle.catalog.item(0), category=("fresh", "arrivals"), brand="acme", price=7.25)
    bare = Item(99, "red something")
    made.live.apply([Change(1, moved.item_id, moved), Change(2, 99, bare)])
    return made


def kept(catalog: Snapshot, rows: np.ndarray, **filters: object) -> int:
    """How many of some rows a filter lets through."""
    return int(catalog.select(Filters(**filters)).keeps(rows).sum())  # type: ignore[arg-type]


def test_facets_are_those_of_six_items_counted_by_hand(tmp_path: Path) -> None:
    catalog = tiny_catalog(tmp_path / "items").snapshot
    facets = count_facets(catalog, catalog.rows_of(range(FIRST_ID, FIRST_ID + len(TITLES))))
    assert facets == Facets(
        candidates=6,
        top_category=(Count("sport", 5), Count("home", 1)),
        category=(Count("shoes", 3), Count("socks", 2), Count("kitchen", 1)),
        brand=(Count("Fleet", 2), Count("Oak", 2), Count("Crema", 1), Count("Pace", 1)),
        price=tuple(PriceBand(price, price, 1) for price in (9.0, 79.0, 99.5, 149.0, 249.0)),
    )


@pytest.mark.parametrize("filters", [None, Filters(brand="acme"), Filters(in_stock=True, price_max=20.0)])
def test_counts_are_what_their_filters_leave_of_the_candidates(
    searcher: Searcher, filters: Filters | None
) -> None:
    found = searcher.search(GOLDEN[0], SearchOptions(limit=3, filters=filters, facets=True))
    catalog, facets = found.catalog, found.facets
    assert facets is not None
    everything = np.flatnonzero(np.ones(catalog.base.catalog.num_items + catalog.added.num_items))
    live = catalog.select(filters).keeps(everything)
    rows = everything[live]  # the beam is wider than the catalog: every eligible item is a candidate
    assert facets.candidates == len(rows) == found.eligible
    items = [catalog.item(row) for row in rows.tolist()]
    for counts, names in (
        (facets.top_category, [i.category[0] for i in items if i.category]),
        (facets.category, [i.category[-1] for i in items if i.category]),
        (facets.brand, [i.brand for i in items if i.brand]),
    ):
        assert {c.value: c.count for c in counts} == Counter(names)
        assert list(counts) == sorted(counts, key=lambda c: (-c.count, c.value))
    for count in (*facets.top_category, *facets.category):
        assert count.count == kept(catalog, rows, category=count.value)
    for count in facets.brand:
        assert count.count == kept(catalog, rows, brand=count.value)
    for band in facets.price:
        assert band.count == kept(catalog, rows, price_min=band.price_min, price_max=band.price_max)
    assert sum(band.count for band in facets.price) == sum(i.price is not None for i in items)


def test_facets_change_nothing_of_the_answer_and_never_count_more_than_the_beam(searcher: Searcher) -> None:
    for width, limit in ((4, 2), (512, 5), (1, 30)):
        plain = searcher.search(GOLDEN[1], SearchOptions(limit=limit, width=width))
        counted = searcher.search(GOLDEN[1], SearchOptions(limit=limit, width=width, facets=True))
        assert plain.facets is None
        assert counted.facets is not None
        assert len(counted.rows) <= counted.facets.candidates <= max(width, limit)
        assert counted.rows.tolist() == plain.rows.tolist()
        # The last level is asked in one call instead of quarters, whose products may round otherwise.
        np.testing.assert_allclose(counted.scores, plain.scores, rtol=1e-6)


def test_at_most_so_many_names_are_told_and_nothing_has_no_facets(tmp_path: Path) -> None:
    live = tiny_catalog(tmp_path / "items")
    live.apply([Change(n, n, Item(n, "thing", f"brand {n:02}")) for n in range(1, MAX_VALUES + 6)])
    catalog = live.snapshot
    facets = count_facets(catalog, catalog.rows_of(range(1, MAX_VALUES + 6)))
    assert [count.value for count in facets.brand] == [f"brand {n:02}" for n in range(1, MAX_VALUES + 1)]
    assert count_facets(catalog, catalog.rows_of([])) == Facets(0, (), (), (), ())


@given(st.lists(st.one_of(st.floats(0, 1e6, width=32), st.sampled_from([9.99, 5.0, float("nan")])), max_size=60))
def test_price_bands_hold_every_price_once_in_about_equal_parts(values: list[float]) -> None:
    prices = np.asarray(values, dtype=np.float32)
    known, bands = np.sort(prices[~np.isnan(prices)]), _bands(prices)
    assert len(bands) <= PRICE_BANDS
    held = [known[(known >= np.float32(b.price_min)) & (known <= np.float32(b.price_max))] for b in bands]
    assert [len(part) for part in held] == [band.count for band in bands]
    assert all(band.count > 0 for band in bands)
    np.testing.assert_array_equal(np.concatenate([*held, []]), known)
    if len(known) and len(set(known.tolist())) == len(known) >= PRICE_BANDS:
        assert max(band.count for band in bands) - min(band.count for band in bands) <= 1
