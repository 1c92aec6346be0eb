"""The system under test and what every evaluation does with it: rank requests beside baselines, count valid beams."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import orjson

from onesearch.catalog import Catalog
from onesearch.context import SearchContext
from onesearch.decode import StepFn
from onesearch.progress import track
from onesearch.search import SearchOptions, SearchResult
from training.baselines import Baseline
from training.metrics import Floats, Measured, Rows, compare, free_beams, valid_share
from trie import SidTrie

MODEL, BM25, POPULARITY = "model", "bm25", "popularity"
DEPTH = 100  # items a baseline is asked for; no cutoff goes deeper
VALIDITY_REQUESTS = 500  # free beam search runs on at most so many requests
_VALIDITY_CUTOFFS = (10, 100)

T = TypeVar("T")


class ItemSearch(Protocol):
    """The one method of `Searcher` that evaluation needs."""

    def search(self, context: SearchContext, options: SearchOptions) -> SearchResult:
        """Ranked catalog rows of a context."""
        ...


@dataclass(frozen=True)
class Subject:
    """The system under test. free starts the model on a context, for beam search without the trie."""

    searcher: ItemSearch
    free: Callable[[SearchContext], StepFn]
    catalog: Catalog
    trie: SidTrie
    options: SearchOptions


@dataclass(frozen=True)
class Report:
    """facts: what was run and counted; measured: the numbers; units: what they are means of, to compare reports by."""

    measured: list[Measured]
    facts: dict[str, Any] = field(default_factory=dict)
    units: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ranking:
    """rows: each system's rows per context. scores: the model's scores of its rows. facts: the model's search time."""

    rows: dict[str, list[Rows]]
    scores: list[Floats]
    facts: dict[str, Any]


def rank(subject: Subject, contexts: Sequence[SearchContext], baselines: Mapping[str, Baseline]) -> Ranking:
    """Ask every system every context."""
    results = [subject.searcher.search(context, subject.options) for context in track(contexts, "search")]
    ranked = {MODEL: [result.rows for result in results]}
    queries = list(dict.fromkeys(context.query for context in contexts))
    for name, baseline in baselines.items():
        answers = {query: baseline.top(query, DEPTH) for query in track(queries, name)}
        ranked[name] = [answers[context.query] for context in contexts]
    times = [sum(result.timings_ms.values()) for result in results]
    p50, p95 = np.percentile(times, [50, 95])
    facts = {"search_ms": {"p50": round(float(p50), 1), "p95": round(float(p95), 1)}}
    return Ranking(ranked, [np.asarray(result.scores, dtype=np.float64) for result in results], facts)


def measure_validity(subject: Subject, contexts: Sequence[SearchContext], seed: int) -> list[Measured]:
    """Share of the first 10 and 100 beams without the trie that name a live SID, on at most VALIDITY_REQUESTS.

    The free beams are as wide as the searches, but never narrower than the cutoffs.
    """
    shares: dict[int, list[float]] = {n: [] for n in _VALIDITY_CUTOFFS}
    most = max(_VALIDITY_CUTOFFS)
    for context in track(sample(contexts, VALIDITY_REQUESTS, seed), "free beams"):
        codes = free_beams(subject.free(context), subject.trie.sizes, max(subject.options.width, most), most)
        for n, found in shares.items():
            found.append(valid_share(codes, subject.trie.contains, n))
    values = {f"valid SID@{n}": {MODEL: np.asarray(found)} for n, found in shares.items()}
    return compare("beams without the trie", values, MODEL, seed)


def sample(population: Sequence[T], count: int | None, seed: int) -> list[T]:
    """At most `count` members in their own order, drawn by seed."""
    if count is None or count >= len(population):
        return list(population)
    chosen = np.random.default_rng(seed).choice(len(population), count, replace=False)
    return [population[i] for i in np.sort(chosen)]


def item_bodies(catalog: Catalog) -> list[dict[str, Any]]:
    """Public fields of every item, in row order."""
    return [orjson.loads(catalog.item_json(row)) for row in range(catalog.num_items)]
