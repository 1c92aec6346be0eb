"""From what is known about a request to prompt fields: query SID, history SIDs, long-history vectors.

The only feature code. Training builds its samples and serving its prompts through `ContextEncoder`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onesearch.embedder import TextEmbedder
from onesearch.quantizer import Codebooks
from onesearch.sequence import Fields
from onesearch.sid import RQ_LEVELS, Codes

MAX_LONG_ITEMS = 100


@dataclass(frozen=True)
class SearchContext:
    """One request in raw form; sequences run oldest to newest and hold only what happened before it.

    recent_items is the short click sequence, long_items everything the user clicked or bought (item ids); items
    that are not in the catalog are left out. profile is free text such as "24-30 F".
    """

    query: str
    profile: str = ""
    recent_queries: tuple[str, ...] = ()
    recent_items: tuple[int, ...] = ()
    long_items: tuple[int, ...] = ()
    keywords: tuple[str, ...] = ()


class SidLookup(Protocol):
    """Anything that knows the SIDs of live items."""

    def sids_of(self, item_ids: Sequence[int]) -> Codes:
        """uint16 [m, L] of the ids that exist, in the given order, m ≤ len(item_ids)."""
        ...


class ContextEncoder:
    """Applies the fitted embedder and codebooks to contexts."""

    def __init__(self, embedder: TextEmbedder, codebooks: Codebooks, items: SidLookup) -> None:
        self.embedder = embedder
        self.codebooks = codebooks
        self._items = items

    def query_sids(self, queries: Sequence[str]) -> Codes:
        """uint16 [n, L] of query texts."""
        return self.codebooks.encode(self.embedder.embed(queries))

    def fields(self, context: SearchContext, query_sid: Codes | None = None) -> Fields:
        """Prompt fields of a context; pass query_sid (uint16 [L]) when it was computed in a batch."""
        sid = self.query_sids([context.query])[0] if query_sid is None else query_sid
        return Fields(
            query=context.query,
            query_sid=sid,
            profile=context.profile,
            recent_queries=context.recent_queries,
            recent_sids=self._items.sids_of(context.recent_items),
            history=self.history(context.long_items),
            keywords=context.keywords,
        )

    def history(self, item_ids: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """Long-history vectors float32 [3, E]: per RQ level the L2-normalised mean centroid (spec §3.6).

        None when no item of the history is in the catalog. The latest MAX_LONG_ITEMS count.
        """
        sids = self._items.sids_of(item_ids[-MAX_LONG_ITEMS:])
        if len(sids) == 0:
            return None
        mean = self.codebooks.level_vectors(sids).mean(axis=0)
        norm = np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-6)
        vectors: npt.NDArray[np.float32] = (mean / norm).astype(np.float32)
        assert vectors.shape[0] == RQ_LEVELS
        return vectors
