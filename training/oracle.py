"""The noisy oracle: keywords of a simulated marketplace from the truth it was drawn from (spec §4.6.6 (a), §9.3).

A query's keywords are the products its need is for, each with the attribute it must have. What a user's own keywords
are follows from the products the user clicked before. Every keyword is lost or replaced by a foreign one with given
chances, drawn from the page view's own seed: equal page views get equal keywords. Only `train` looks at the outcome.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import orjson
import polars as pl

from onesearch.errors import DataError
from onesearch.text import normalise
from training.page_keywords import KeywordProvider, Keywords
from training.sessions import PageView

QUERY_KEYWORDS, PERSONAL_KEYWORDS = 8, 5


def oracle_keywords(
    data: Path, items: pl.DataFrame, recall: float = 0.9, noise: float = 0.1, seed: int = 0
) -> KeywordProvider:
    """Keywords from `data/truth`. recall: chance that a keyword is kept; noise: that a kept one is a foreign one.

    Raises DataError when the tables come without their truth.
    """
    wants = read_wants(data)
    product: Mapping[int, str] = dict(items.select("item_id", "category_level3_name").iter_rows())
    products = sorted({normalise(name) for name in product.values()})

    def keywords(view: PageView) -> Keywords:
        rng = np.random.default_rng([seed, view.session_id])
        known = wants.get(view.context.query, ())
        past = (*view.context.long_clicks, *view.context.long_orders)
        history = Counter(product[item] for item in past if item in product)
        personal = sorted(known, key=lambda want: -history[want[0]])  # stable: equal ones stay in their order
        clicked = [normalise(product[item]) for item in view.clicked if item in product]
        query = _noisy([phrase for _, phrase in known][:QUERY_KEYWORDS], products, recall, noise, rng)
        serve = _noisy([phrase for _, phrase in personal][:PERSONAL_KEYWORDS], products, recall, noise, rng)
        train = tuple(dict.fromkeys([*clicked, *serve]))[:PERSONAL_KEYWORDS]
        return Keywords(query, train, serve)

    return lambda views: [keywords(view) for view in views]


def read_wants(data: Path) -> dict[str, tuple[tuple[str, str], ...]]:
    """Normalised query → (product, keyword) pairs of its need, in the order of the truth.

    Raises DataError when the tables come without their truth.
    """
    needs, queries = data / "truth" / "needs.parquet", data / "truth" / "queries.parquet"
    if not needs.exists() or not queries.exists():
        raise DataError(
            str(data / "truth"), ["holds no needs and queries; the oracle is for simulated tables only"]
        )
    rows = pl.read_parquet(queries).join(pl.read_parquet(needs).select("need_id", "wants"), on="need_id")
    return {
        normalise(query): tuple(map(_keyword, orjson.loads(raw)))
        for query, raw in rows.select("query", "wants").iter_rows()
    }


def _keyword(want: Mapping[str, object]) -> tuple[str, str]:
    constraints: Sequence[Mapping[str, str]] = want["constraints"]  # type: ignore[assignment]
    values = [c["value"] for c in constraints if c["axis"] != "tier"]
    return str(want["type"]), normalise(" ".join([*values, str(want["type"])]))


def _noisy(
    phrases: Sequence[str], products: Sequence[str], recall: float, noise: float, rng: np.random.Generator
) -> tuple[str, ...]:
    kept = [phrase for phrase, draw in zip(phrases, rng.random(len(phrases)), strict=True) if draw < recall]
    foreign = rng.random(len(kept)) < noise
    drawn = rng.integers(len(products), size=len(kept))
    mixed = (products[at] if strange else phrase for phrase, strange, at in zip(kept, foreign, drawn, strict=True))
    return tuple(dict.fromkeys(mixed))
