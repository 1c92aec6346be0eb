"""How far results reach over what a query asks for: its keywords against the items shown (spec §5.2).

The paper's claim of breadth is that "hotel essentials" also yields slippers. An item holds a keyword when every word of
the keyword is a word of its title, brand, categories or attribute values.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from onesearch.catalog import Catalog
from onesearch.keywords import KeywordRules
from onesearch.text import words
from training.baselines import item_text
from training.metrics import Floats, Measured, Rows, compare
from training.oracle import read_wants
from training.subject import item_bodies

KeywordsOf = Callable[[str], tuple[str, ...]]  # normalised query → what it asks for, best first
_TOP = 10


def read_keywords(data: Path, rules: KeywordRules) -> tuple[str, KeywordsOf]:
    """Who says what a query asks for, and what: the truth of a simulation where it is there, else a bundle's rules."""
    if not (data / "truth" / "needs.parquet").exists():
        return "rules", rules.match
    wants = read_wants(data)
    return "truth", lambda query: tuple(phrase for _, phrase in wants.get(query, ()))


def measure_overlap(
    queries: Sequence[str],
    ranked: Mapping[str, Sequence[Rows]],
    catalog: Catalog,
    keywords_of: KeywordsOf,
    subject: str,
    seed: int,
) -> list[Measured]:
    """Two shares, means over the page views whose query has keywords; ranked[system][i] answers queries[i].

    keyword overlap@10: of the top 10 (of what there is, if less), the items that hold at least one of the keywords.
    keyword breadth@10: of the keywords, those that at least one item of the top 10 holds. Without results both are 0.
    """
    wanted = {query: [set(words(keyword)) for keyword in keywords_of(query)] for query in dict.fromkeys(queries)}
    asked = [i for i, query in enumerate(queries) if wanted[query]]
    texts = [set(words(" ".join([item_text(b), b["brand"] or "", *b["category"]]))) for b in item_bodies(catalog)]

    def shares(rows: Rows, keywords: Sequence[set[str]]) -> tuple[float, float]:
        held = np.asarray([[keyword <= texts[row] for keyword in keywords] for row in rows[:_TOP].tolist()])
        return (float(held.any(axis=1).mean()), float(held.any(axis=0).mean())) if len(held) else (0.0, 0.0)

    found: dict[str, Floats] = {
        system: np.asarray([shares(lists[i], wanted[queries[i]]) for i in asked]).reshape(-1, 2)
        for system, lists in ranked.items()
    }
    names = (f"keyword overlap@{_TOP}", f"keyword breadth@{_TOP}")
    values = {name: {system: both[:, at] for system, both in found.items()} for at, name in enumerate(names)}
    return compare("queries with keywords", values, subject, seed)
