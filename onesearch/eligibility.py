"""Which rows of a catalog a search may show, and the edges of its trie that lead to them.

A SID is legal while any of its items is eligible. What filters allow depends on the filters and an immutable
catalog alone, so it is computed once and kept; rows that go away on top (excluded, replaced, removed) cost only a
look at their own SIDs.

Legend: N rows, M SIDs, n rows asked.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from onesearch.catalog import Catalog, Filters, Rows
from trie import EdgeMask, SidTrie


@dataclass(frozen=True, eq=False)
class Eligible:
    """The eligible rows of one catalog. passed: bool [N] of the filters, None: all; gone: rows taken out, sorted.

    mask: the legal edges, None while every SID is legal. count: eligible rows.
    """

    catalog: Catalog
    trie: SidTrie
    passed: npt.NDArray[np.bool_] | None
    gone: Rows
    mask: EdgeMask | None
    count: int

    @classmethod
    def under(cls, catalog: Catalog, trie: SidTrie, filters: Filters | None) -> Self:
        """The rows that satisfy every filter; the costly step, linear in N."""
        nothing = np.zeros(0, dtype=np.int64)
        if filters is None or filters == Filters():
            return cls(catalog, trie, None, nothing, None, catalog.num_items)
        passed = catalog.eligible(filters)
        return cls(
            catalog, trie, passed, nothing, trie.subset(catalog.sid_mask(passed)), int(np.count_nonzero(passed))
        )

    def without(self, rows: Rows) -> Self:
        """Less some rows, which may repeat or not be eligible at all. Linear in the rows of their SIDs."""
        rows = np.unique(rows)
        rows = rows[self.keeps(rows)]
        if len(rows) == 0:
            return self
        less = type(self)(
            self.catalog, self.trie, self.passed, np.union1d(self.gone, rows), self.mask, self.count - len(rows)
        )
        leaves = np.unique(self.catalog.leaves_at(rows))
        under, sources = self.catalog.rows_under(leaves)
        left = np.zeros(len(leaves), dtype=np.bool_)
        left[sources[less.keeps(under)]] = True
        if left.all():
            return less
        mask = (self.mask or self.trie.all()).without(leaves[~left])
        return type(self)(self.catalog, self.trie, self.passed, less.gone, mask, less.count)

    def keeps(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Whether each row is eligible, bool [n]."""
        kept = np.ones(len(rows), dtype=np.bool_) if self.passed is None else self.passed[rows]
        return kept & ~np.isin(rows, self.gone) if len(self.gone) else kept

    @property
    def nbytes(self) -> int:
        """Memory of its own."""
        passed = 0 if self.passed is None else self.passed.nbytes
        return passed + self.gone.nbytes + (self.mask.nbytes if self.mask else 0)


class Sized(Protocol):
    """Anything that knows its memory."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class RecentlyUsed(Generic[T]):
    """Values by key, the least recently used forgotten beyond a number of bytes. Thread-safe.

    Values are made outside the lock: two threads may make the same one, neither waits for the other.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made if it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            kept = self._values.setdefault(key, value)
            if kept is value:
                self.nbytes += value.nbytes
            while self.nbytes > self._max_bytes:
                _, dropped = self._values.popitem(last=False)
                self.nbytes -= dropped.nbytes
        return kept
