"""Training samples of stages 1–3 (spec §4.1–4.3): which fields of what the model reads, and what it must write.

Every sample is rendered by the one renderer. A sample is a prompt, target ids and a weight; samples of one task
are kept together because a batch holds one task.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl

from onesearch.context import ContextEncoder, SearchContext
from onesearch.sequence import Fields, Prompt, Renderer
from onesearch.sid import Codes
from training.columns import UNKNOWN
from training.page_keywords import Keywords
from training.sessions import PageView
from trie import SidTrie

T = TypeVar("T")

MAX_POSITIVES = 5
ORDER_WEIGHT = 2.0
WINDOW = 5  # items of a sliding window over a user's clicks


@dataclass(frozen=True)
class Sample:
    """prompt ids int64 [S] with history vectors, target ids int64 [T], loss weight.

    teacher: the prompt with keywords, which equals the other one where a page view has none; only where asked for.
    """

    prompt: Prompt
    target: npt.NDArray[np.int64]
    weight: float
    teacher: Prompt | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and target."""
        return len(self.prompt.ids) + len(self.target)


@dataclass(frozen=True)
class Sources:
    """Everything samples are made of. item_sids: item id → uint16 [L]; query_sids: query → uint16 [L].

    keywords: one per page view. popularity: item id → what orders items of one SID. trie: of all live SIDs. judged:
    the relevance table, if there is one. anonymous_share: share of page views whose prompt hides the user.
    teach: `search` samples carry their teacher prompt. learn: positions of the page views that preferences and prompts
    of rollouts come from, None for all; the others only tell rates, earlier orders and what queries mean.
    """

    renderer: Renderer
    encoder: ContextEncoder
    items: pl.DataFrame
    views: Sequence[PageView]
    keywords: Sequence[Keywords]
    item_sids: Mapping[int, Codes]
    query_sids: Mapping[str, Codes]
    popularity: Mapping[int, float]
    trie: SidTrie
    judged: pl.DataFrame | None
    anonymous_share: float
    seed: int
    teach: bool = False
    learn: frozenset[int] | None = None


def search(sources: Sources) -> Iterable[Sample]:
    """Stage 3: a page view's context → each clicked item, orders with double weight, at most 5 per page view.

    This is the student's input, without keywords (spec §4.3).
    """
    return _search(sources, lambda keywords: ())


def search_keywords(sources: Sources) -> Iterable[Sample]:
    """`search` with the training keywords shown: the teacher's input (spec §4.4 `kw_mix`)."""
    plain = replace(sources, teach=False)
    return _search(plain, lambda keywords: keywords.train)


def search_served(sources: Sources) -> Iterable[Sample]:
    """`search` with the keywords that serving would show, which know nothing of the outcome (spec §4.6.4)."""
    plain = replace(sources, teach=False)
    return _search(plain, lambda keywords: keywords.serve)


def _search(sources: Sources, shown: Callable[[Keywords], tuple[str, ...]]) -> Iterable[Sample]:
    rng = np.random.default_rng([sources.seed, 3])
    rows = list(zip(sources.views, sources.keywords, strict=True))
    for view, keywords in _shuffled(sources, [row for row in rows if row[0].clicked]):
        context = view.context
        if rng.random() < sources.anonymous_share:
            context = SearchContext(context.query, default_items=context.default_items)
        if not context.knows_user:  # such a prompt shows the keywords of the query alone
            keywords = Keywords(*(keywords.query,) * 3)
        fields = sources.encoder.fields(context, sources.query_sids[context.query])
        prompt = sources.renderer.prompt("search", replace(fields, keywords=shown(keywords)))
        teacher = None
        if sources.teach:
            teacher = sources.renderer.prompt("search", replace(fields, keywords=keywords.train))
        for item in view.clicked[:MAX_POSITIVES]:
            if item in sources.item_sids:
                weight = ORDER_WEIGHT if item in view.ordered else 1.0
                yield Sample(prompt, sources.renderer.target(sources.item_sids[item]), weight, teacher)


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


def items_to_next_item(sources: Sources) -> Iterable[Sample]:
    """Sliding window over each user's clicks: up to five clicked items → the next one (spec §4.3)."""
    clicks: dict[int, list[int]] = defaultdict(list)
    profiles: dict[int, str] = {}
    for view in sources.views:
        if view.user_id:
            clicks[view.user_id] += [item for item in view.clicked if item in sources.item_sids]
            profiles[view.user_id] = view.context.profile
    places = [(user, i) for user, items in clicks.items() for i in range(1, len(items))]
    for user, i in _shuffled(sources, places):
        before = np.stack([sources.item_sids[item] for item in clicks[user][max(0, i - WINDOW) : i]])
        fields = Fields(profile=profiles[user], recent_sids=before)
        yield _sample(sources, "items_to_next_item", fields, sources.item_sids[clicks[user][i]])


def query_to_keywords(sources: Sources) -> Iterable[Sample]:
    """CoT 1: query → its keywords, comma-separated."""
    for query, keywords in _shuffled(sources, _query_keywords(sources)):
        yield _sample(sources, "query_to_keywords", Fields(query=query), ", ".join(keywords))


def query_sid_to_keyword_sid(sources: Sources) -> Iterable[Sample]:
    """CoT 2: SID of the query → SID of one of its n keywords, weight 1/n."""
    rows = _query_keywords(sources)
    sids = _keyword_sids(sources, [keywords for _, keywords in rows])
    for query, keywords in _shuffled(sources, rows):
        prompt = sources.renderer.prompt("query_sid_to_keyword_sid", Fields(query_sid=sources.query_sids[query]))
        yield from _each_keyword(sources, prompt, keywords, sids)


def user_to_keywords(sources: Sources) -> Iterable[Sample]:
    """CoT 3: query and user → personalised keywords, comma-separated."""
    for view, keywords in _shuffled(sources, _personal_keywords(sources)):
        fields = sources.encoder.fields(view.context, sources.query_sids[view.context.query])
        yield _sample(sources, "user_to_keywords", fields, ", ".join(keywords))


def user_to_keyword_sid(sources: Sources) -> Iterable[Sample]:
    """CoT 4: SID of the query and user → SID of one of n personalised keywords, weight 1/n."""
    rows = _personal_keywords(sources)
    sids = _keyword_sids(sources, [keywords for _, keywords in rows])
    for view, keywords in _shuffled(sources, rows):
        fields = sources.encoder.fields(view.context, sources.query_sids[view.context.query])
        prompt = sources.renderer.prompt("user_to_keyword_sid", fields)
        yield from _each_keyword(sources, prompt, keywords, sids)


MAKERS: Mapping[str, Callable[[Sources], Iterable[Sample]]] = {
    maker.__name__: maker
    for maker in (
        *(search, search_keywords, search_served, items_to_next_item),
        *(query_to_sid, sid_to_query, title_to_sid, sid_to_title, title_to_category, sid_to_category),
        *(query_to_category, query_to_title, title_to_query, query_sid_to_item_sid, item_sid_to_query_sid),
        *(query_to_keywords, query_sid_to_keyword_sid, user_to_keywords, user_to_keyword_sid),
    )
}


def _sample(sources: Sources, task: str, fields: Fields, target: Codes | str) -> Sample:
    return Sample(sources.renderer.prompt(task, fields), sources.renderer.target(target), 1.0)


def _query_keywords(sources: Sources) -> list[tuple[str, tuple[str, ...]]]:
    """Distinct queries that have keywords."""
    rows = zip(sources.views, sources.keywords, strict=True)
    return [row for row in {view.context.query: keywords.query for view, keywords in rows}.items() if row[1]]


def _personal_keywords(sources: Sources) -> list[tuple[PageView, tuple[str, ...]]]:
    """Page views that have personalised keywords; training may see the outcome."""
    rows = zip(sources.views, sources.keywords, strict=True)
    return [(view, keywords.train) for view, keywords in rows if keywords.train]


def _keyword_sids(sources: Sources, lists: Iterable[tuple[str, ...]]) -> dict[str, Codes]:
    """A keyword has the SID that it would have as a query."""
    distinct = list(dict.fromkeys(keyword for keywords in lists for keyword in keywords))
    return dict(zip(distinct, sources.encoder.query_sids(distinct), strict=True)) if distinct else {}


def _each_keyword(
    sources: Sources, prompt: Prompt, keywords: tuple[str, ...], sids: Mapping[str, Codes]
) -> Iterable[Sample]:
    for keyword in keywords:
        yield Sample(prompt, sources.renderer.target(sids[keyword]), 1 / len(keywords))


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
