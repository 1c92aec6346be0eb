"""Four-tier relevance of every item to a query, as labels of an evaluation (spec §5.2, §9.3).

A simulated marketplace writes its truth beside its tables, which grades the whole catalog: 3 every constraint of the
need holds, 2 its product type holds, 1 its department, 0 neither or an excluded value is shown (a price tier, which "a
cheaper dupe" excludes, is in no table and lowers nothing). Other tables have the pairs of their relevance table; what
was not judged counts 0. Legend: N items.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
import polars as pl

from onesearch.catalog import Catalog
from onesearch.text import normalise
from training.metrics import Floats, Measured, Rows, compare, ndcg
from training.negation import shows
from training.subject import item_bodies

Grades = npt.NDArray[np.int64]
Grader = Callable[[str], Grades | None]  # normalised query → int64 [N] by catalog row; None when it has no labels
_TOP = 10


@dataclass(frozen=True)
class _Need:
    types: frozenset[str]
    eligible: tuple[int, ...]
    negated: tuple[tuple[str, str], ...]


def read_grades(data: Path, relevance: pl.DataFrame | None, catalog: Catalog) -> Grader:
    """Labels from `data/truth` if it is there, else from the relevance table, else none."""
    needs = _read_needs(data / "truth")
    if needs:
        return _truth_grader(needs, catalog)
    if relevance is not None:
        return _judged_grader(relevance, catalog)
    return lambda query: None


def measure_relevance(
    queries: Sequence[str], ranked: Mapping[str, Sequence[Rows]], grader: Grader, subject: str, seed: int
) -> list[Measured]:
    """nDCG@10 (gain = grade) over the page views whose query has an item graded above 0; all items count as ideal."""
    asked = {
        query: found for query in dict.fromkeys(queries) if (found := grader(query)) is not None and found.any()
    }
    values: dict[str, Floats] = {
        system: np.asarray(
            [ndcg(rows, asked[query], _TOP) for query, rows in zip(queries, lists, strict=True) if query in asked]
        )
        for system, lists in ranked.items()
    }
    return compare("queries with relevance labels", {f"nDCG@{_TOP}": values}, subject, seed)


def _truth_grader(needs: Mapping[str, _Need], catalog: Catalog) -> Grader:
    bodies = item_bodies(catalog)
    types, type_of = np.unique([(body["category"] or [""])[-1] for body in bodies], return_inverse=True)
    _, department_of = np.unique([(body["category"] or [""])[0] for body in bodies], return_inverse=True)

    def grade(query: str) -> Grades | None:
        need = needs.get(query)
        if need is None:
            return None
        same_type = np.isin(type_of, np.flatnonzero(np.isin(types, list(need.types))))
        grades = np.isin(department_of, department_of[same_type]).astype(np.int64)
        grades[same_type] = 2
        grades[catalog.rows_of(need.eligible)] = 3
        if need.negated:
            excluded = np.asarray([shows(body, need.negated) for body in bodies])
            grades[excluded] = 0
        return grades

    return grade


def _judged_grader(relevance: pl.DataFrame, catalog: Catalog) -> Grader:
    judged: dict[str, dict[int, int]] = {}
    for query, item, score in relevance.select("query", "item_id", "score").iter_rows():
        row = None if item is None else catalog.row_of(item)
        if row is not None:
            judged.setdefault(normalise(query), {})[row] = int(score)

    def grade(query: str) -> Grades | None:
        if query not in judged:
            return None
        grades = np.zeros(catalog.num_items, dtype=np.int64)
        grades[list(judged[query])] = list(judged[query].values())
        return grades

    return grade


def _read_needs(truth: Path) -> dict[str, _Need]:
    """Normalised query → need; empty when the tables come without their truth."""
    needs, queries = truth / "needs.parquet", truth / "queries.parquet"
    if not needs.exists() or not queries.exists():
        return {}
    found = pl.read_parquet(needs)
    if not {"wants", "negated", "item_ids"} <= set(found.columns):
        return {}
    rows = pl.read_parquet(queries).join(found, on="need_id").select("query", "wants", "negated", "item_ids")
    return {
        normalise(query): _Need(
            frozenset(want["type"] for want in orjson.loads(wants)),
            tuple(items),
            tuple((c["axis"], c["value"]) for c in orjson.loads(negated)),
        )
        for query, wants, negated, items in rows.iter_rows()
    }
