"""Do results show what a query excludes ("lamp but not red")? Known only for a simulated marketplace, which writes the
truth behind its queries beside its tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl

from onesearch.catalog import Catalog
from onesearch.text import normalise
from training.metrics import Measured, Rows, compare
from training.subject import item_bodies

Exclusions = tuple[tuple[str, str], ...]  # (attribute name, value) pairs
_TOP = 10


def read_negations(data: Path) -> dict[str, Exclusions]:
    """Normalised query → what it excludes, from `data/truth`; empty when the tables come without their truth."""
    needs, queries = data / "truth" / "needs.parquet", data / "truth" / "queries.parquet"
    if not needs.exists() or not queries.exists():
        return {}
    negations = pl.read_parquet(needs).filter(pl.col("kind") == "negation")
    rows = pl.read_parquet(queries).join(negations, on="need_id").select("query", "negated").iter_rows()
    return {normalise(q): tuple((c["axis"], c["value"]) for c in orjson.loads(negated)) for q, negated in rows}


def shows(body: Mapping[str, Any], excluded: Exclusions) -> bool:
    """Whether an item shows an excluded value, a brand or one of the comma-separated values of an attribute."""
    values = {"brand": body["brand"] or "", **body["attributes"]}
    return any(value in str(values.get(name, "")).split(", ") for name, value in excluded)


def measure_violations(
    queries: Sequence[str],
    ranked: Mapping[str, Sequence[Rows]],
    catalog: Catalog,
    negations: Mapping[str, Exclusions],
    subject: str,
    seed: int,
) -> list[Measured]:
    """Share of the top 10 that shows an excluded value, over the queries with a negation; lower is better.

    ranked[system][i] answers queries[i]. An empty list violates nothing.
    """
    asked = [i for i, query in enumerate(queries) if query in negations]
    bodies = item_bodies(catalog) if asked else []

    def share(rows: Rows, excluded: Exclusions) -> float:
        shown = [shows(bodies[row], excluded) for row in rows[:_TOP].tolist()]
        return sum(shown) / max(1, len(shown))

    values = {
        system: np.asarray([share(lists[i], negations[queries[i]]) for i in asked])
        for system, lists in ranked.items()
    }
    return compare("queries with a negation", {f"violations@{_TOP}": values}, subject, seed)
