"""Mines keyword rules from a catalog and its training log: the rule-based provider of spec §4.6.6 (b).

Dictionary phrases carry one of the 18 attribute types (spec §3.2): brands, sellers, categories and attribute values
say their type themselves; short title segments are Marketing when every department uses them, else Modifiers when
people also type them; a frequent query whose clicks spread over several categories is a Scene. Phrases are ranked by
clicks on the items that carry them and the head is kept. Seeds of a frequent query are the phrases that go with its
clicks, words of a leaf category the attribute values that go with its items, both by pointwise mutual information.
Page views of other splits than training are never read.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import orjson
import polars as pl

from onesearch.keywords import KeywordRules
from onesearch.text import normalise, words
from training.columns import UNKNOWN
from training.sessions import PageView

MIN_SEED_CLICKS = 5  # of a query that gets seeds
MIN_PAIR_CLICKS = 2  # of a query on items with the phrase
MAX_SEEDS, MAX_WORDS = 4, 2
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
_NO_SEEDS = {"Anchor", "Marketing", "Price"}  # say nothing of what is wanted
_WORD_TYPES = {"Color", "Material", "Style", "Season", "Audience", "Pattern", "Function"}


def mine_keywords(items: pl.DataFrame, views: Sequence[PageView], min_items: int) -> KeywordRules:
    """Rules from items and page views; a phrase needs `min_items` items (a Scene: page views) for the dictionary."""
    views = [view for view in views if view.split == "train"]
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
    carried = {row["item_id"]: _describing(row, types) for row in items.iter_rows(named=True)}
    return KeywordRules(types, _seeds(views, carried), _words(items, clicks, carried, types))


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


def _describing(row: Mapping[str, object], types: Mapping[str, str]) -> set[str]:
    """Phrases of the dictionary that tell what an item is; of its categories the leaf alone."""
    names = [normalise(str(row[f"category_level{level}_name"])) for level in (1, 2, 3)]
    known = [name for name in names if name != normalise(UNKNOWN)]
    phrases = {p for p, kind in _phrases(row) if types.get(p) == kind and kind not in _NO_SEEDS}
    return phrases - (set(known) - set(known[-1:]))


def _seeds(views: Sequence[PageView], carried: Mapping[int, set[str]]) -> dict[str, tuple[str, ...]]:
    """Query → phrases of the items clicked for it."""
    clicked = Counter((view.context.query, item) for view in views for item in view.clicked if item in carried)
    found = associated(((query, carried[item], n) for (query, item), n in clicked.items()), MIN_PAIR_CLICKS)
    asked: Counter[str] = Counter()
    for (query, _), n in clicked.items():
        asked[query] += n
    return {q: found[q][:MAX_SEEDS] for q in sorted(found) if asked[q] >= MIN_SEED_CLICKS and found[q]}


def _words(
    items: pl.DataFrame, clicks: Mapping[int, int], carried: Mapping[int, set[str]], types: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Leaf category → attribute values of its items; an item counts once and once more with every click."""
    groups = [
        (leaf, {p for p in carried[item] if types[p] in _WORD_TYPES}, 1 + clicks[item])
        for item, *names in items.select("item_id", *(f"category_level{n}_name" for n in (1, 2, 3))).iter_rows()
        for leaf in [normalise(name) for name in names if name != UNKNOWN][-1:]
    ]
    found = associated(groups, MIN_PAIR_CLICKS)
    return {leaf: found[leaf][:MAX_WORDS] for leaf in sorted(found) if found[leaf]}


def associated(groups: Iterable[tuple[str, Iterable[str], int]], least: int) -> dict[str, tuple[str, ...]]:
    """Phrases that go with a key, strongest first: those seen with it at least `least` times and more than by chance.

    groups: key, its phrases and how often. With n events of N for the pair, n_k for the key and n_p for the phrase, the
    pointwise mutual information is ln(n N / (n_k n_p)), and its strength n times that: what the pair adds to
    the mutual information, so that rare pairs do not win by chance (spec §4.6.6 (b)).
    """
    of_key: Counter[str] = Counter()
    of_phrase: Counter[str] = Counter()
    of_pair: dict[str, Counter[str]] = defaultdict(Counter)
    for key, phrases, times in groups:
        of_key[key] += times
        for phrase in phrases:
            of_phrase[phrase] += times
            of_pair[key][phrase] += times
    total = of_key.total()
    found: dict[str, tuple[str, ...]] = {}
    for key, pairs in of_pair.items():
        strength = {
            p: n * math.log(n * total / (of_key[key] * of_phrase[p])) for p, n in pairs.items() if n >= least
        }
        kept = [phrase for phrase, value in strength.items() if value > 0]
        found[key] = tuple(sorted(kept, key=lambda phrase: (-strength[phrase], phrase)))
    return found
