"""Human ratings: reading them, and what they say of ranked lists. One JSON object {query, item_id, rating} a line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from onesearch.catalog import Catalog
from onesearch.context import SearchContext
from onesearch.errors import DataError
from onesearch.text import normalise
from training.baselines import Bm25, item_text
from training.metrics import RELEVANT, Measured, Rows, compare, graded
from training.subject import BM25, MODEL, Report, Subject, item_bodies, measure_validity, rank, sample

_MAX_FAULTS = 50
_EXPECTED = {"query": "a non-empty string", "item_id": "an integer >= 0", "rating": "an integer >= 0"}


@dataclass(frozen=True)
class Judgements:
    """queries in order of first appearance; ratings[i] maps item ids to the ratings ≥ 0 of query i."""

    queries: tuple[str, ...]
    ratings: tuple[Mapping[int, int], ...]
    repeated: int

    def by_row(self, catalog: Catalog) -> tuple[list[dict[int, int]], int]:
        """Ratings by catalog row, and how many name an item the catalog lacks.

        Those keep a negative number in place of a row: nothing can find them, and they still count as relevant.
        """
        rated: list[dict[int, int]] = []
        for judged in self.ratings:
            rows = [catalog.row_of(item) for item in judged]
            keys = [-1 - i if row is None else row for i, row in enumerate(rows)]
            rated.append(dict(zip(keys, judged.values(), strict=True)))
        return rated, sum(row < 0 for rows in rated for row in rows)


def read_judgements(path: Path) -> Judgements:
    """Read a file of ratings; queries are normalised. Raises DataError listing its faults, at most 50.

    The same rating given twice is counted, two different ratings of one pair are a fault.
    """
    faults: list[str] = []
    found: dict[str, dict[int, int]] = {}
    repeated = 0
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(str(path), [f"cannot be read ({error.strerror})"]) from error
    for number, line in enumerate(lines, 1):
        row, fault = _parse(line)
        if row is None:
            faults.append(f"line {number}: {fault}")
            continue
        query, item, rating = normalise(row["query"]), row["item_id"], row["rating"]
        before = found.setdefault(query, {}).setdefault(item, rating)
        if before != rating:
            faults.append(f"line {number}: rating: {rating} for item {item} of {query!r}, rated {before} before")
        repeated += before == rating
    if not lines:
        faults.append("no lines, expected at least one rating")
    if faults:
        more = len(faults) - _MAX_FAULTS
        raise DataError(str(path), faults[:_MAX_FAULTS] + ([f"and {more} more"] if more > 0 else []))
    total = sum(map(len, found.values()))
    return Judgements(tuple(found), tuple(found.values()), repeated - total)


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return None, f"{line[:40]!r} is not JSON ({error})"
    if not isinstance(row, dict) or row.keys() != _EXPECTED.keys():
        return None, f"{line[:60]!r}, expected an object with exactly {', '.join(_EXPECTED)}"
    for name, expected in _EXPECTED.items():
        value = row[name]
        if not (_is_text(value) if name == "query" else _is_count(value)):
            return None, f"{name}: {value!r}, expected {expected}"
    return row, ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(normalise(value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def evaluate_judgements(subject: Subject, judgements: Judgements, max_requests: int | None, seed: int) -> Report:
    """Graded measures and valid-SID rate on rated queries, beside BM25 on title and short description."""
    ratings, unknown = judgements.by_row(subject.catalog)
    chosen = sample(range(len(ratings)), max_requests, seed)
    contexts = [SearchContext(judgements.queries[i]) for i in chosen]
    texts = [item_text(body, ("description",)) for body in item_bodies(subject.catalog)]
    ranking = rank(subject, contexts, {BM25: Bm25(texts)})
    measured = measure_judged([ratings[i] for i in chosen], ranking.rows, MODEL, seed)
    facts = ranking.facts | {
        "rated_queries": len(ratings),
        "rated_queries_asked": len(chosen),
        "ratings": sum(map(len, ratings)),
        "ratings_repeated": judgements.repeated,
        "ratings_of_items_not_in_catalog": unknown,
    }
    return Report(measured + measure_validity(subject, contexts, seed), facts)


def measure_judged(
    ratings: Sequence[Mapping[int, int]], ranked: Mapping[str, Sequence[Rows]], subject: str, seed: int
) -> list[Measured]:
    """Graded measures of every system on the queries that have a relevant item, and on all queries.

    A query without any relevant item scores 0 for every system, so the second slice only rescales the first; it is
    there because published numbers use either.
    """
    values = {system: graded(ratings, lists) for system, lists in ranked.items()}
    relevant = np.asarray([any(rating >= RELEVANT for rating in judged.values()) for judged in ratings])
    slices = {"queries with a positive": relevant, "all judged queries": np.ones_like(relevant)}
    measures = next(iter(values.values()))
    return [
        row
        for name, keep in slices.items()
        for row in compare(name, {m: {s: v[m][keep] for s, v in values.items()} for m in measures}, subject, seed)
    ]
