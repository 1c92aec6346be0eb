"""Training samples of stages 1–3 (spec §4.1–4.3): which fields of what the model reads, and what it must write.

Every sample is rendered by the one renderer. A sample is a prompt, target ids and a weight; samples of one task
are kept together because a batch holds one task.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from onesearch.context import ContextEncoder
from onesearch.keywords import KeywordRules
from onesearch.sequence import Fields, Prompt, Renderer
from onesearch.sid import Codes
from training.columns import UNKNOWN
from training.sessions import PageView

T = TypeVar("T")

MAX_POSITIVES = 5
ORDER_WEIGHT = 2.0


@dataclass(frozen=True)
class Sample:
    """prompt ids int64 [S] with history vectors, target ids int64 [T], loss weight."""

    prompt: Prompt
    target: npt.NDArray[np.int64]
    weight: float


@dataclass(frozen=True)
class Sources:
    """Everything samples are made of. item_sids: item id → uint16 [L]; query_sids: query → uint16 [L]."""

    renderer: Renderer
    encoder: ContextEncoder
    keywords: KeywordRules
    items: pl.DataFrame
    views: Sequence[PageView]
    item_sids: Mapping[int, Codes]
    query_sids: Mapping[str, Codes]
    keyword_share: float
    anonymous_share: float
    seed: int


def search(sources: Sources) -> Iterable[Sample]:
    """Stage 3: a page view's context → each clicked item, orders with double weight, at most 5 per page view.

    A `keyword_share` of the page views also shows keywords (spec §4.4 `kw_mix`), an `anonymous_share` hides the user.
    """
    rng = np.random.default_rng([sources.seed, 3])
    for view in _shuffled(sources, [view for view in sources.views if view.clicked]):
        fields = sources.encoder.fields(view.context, sources.query_sids[view.context.query])
        if rng.random() < sources.anonymous_share:
            fields = Fields(query=fields.query, query_sid=fields.query_sid)
        if rng.random() < sources.keyword_share:
            fields = replace(fields, keywords=sources.keywords.match(view.context.query))
        prompt = sources.renderer.prompt("search", fields)
        for item in view.clicked[:MAX_POSITIVES]:
            if item in sources.item_sids:
                weight = ORDER_WEIGHT if item in view.ordered else 1.0
                yield Sample(prompt, sources.renderer.target(sources.item_sids[item]), weight)


def query_to_sid(sources: Sources) -> Iterable[Sample]:
    """Stage 1: query text → its SID."""
    for query, sid in _shuffled(sources, list(sources.query_sids.items())):
        yield _sample(sources, "query_to_sid", Fields(query=query), sid)


def sid_to_query(sources: Sources) -> Iterable[Sample]:
    """Stage 1: SID → one of its queries."""
    for query, sid in _shuffled(sources, list(sources.query_sids.items())):
        yield _sample(sources, "sid_to_query", Fields(query_sid=sid), query)


def title_to_sid(sources: Sources) -> Iterable[Sample]:
    """Stage 1: item title → its SID."""
    for item, title in _shuffled(sources, list(_titles(sources).items())):
        yield _sample(sources, "title_to_sid", Fields(title=title), sources.item_sids[item])


def sid_to_title(sources: Sources) -> Iterable[Sample]:
    """Stage 1: SID → title."""
    for item, title in _shuffled(sources, list(_titles(sources).items())):
        yield _sample(sources, "sid_to_title", Fields(item_sid=sources.item_sids[item]), title)


def title_to_category(sources: Sources) -> Iterable[Sample]:
    """Stage 1: item title → category path."""
    titles = _titles(sources)
    for item, path in _shuffled(sources, list(_categories(sources.items).items())):
        yield _sample(sources, "title_to_category", Fields(title=titles[item]), path)


def sid_to_category(sources: Sources) -> Iterable[Sample]:
    """Stage 1: SID → category path."""
    for item, path in _shuffled(sources, list(_categories(sources.items).items())):
        yield _sample(sources, "sid_to_category", Fields(item_sid=sources.item_sids[item]), path)


def query_to_category(sources: Sources) -> Iterable[Sample]:
    """Stage 1: query → category path of a clicked item."""
    paths = _categories(sources.items)
    for query, item in _pairs(sources):
        if item in paths:
            yield _sample(sources, "query_to_category", Fields(query=query), paths[item])


def query_to_title(sources: Sources) -> Iterable[Sample]:
    """Stage 2: query → title of a clicked item."""
    titles = _titles(sources)
    for query, item in _pairs(sources):
        yield _sample(sources, "query_to_title", Fields(query=query), titles[item])


def title_to_query(sources: Sources) -> Iterable[Sample]:
    """Stage 2: title of a clicked item → query."""
    titles = _titles(sources)
    for query, item in _pairs(sources):
        yield _sample(sources, "title_to_query", Fields(title=titles[item]), query)


def query_sid_to_item_sid(sources: Sources) -> Iterable[Sample]:
    """Stage 2: SID of the query → SID of a clicked item."""
    for query, item in _pairs(sources):
        fields = Fields(query_sid=sources.query_sids[query])
        yield _sample(sources, "query_sid_to_item_sid", fields, sources.item_sids[item])


def item_sid_to_query_sid(sources: Sources) -> Iterable[Sample]:
    """Stage 2: SID of a clicked item → SID of the query."""
    for query, item in _pairs(sources):
        fields = Fields(item_sid=sources.item_sids[item])
        yield _sample(sources, "item_sid_to_query_sid", fields, sources.query_sids[query])


MAKERS: Mapping[str, Callable[[Sources], Iterable[Sample]]] = {
    maker.__name__: maker
    for maker in (
        *(search, query_to_sid, sid_to_query, title_to_sid, sid_to_title, title_to_category, sid_to_category),
        *(query_to_category, query_to_title, title_to_query, query_sid_to_item_sid, item_sid_to_query_sid),
    )
}


def _sample(sources: Sources, task: str, fields: Fields, target: Codes | str) -> Sample:
    return Sample(sources.renderer.prompt(task, fields), sources.renderer.target(target), 1.0)


def _pairs(sources: Sources) -> Iterable[tuple[str, int]]:
    """Distinct (query, clicked item) pairs."""
    pairs = ((view.context.query, item) for view in sources.views for item in view.clicked)
    return _shuffled(sources, [pair for pair in dict.fromkeys(pairs) if pair[1] in sources.item_sids])


def _shuffled(sources: Sources, rows: Sequence[T]) -> list[T]:
    """Rows in random order, so that the first few are a fair draw: a short run renders no more than it needs."""
    return [rows[i] for i in np.random.default_rng([sources.seed, 4]).permutation(len(rows))]


def _titles(sources: Sources) -> dict[int, str]:
    return dict(sources.items.select("item_id", "item_title").iter_rows())


def _categories(items: pl.DataFrame) -> dict[int, str]:
    """Item id → `level1/level2`, for items that have a category."""
    names = items.select("item_id", "category_level1_name", "category_level2_name").iter_rows()
    paths = ((item, "/".join(n for n in levels if n != UNKNOWN)) for item, *levels in names)
    return {item: path for item, path in paths if path}
