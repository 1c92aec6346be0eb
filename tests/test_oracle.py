"""The noisy oracle of a simulated marketplace: what it knows, how it errs, and that serving never sees the outcome."""

from dataclasses import replace
from pathlib import Path

import pytest

from onesearch.errors import DataError
from training.marketplace import Marketplace, simulate, write_truth
from training.oracle import PERSONAL_KEYWORDS, QUERY_KEYWORDS, oracle_keywords
from training.sessions import PageView, page_views


@pytest.fixture(scope="module")
def market() -> Marketplace:
    return simulate(2_000, 50, 1_500, seed=3)


@pytest.fixture(scope="module")
def data(market: Marketplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("market")
    write_truth(market, folder / "truth")
    return folder


@pytest.fixture(scope="module")
def views(market: Marketplace) -> list[PageView]:
    return page_views(market.tables)


def test_without_noise_keywords_name_the_products_that_were_clicked(
    market: Marketplace, data: Path, views: list[PageView]
) -> None:
    product = dict(market.tables.items.select("item_id", "category_level3_name").iter_rows())
    provided = oracle_keywords(data, market.tables.items, recall=1.0, noise=0.0)(views)
    named = total = 0
    for view, keywords in zip(views, provided, strict=True):
        assert len(keywords.query) <= QUERY_KEYWORDS and len(keywords.serve) <= PERSONAL_KEYWORDS
        for item in view.clicked:
            total += 1
            named += any(phrase.endswith(product[item]) for phrase in keywords.query)
    assert named / total > 0.85  # the rest are clicks outside of the need


def test_serving_keywords_do_not_depend_on_the_outcome_and_training_keywords_hold_it(
    market: Marketplace, data: Path, views: list[PageView]
) -> None:
    provide = oracle_keywords(data, market.tables.items)
    product = dict(market.tables.items.select("item_id", "category_level3_name").iter_rows())
    other = [replace(view, clicked=(7,), ordered=(7,)) for view in views[:300]]
    for before, after, view in zip(provide(views[:300]), provide(other), views, strict=False):
        assert (before.query, before.serve) == (after.query, after.serve)
        assert after.train[0] == product[7]
        if view.clicked:
            assert product[view.clicked[0]] in before.train


def test_recall_and_noise_are_what_they_say_and_equal_calls_agree(
    market: Marketplace, data: Path, views: list[PageView]
) -> None:
    exact = oracle_keywords(data, market.tables.items, recall=1.0, noise=0.0)(views)
    half = oracle_keywords(data, market.tables.items, recall=0.5, noise=0.0)(views)
    wrong = oracle_keywords(data, market.tables.items, recall=1.0, noise=0.4)(views)
    assert half == oracle_keywords(data, market.tables.items, recall=0.5, noise=0.0)(views)
    known = sum(len(k.query) for k in exact)
    assert sum(len(k.query) for k in half) / known == pytest.approx(0.5, abs=0.04)
    foreign = sum(len(set(k.query) - set(e.query)) for k, e in zip(wrong, exact, strict=True))
    assert foreign / known == pytest.approx(0.4, abs=0.05)
    assert oracle_keywords(data, market.tables.items, recall=0.0)(views[:9])[0].query == ()


def test_tables_without_their_truth_are_refused(market: Marketplace, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="simulated tables only"):
        oracle_keywords(tmp_path, market.tables.items)
