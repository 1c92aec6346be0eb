"""From what is known about a request to prompt fields: query SID, history SIDs, long-history vectors, user id.

The only feature code. Training builds its samples and serving its prompts through `ContextEncoder`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from onesearch.embedder import TextEmbedder
from onesearch.quantizer import Codebooks
from onesearch.sequence import BEHAVIOURS, Fields, UidMode
from onesearch.sid import RQ_LEVELS, Codes
from onesearch.text import normalise
from onesearch.uid import user_id

MAX_RECENT_QUERIES = 10
MAX_RECENT_ITEMS = 20
MAX_LONG_ITEMS = 100
MAX_DEFAULT_ITEMS = 10
# How much of each history logs and live traffic keep: more queries than a context shows, since repeats count once.
KEPT_QUERIES, KEPT_ITEMS = 3 * MAX_RECENT_QUERIES, MAX_LONG_ITEMS
Gender = Literal["F", "M"]
AgeBucket = Literal["0-11", "12-17", "18-23", "24-30", "31-40", "41-49", "50+"]


@dataclass(frozen=True)
class SearchContext:
    """One request in raw form; sequences run oldest to newest and hold only what happened before it.

    recent_items is the short click sequence, long_clicks and long_orders the long sequence by behaviour (item ids);
    items that are not in the catalog are left out. profile is free text such as "24-30 F".
    default_items: what stands in for the clicks of a user without items; None: what the bundle keeps for the query.
    """

    query: str
    profile: str = ""
    recent_queries: tuple[str, ...] = ()
    recent_items: tuple[int, ...] = ()
    long_clicks: tuple[int, ...] = ()
    long_orders: tuple[int, ...] = ()
    keywords: tuple[str, ...] = ()
    default_items: tuple[int, ...] | None = None

    @property
    def knows_user(self) -> bool:
        """Whether anything is known of who asks."""
        return bool(self.profile or self.recent_queries or self.has_items)

    @property
    def has_items(self) -> bool:
        """Whether any item is known that the user clicked or ordered."""
        return bool(self.recent_items or self.long_clicks or self.long_orders)


def assemble(
    query: str,
    queries: Iterable[str],
    clicks: Sequence[int],
    orders: Sequence[int],
    profile: str = "",
    keywords: tuple[str, ...] = (),
) -> SearchContext:
    """A context from what a user did before, oldest first: queries asked, items clicked, items ordered.

    The one rule of what counts as recent, for logs and for live traffic: a query asked again and again (pages,
    filters, reloads) counts once, and one that equals the present query is not its own history (spec §2.2, §3.6).
    """
    wanted = normalise(query)
    asked = [text for text, _ in groupby(map(normalise, queries))]
    if asked and asked[-1] == wanted:
        asked.pop()
    return SearchContext(
        query=wanted,
        profile=profile,
        recent_queries=tuple(asked[-MAX_RECENT_QUERIES:]),
        recent_items=tuple(clicks[-MAX_RECENT_ITEMS:]),
        long_clicks=tuple(clicks[-MAX_LONG_ITEMS:]),
        long_orders=tuple(orders[-MAX_LONG_ITEMS:]),
        keywords=keywords,
    )


def default_sequence(clicks: Counter[int]) -> tuple[int, ...]:
    """The default history for a query (spec §3.6): its items clicked on most page views, the most clicked one last,
    where the newest stands; equals by item id. clicks: item → page views of the query on which it was clicked.
    """
    best = sorted(clicks, key=lambda item: (-clicks[item], item))[:MAX_DEFAULT_ITEMS]
    return tuple(reversed(best))


def profile_text(gender: Gender | None, age_bucket: AgeBucket | None) -> str:
    """Profile as prompts show it, e.g. `24-30 F`; unknown parts are left out."""
    return " ".join(part for part in (age_bucket, gender) if part is not None)


class SidLookup(Protocol):
    """Anything that knows the SIDs of live items."""

    def sids_of(self, item_ids: Sequence[int]) -> Codes:
        """uint16 [m, L] of the ids that exist, in the given order, m ≤ len(item_ids)."""
        ...


class ContextEncoder:
    """Applies the fitted embedder and codebooks to contexts."""

    def __init__(
        self,
        embedder: TextEmbedder,
        codebooks: Codebooks,
        items: SidLookup,
        uid: UidMode = "off",
        defaults: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        """uid: how user ids are made. defaults: normalised query → items for users without history."""
        self.embedder = embedder
        self.codebooks = codebooks
        self._items = items
        self._uid: UidMode = uid
        self._defaults = defaults

    def query_sids(self, queries: Sequence[str]) -> Codes:
        """uint16 [n, L] of query texts."""
        return self.codebooks.encode(self.embedder.embed(queries))

    def fields(
        self, context: SearchContext, query_sid: Codes | None = None, items: SidLookup | None = None
    ) -> Fields:
        """Prompt fields of a context; pass query_sid (uint16 [L]) when it was computed in a batch.

        items: where the history is looked up, by default the bundle's own items.
        """
        items = items or self._items
        sid = self.query_sids([context.query])[0] if query_sid is None else query_sid
        recent, clicks, orders = context.recent_items, context.long_clicks, context.long_orders
        if not context.has_items:
            recent = clicks = self._default(context)
        recent_sids = items.sids_of(recent)
        behaviours = [items.sids_of(long[-MAX_LONG_ITEMS:]) for long in (clicks, orders)]
        return Fields(
            query=context.query,
            query_sid=sid,
            profile=context.profile,
            uid=user_id(recent_sids, np.concatenate(behaviours), self._uid, self.codebooks),
            recent_queries=context.recent_queries,
            recent_sids=recent_sids,
            history=self.history(behaviours),
            keywords=context.keywords,
        )

    def _default(self, context: SearchContext) -> tuple[int, ...]:
        """Items in place of a history."""
        if context.default_items is not None:
            return context.default_items
        return self._defaults.get(normalise(context.query), ())

    def history(self, behaviours: Sequence[Codes]) -> npt.NDArray[np.float32] | None:
        """Long-history vectors float32 [R, 3, E] of the items of each of `BEHAVIOURS`, uint16 [m, L] each.

        Per behaviour and RQ level the L2-normalised mean centroid (spec §3.6), zeros for a behaviour without items;
        None without any items.
        """
        if not any(len(sids) for sids in behaviours):
            return None
        vectors = np.zeros((len(BEHAVIOURS), RQ_LEVELS, self.codebooks.dim), dtype=np.float32)
        for own, sids in zip(vectors, behaviours, strict=True):
            if len(sids):
                mean = self.codebooks.level_vectors(sids).mean(axis=0)
                own[:] = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-6)
        return vectors
