"""Mines keyword rules from a catalog and its training log: the rule-based provider of spec §4.6.6 (b).

Dictionary phrases are brands, categories and frequent attribute values. Seeds of a frequent query are the
categories its users clicked, strongest first; only page views of the training split are read.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import orjson
import polars as pl

from onesearch.keywords import KeywordRules
from onesearch.text import normalise
from training.columns import UNKNOWN
from training.sessions import PageView

MIN_SEED_CLICKS = 3
MAX_SEEDS = 3
MAX_PHRASE_CHARS = 30
_NO_BRAND = {"", "unknown", "其他", "其他/other", "other", "无品牌", "无品牌/无注册商标"}
# Attribute names of shops vary; a name that holds one of these words gives phrases of that type.
_ATTRIBUTE_TYPES = (
    *(("colour", "Color"), ("color", "Color"), ("material", "Material"), ("style", "Style"), ("season", "Season")),
    *(
        ("audience", "Audience"),
        ("pattern", "Pattern"),
        ("type", "Entity"),
        ("series", "Series"),
        ("model", "Model"),
    ),
)


def mine_keywords(items: pl.DataFrame, views: Sequence[PageView], min_items: int) -> KeywordRules:
    """Rules from items and page views; a phrase needs `min_items` items to enter the dictionary."""
    counts: Counter[tuple[str, str]] = Counter(
        pair for row in items.iter_rows(named=True) for pair in set(_phrases(row))
    )
    types: dict[str, str] = {}
    for (phrase, kind), count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        if count >= min_items and 1 < len(phrase) <= MAX_PHRASE_CHARS:
            types.setdefault(phrase, kind)
    return KeywordRules(types, _seeds(items, views))


def _phrases(row: dict[str, object]) -> Iterator[tuple[str, str]]:
    brand = normalise(str(row["brand_name"]))
    if brand not in _NO_BRAND:
        yield brand, "Brand"
    for level in (1, 2, 3):
        if (name := str(row[f"category_level{level}_name"])) != UNKNOWN:
            yield normalise(name), "Entity"
    for name, value in orjson.loads(str(row["attributes"])).items():
        kind = next((kind for word, kind in _ATTRIBUTE_TYPES if word in name.casefold()), None)
        if kind and isinstance(value, str):
            yield normalise(value), kind


def _seeds(items: pl.DataFrame, views: Sequence[PageView]) -> dict[str, tuple[str, ...]]:
    named = items.select("item_id", "category_level2_name").iter_rows()
    categories = {item: normalise(name) for item, name in named if name != UNKNOWN}
    clicks: dict[str, Counter[str]] = defaultdict(Counter)
    for view in views:
        clicks[view.context.query].update(categories[i] for i in view.clicked if i in categories)
    return {
        query: tuple(name for name, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:MAX_SEEDS])
        for query, counts in sorted(clicks.items())
        if counts.total() >= MIN_SEED_CLICKS
    }
