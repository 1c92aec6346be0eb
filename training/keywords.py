"""Mines keyword rules from a catalog and its training log: the rule-based provider of spec §4.6.6 (b).

Dictionary phrases carry one of the 18 attribute types (spec §3.2): brands, sellers, categories and attribute values
say their type themselves; short title segments are Marketing when every department uses them, else Modifiers when
people also type them; a frequent query whose clicks spread over several categories is a Scene. Phrases are ranked by
clicks on the items that carry them and the head is kept. Seeds of a frequent query are the categories its users
clicked, strongest first. Only page views of the training split are read.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import orjson
import polars as pl

from onesearch.keywords import KeywordRules
from onesearch.text import normalise, words
from training.columns import UNKNOWN
from training.sessions import PageView

MIN_SEED_CLICKS = 3
MAX_SEEDS = 3
MAX_PHRASE_CHARS = 30
MAX_PHRASES = 50_000
_SEGMENT_WORDS = 3
_NO_BRAND = {"", "unknown", "其他", "其他/other", "other", "无品牌", "无品牌/无注册商标"}
# Attribute names of shops vary; a name that holds one of these words gives phrases of that type.
_ATTRIBUTE_TYPES = {
    **dict.fromkeys(("colour", "color", "颜色"), "Color"),
    **dict.fromkeys(("material", "fabric", "材质"), "Material"),
    **dict.fromkeys(("style", "风格"), "Style"),
    **dict.fromkeys(("season", "季节"), "Season"),
    **dict.fromkeys(("audience", "gender", "人群"), "Audience"),
    **dict.fromkeys(("pattern", "图案"), "Pattern"),
    **dict.fromkeys(("feature", "function", "功能"), "Function"),
    **dict.fromkeys(("occasion", "scene", "场景"), "Scene"),
    **dict.fromkeys(("size", "capacity", "weight", "规格"), "Specifications"),
    **dict.fromkeys(("origin", "location", "产地"), "Location"),
    **dict.fromkeys(("series", "系列"), "Series"),
    **dict.fromkeys(("model", "型号"), "Model"),
    **dict.fromkeys(("price", "价格"), "Price"),
    **dict.fromkeys(("type", "类型"), "Entity"),
}


def mine_keywords(items: pl.DataFrame, views: Sequence[PageView], min_items: int) -> KeywordRules:
    """Rules from items and page views; a phrase needs `min_items` items (a Scene: page views) for the dictionary."""
    clicks = Counter(item for view in views for item in view.clicked)
    carriers: Counter[tuple[str, str]] = Counter()
    weight: Counter[tuple[str, str]] = Counter()
    for row in items.iter_rows(named=True):
        for pair in set(_phrases(row)):
            carriers[pair] += 1
            weight[pair] += 1 + clicks[row["item_id"]]
    kept = [pair for pair, count in carriers.items() if count >= min_items]
    for phrase, count, kind in _segments(items, views, min_items):
        weight[phrase, kind] += count
        kept.append((phrase, kind))
    for query, count in _scenes(items, views, min_items):
        weight[query, "Scene"] += count
        kept.append((query, "Scene"))
    types: dict[str, str] = {}
    for phrase, kind in sorted(kept, key=lambda pair: (-weight[pair], pair)):
        if 1 < len(phrase) <= MAX_PHRASE_CHARS and len(types) < MAX_PHRASES:
            types.setdefault(phrase, kind)  # a phrase has one type, that of most clicks
    return KeywordRules(types, _seeds(items, views))


def _phrases(row: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    brand = normalise(str(row["brand_name"]))
    if brand not in _NO_BRAND:
        yield brand, "Brand"
    if (seller := normalise(str(row["seller_name"]))) not in _NO_BRAND:
        yield seller, "Anchor"
    for level in (1, 2, 3):
        if (name := str(row[f"category_level{level}_name"])) != UNKNOWN:
            yield normalise(name), "Entity"
    for name, value in orjson.loads(str(row["attributes"])).items():
        kind = next((kind for word, kind in _ATTRIBUTE_TYPES.items() if word in name.casefold()), None)
        if kind and isinstance(value, str):
            for part in value.split(","):
                yield normalise(part), kind


def _segments(items: pl.DataFrame, views: Sequence[PageView], min_items: int) -> Iterator[tuple[str, int, str]]:
    """Short comma-separated parts of titles that are no attribute: phrase, items that carry it, type."""
    carried: dict[str, set[str]] = defaultdict(set)
    count: Counter[str] = Counter()
    known: set[str] = set()
    for row in items.iter_rows(named=True):
        known.update(phrase for phrase, _ in _phrases(row))
        for part in {normalise(part) for part in str(row["item_title"]).split(",")[1:]}:
            if 0 < len(words(part)) <= _SEGMENT_WORDS:
                carried[part].add(str(row["category_level1_name"]))
                count[part] += 1
    departments = items["category_level1_name"].n_unique()
    asked = {query for view in views for query in _runs(view.context.query)}
    for phrase, where in sorted(carried.items()):
        if phrase in known or count[phrase] < min_items:
            continue
        if departments > 1 and len(where) == departments and phrase not in asked:
            yield phrase, count[phrase], "Marketing"
        elif phrase in asked:
            yield phrase, count[phrase], "Modifier"


def _runs(text: str) -> set[str]:
    """All runs of at most _SEGMENT_WORDS words of a text."""
    parts = words(text)
    return {
        " ".join(parts[i:j])
        for i in range(len(parts))
        for j in range(i + 1, min(i + _SEGMENT_WORDS, len(parts)) + 1)
    }


def _scenes(items: pl.DataFrame, views: Sequence[PageView], min_views: int) -> Iterator[tuple[str, int]]:
    """Queries asked often whose clicks spread over several leaf categories, with how often they were asked."""
    asked = Counter(view.context.query for view in views)
    leaf = dict(items.select("item_id", "category_level3_name").iter_rows())
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for view in views:
        found[view.context.query].update(leaf[item] for item in view.clicked if item in leaf)
    for query, count in sorted(asked.items()):
        leaves = found[query]
        if count >= min_views and leaves and leaves.most_common(1)[0][1] <= leaves.total() / 2:
            yield query, count


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
