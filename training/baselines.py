"""What the model is compared with: BM25 over item text, and popularity within the query's category.

Both rank the rows of the same catalog as the model and are deterministic: equal scores go to the smaller row.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import bm25s
import numpy as np
import numpy.typing as npt

from onesearch.text import normalise, words
from training.metrics import Rows, top_rows


class Baseline(Protocol):
    """Ranks catalog rows for a query."""

    def top(self, query: str, count: int) -> Rows:
        """At most `count` rows, best first, int64."""
        ...


def item_text(body: Mapping[str, Any], attributes: Collection[str] | None = None) -> str:
    """Title and attribute values of a public item body; `attributes` names the ones to use, None means all.

    True and false say nothing without their name and are left out.
    """
    chosen = body["attributes"] if attributes is None else {k: body["attributes"].get(k, "") for k in attributes}
    return " ".join([body["title"], *(str(v) for v in chosen.values() if not isinstance(v, bool))])


class Bm25:
    """BM25 (bm25s, Lucene's form, k1 1.5, b 0.75) over texts, one per catalog row; only matching rows are ranked."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._index = bm25s.BM25()
        self._index.index([words(text) for text in texts], show_progress=False)

    def top(self, query: str, count: int) -> Rows:
        """At most `count` rows that share a word with the query, best first."""
        known = [word for word in words(query) if word in self._index.vocab_dict]
        if not known:
            return np.empty(0, dtype=np.int64)
        scores: npt.NDArray[np.float32] = self._index.get_scores(known)
        best = top_rows(scores, count)
        return best[scores[best] > 0]

    def scores_at(self, query: str, rows: Rows) -> npt.NDArray[np.float32]:
        """Scores of some rows, int64 [n] without repeats, float32 [n]; costs the postings of the query's words."""
        postings, scores = self._index.scores, np.zeros(len(rows), dtype=np.float32)
        for word in words(query):
            if word in self._index.vocab_dict:
                token = self._index.vocab_dict[word]
                span = slice(postings["indptr"][token], postings["indptr"][token + 1])
                _, found, at = np.intersect1d(rows, postings["indices"][span], return_indices=True)
                scores[found] += postings["data"][span][at]
        return scores


class CategoryPopularity:
    """Items of the query's category by clicks in the training logs; it knows the user as little as BM25 does.

    The category is the one clicked most for this query in training, else that of BM25's first result, else the whole
    catalog.
    """

    def __init__(
        self,
        categories: Sequence[str],
        clicked: Mapping[str, Counter[int]],
        bm25: Baseline,
    ) -> None:
        """categories: one per row. clicked: normalised query → training clicks per row."""
        self._categories = categories
        self._bm25 = bm25
        self._by_query = {query: self._most_clicked(rows) for query, rows in clicked.items()}
        clicks = np.zeros(len(categories), dtype=np.int64)
        for rows in clicked.values():
            for row, count in rows.items():
                clicks[row] += count
        self._all = top_rows(clicks, len(clicks))
        self._ranked: dict[str, list[int]] = {}
        for row in self._all.tolist():
            self._ranked.setdefault(categories[row], []).append(row)

    def top(self, query: str, count: int) -> Rows:
        """At most `count` rows of one category, most clicked first."""
        category = self.category(query)
        rows = self._all if category is None else np.asarray(self._ranked[category], dtype=np.int64)
        return rows[:count]

    def category(self, query: str) -> str | None:
        """The category a query is taken to mean; None when neither the logs nor BM25 know it."""
        known = self._by_query.get(normalise(query))
        if known is None:
            first = self._bm25.top(query, 1)
            known = self._categories[int(first[0])] if len(first) else None
        return known

    def _most_clicked(self, rows: Counter[int]) -> str | None:
        clicks: Counter[str] = Counter()
        for row, count in rows.items():
            clicks[self._categories[row]] += count
        return min(clicks, key=lambda name: (-clicks[name], name)) if clicks else None
