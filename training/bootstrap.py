"""Pseudo-queries for a catalog without logs: recall rows marked `source = "bootstrap"`, user 0.

Each row starts at one item and takes words that a buyer of it might type: the product type (a phrase that titles or
descriptions of several brands share, so that a notebook described as a laptop is found by either name), the brand
alone, brand or attribute with the type, a model number, any one word, or some words of the title. Its clicked items
are a sample of all items that satisfy those words, likelier the better BM25 ranks them: what is shown first is clicked
first, and a shop without logs has shown what a lexical search ranks first. Drawing by item makes broad types recur, as
in real logs.
"""

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl
import typer

from onesearch.command import run
from onesearch.errors import ConfigError, DataError
from onesearch.progress import track
from onesearch.text import normalise
from training.baselines import Bm25
from training.columns import UNKNOWN
from training.tables import Tables, frame, load_tables, table_format, write_tables

MAX_TARGETS = 20
PER_ITEM = 2  # pseudo-queries for each item, unless told otherwise
KINDS = ("type", "maker", "brand", "attribute", "model", "word", "title")
SHARES = (0.34, 0.04, 0.13, 0.15, 0.10, 0.10, 0.14)
DESCRIBED_WORDS = 12  # of a description: these name the product
DESCRIBED_LATER = 1  # plain words by which a description is behind a title
TYPO_SHARE, PLURAL_SHARE = 0.04, 0.12
SPLITS = (("test", 0.05), ("valid", 0.10))  # upper bounds of a query's place in 0..1; the rest is train
MIN_PHRASE_ITEMS, MIN_PHRASE_BRANDS, MAX_PHRASE_SHARE = 4, 2, 0.5
NOUN_FOLLOWS = 20  # more than the plain words of a title
LEXICAL_WEIGHT = 2.0  # log-odds of a click for one unit of BM25
DESCRIPTION = "description"
# Others are short.
STOP_WORDS = frozenset(("and", "the", "for", "from", "with", "per", "set", "pack", "pcs", "inch"))
_WORD = re.compile(r"[^\W_]+(?:[-.'/+][^\W_]+)*")

Phrase = tuple[str, ...]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class _Item:
    """Words of one item: title without the brand, and the first of its description; labels are category names, values
    the attribute words that the title or description also says; `words` are the stems of all that is said about it.
    """

    brand: str
    title: Phrase
    described: Phrase
    labels: tuple[Phrase, ...]
    values: tuple[Phrase, ...]
    words: frozenset[str]


@dataclass(frozen=True)
class _Query:
    """Words to type; `phrase` are the stems of the product type they end in, empty if they have none."""

    text: str
    stems: frozenset[str]
    phrase: Phrase


def bootstrap(items: pl.DataFrame, seed: int, rows: int | None = None) -> pl.DataFrame:
    """Recall table of `rows` pseudo-sessions (default PER_ITEM for each item) over an items table.

    impressed = clicked, 1 to 20 item ids. The same words, also misspelt or in plural, are only ever in one split.
    """
    rng = np.random.default_rng(seed)
    catalog = _Catalog([_read(row) for row in items.iter_rows(named=True)])
    ids = items["item_id"].to_list()
    order = np.concatenate(
        [rng.permutation(len(ids)) for _ in range(-(-(rows or PER_ITEM * len(ids)) // len(ids)))]
    )
    columns: dict[str, list[object]] = defaultdict(list)
    for source in track(order[: rows or PER_ITEM * len(ids)].tolist(), "pseudo-queries"):
        query = catalog.query(source, rng)
        if query is None:
            continue
        targets = [ids[i] for i in catalog.targets(source, query, rng)]
        columns["query"].append(_rough(query, rng))
        columns["impressed_item_ids"].append(targets)
        columns["clicked_item_ids"].append(targets)
        columns["split"].append(_split(query.stems, seed))
    count = len(columns["query"])
    columns |= {"user_id": [0] * count, "source": ["bootstrap"] * count}
    columns |= {"session_id": list(range(1, count + 1)), "time_index": list(range(1, count + 1))}
    recall = frame("recall", columns)
    train = recall.filter(pl.col("split") == "train")["query"].unique()
    return recall.filter((pl.col("split") == "train") | ~pl.col("query").is_in(train.implode()))


class _Catalog:
    """Items with the postings that pseudo-queries are matched against."""

    def __init__(self, items: list[_Item]) -> None:
        self._items = items
        self._bm25 = Bm25([" ".join((item.brand, *item.title, *item.described)) for item in items])
        self._modifiers = _modifiers(items)
        self._postings: dict[str, set[int]] = defaultdict(set)
        self._phrases: dict[Phrase, dict[int, int]] = defaultdict(dict)  # phrase → item → lateness, see _find_runs
        self._matches: dict[_Query, tuple[Ints, Floats]] = {}
        self._runs = [list(self._find_runs(item)) for item in items]
        for index, item in enumerate(items):
            for word in item.words:
                self._postings[word].add(index)
            for _, late, phrase in self._runs[index]:
                found = self._phrases[phrase]
                found[index] = min(late, found.get(index, late))
        self._types = {phrase for phrase, found in self._phrases.items() if self._is_type(found)}

    def _is_type(self, found: dict[int, int]) -> bool:
        """A phrase that enough items share, still tells items apart, and often names the product of several brands."""
        if not MIN_PHRASE_ITEMS <= len(found) <= max(MIN_PHRASE_ITEMS, MAX_PHRASE_SHARE * len(self._items)):
            return False
        heads = [i for i, late in found.items() if late < NOUN_FOLLOWS]
        return 3 * len(heads) > len(found) and len({self._items[i].brand for i in heads}) >= MIN_PHRASE_BRANDS

    def _find_runs(self, item: _Item) -> Iterator[tuple[Phrase, int, Phrase]]:
        """Words, lateness and stems of the runs of one to three plain words that do not end in a modifier.

        Lateness counts the plain words before the run, more if a noun follows it: a `notebook case` is no notebook.
        """
        for text, later in ((item.title, 0), (item.described, DESCRIBED_LATER)):
            stems = tuple(map(_stem, text))
            plain = [_plain(stem) for stem in stems]
            before = [0, *accumulate(plain)]
            for start in range(len(plain)):
                for end in range(start + 1, min(start + 3, len(plain)) + 1):
                    if not plain[end - 1]:
                        break
                    if stems[end - 1] not in self._modifiers:
                        noun_follows = end < len(plain) and plain[end] and stems[end] not in self._modifiers
                        late = later + before[start] + NOUN_FOLLOWS * noun_follows
                        yield text[start:end], late, stems[start:end]

    def query(self, index: int, rng: np.random.Generator) -> _Query | None:
        """Words for one item, or None when it has too few."""
        item = self._items[index]
        kind = KINDS[int(np.searchsorted(np.cumsum(SHARES), rng.random()))]
        models = [w for w in item.title if len(w) > 3 and _has_digit(w) and not w[0].isdigit()]
        if kind == "model" and models:
            model = _one(models, rng)
            return _make((item.brand, model) if item.brand and rng.random() < 0.5 else (model,))
        if kind == "maker" and item.brand:
            return _make((item.brand,))
        if kind == "word":
            common = [word for word in (*item.title, *item.described) if self._is_common(_stem(word))]
            if common:
                word = _one(common, rng)
                return _make((word,), (_stem(word),))
        found = self._type(index, rng)
        if found is None or (kind == "title" and len(item.title) > 2):
            return _make(_some_words(item, rng)) if item.title else None
        words, phrase = found
        values = [v for v in item.values if not set(v) & set(words)]
        if kind == "brand" and item.brand:
            words = (item.brand, *words)
        elif kind == "attribute" and values:
            words = (*_one(values, rng), *words)
        return _make(words, phrase)

    def _is_common(self, stem: str) -> bool:
        return _plain(stem) and len(self._postings[stem]) >= MIN_PHRASE_ITEMS

    def _type(self, index: int, rng: np.random.Generator) -> tuple[Phrase, Phrase] | None:
        """A type phrase of the item as (surface words, stems); early and long ones are likelier, labels likeliest."""
        item = self._items[index]
        options = [(2.0, label, tuple(map(_stem, label))) for label in item.labels]
        for words, late, phrase in self._runs[index]:
            if phrase in self._types:
                options.append((math.exp(-late / 2) * len(phrase), words, phrase))
        if not options:
            return None
        bounds = np.cumsum([weight for weight, _, _ in options])
        _, words, phrase = options[int(np.searchsorted(bounds, rng.random() * bounds[-1]))]
        return words, phrase

    def targets(self, source: int, query: _Query, rng: np.random.Generator) -> list[int]:
        """Up to MAX_TARGETS items with all the query's words, the source first; those whose title is of the type
        phrase are preferred."""
        if query not in self._matches:
            self._matches[query] = self._match(query)
        found, weight = self._matches[query]
        best = np.argsort(-(weight + rng.gumbel(size=len(found))))[:MAX_TARGETS]
        return [source, *(i for i in found[best].tolist() if i != source)][:MAX_TARGETS]

    def _match(self, query: _Query) -> tuple[Ints, Floats]:
        found = set.intersection(*(self._postings[stem] for stem in query.stems))
        late = self._phrases.get(query.phrase, {})
        strict = found & late.keys()
        items = sorted(strict if len(strict) > 1 else found)
        lateness = np.array([late.get(i, NOUN_FOLLOWS) for i in items])
        lexical = self._bm25.scores_at(query.text, np.array(items))
        return np.array(items), np.log(0.02 + np.exp(-lateness / 2)) + LEXICAL_WEIGHT * lexical


def _modifiers(items: list[_Item]) -> set[str]:
    """Words that describe rather than name: common one-word attribute values (`black`, `original`) that are no
    category, and units, which follow a number more often than not."""
    labels = {_stem(label[-1]) for item in items for label in item.labels}
    values = Counter(_stem(value[0]) for item in items for value in item.values if len(value) == 1)
    seen: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for item in items:
        stems = tuple(map(_stem, item.title))
        seen.update(stems)
        counted.update(word for number, word in pairwise(stems) if number.replace(".", "").isdigit())
    common = {word for word, count in values.items() if count >= MIN_PHRASE_ITEMS} - labels
    return common | {word for word, count in counted.items() if 2 * count > seen[word]}


def _read(row: dict[str, object]) -> _Item:
    """Split one item row into words."""
    brand = normalise(str(row["brand_name"])) if row["brand_name"] != UNKNOWN else ""
    attributes = orjson.loads(str(row["attributes"]))
    description = str(attributes.pop(DESCRIPTION, ""))
    names = [str(row[f"category_level{level}_name"]) for level in (3, 2, 1)]
    labels = tuple(words for name in names if name != UNKNOWN and (words := _words(name)))
    texts = [_words(value) for value in attributes.values() if isinstance(value, str)]
    brand_words = set(_words(brand))
    title = tuple(word for word in _words(str(row["item_title"])) if word not in brand_words)
    described = tuple(word for word in _words(description) if word not in brand_words)
    said = {_stem(word) for word in (*title, *described)}
    values = [text for text in texts if 0 < len(text) < 4 and not any(map(_has_digit, text))]
    everything = (*brand_words, *(word for text in (*labels, *texts) for word in text))
    return _Item(
        brand=brand,
        title=title,
        described=described[:DESCRIBED_WORDS],
        labels=labels,
        values=tuple(dict.fromkeys(value for value in values if said.issuperset(map(_stem, value)))),
        words=frozenset(said.union(map(_stem, everything))),
    )


def _plain(word: str) -> bool:
    return len(word) > 2 and word not in STOP_WORDS and not _has_digit(word)


def _has_digit(word: str) -> bool:
    return any(c.isdigit() for c in word)


def _one(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _words(text: str) -> Phrase:
    return tuple(_WORD.findall(normalise(text)))


def _stem(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith("ss"):
        return word
    return f"{word[:-3]}y" if word.endswith("ies") else word[:-1]


def _some_words(item: _Item, rng: np.random.Generator) -> Phrase:
    """Two to four of the first words of a title, in order, bits of one or two letters left out if possible."""
    head = [word for word in item.title if len(word) > 2][:8] or item.title
    count = min(len(head), int(rng.integers(2, 5)))
    return tuple(head[i] for i in sorted(rng.choice(len(head), count, replace=False)))


def _make(words: Iterable[str], phrase: Phrase = ()) -> _Query:
    text = " ".join(dict.fromkeys(words))
    return _Query(text, frozenset(map(_stem, _words(text))), phrase)


def _rough(query: _Query, rng: np.random.Generator) -> str:
    """As people type: sometimes the product type in the other number, rarely a letter dropped or doubled."""
    text = query.text
    if query.phrase and rng.random() < PLURAL_SHARE and text[-1].isalpha():
        singular = _stem(text)
        text = singular if singular != text else f"{text}s"
    if rng.random() < TYPO_SHARE and len(text) > 5:
        at = int(rng.integers(1, len(text) - 1))
        if text[at].isalpha():
            text = text[:at] + text[at] * int(rng.integers(2) * 2) + text[at + 1 :]
    return text


def _split(stems: frozenset[str], seed: int) -> str:
    place = zlib.crc32(f"{seed} {' '.join(sorted(stems))}".encode()) / 2**32
    return next((split for split, bound in SPLITS if place < bound), "train")


def with_queries(tables: Tables, allowed: bool, seed: int, per_item: int = PER_ITEM) -> Tables:
    """Tables as they are, or with pseudo-queries when they hold no sessions and `allowed` (a recipe's data.bootstrap).

    per_item is their number for each item. Equal items and seed give equal queries and splits. Raises ConfigError when
    sessions are missing otherwise.
    """
    if tables.recall is not None and len(tables.recall):
        return tables
    if not allowed:
        raise ConfigError("data.bootstrap: false, but the tables hold no recall sessions")
    return replace(tables, recall=bootstrap(tables.items, seed, per_item * len(tables.items)))


def _command(
    directory: Annotated[Path, typer.Argument(help="Tables with an items file; recall is written beside it.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    rows: Annotated[int | None, typer.Option(min=1, help="Pseudo-sessions; default two per item.")] = None,
) -> None:
    """Give a catalog without logs a recall table of pseudo-queries."""
    tables = load_tables(directory)
    if tables.recall is not None:
        raise DataError(str(directory), ["has a recall table already; remove it first"])
    recall = bootstrap(tables.items, seed, rows)
    write_tables(replace(tables, recall=recall), directory, table_format(directory))
    counts = ", ".join(f"{n} {split}" for split, n in recall["split"].value_counts(sort=True).iter_rows())
    typer.echo(f"{len(recall)} pseudo-sessions ({counts}), {recall['query'].n_unique()} distinct queries")


if __name__ == "__main__":
    run(_command)
