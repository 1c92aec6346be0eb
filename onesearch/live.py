"""The live catalog: an immutable base version, the few items changed since, and how readers see both as one.

A search takes one `Snapshot` and uses it throughout; taking it is reading one attribute, so readers never wait and
never see half a change. The one writer makes the next snapshot and puts it in place; an old one goes away with the
last search that holds it.

Rows of a snapshot: the base's keep their numbers 0 … N - 1; row j of the added items is N + j. A changed item is a
hidden base row and an added row. Both parts may hold the same SID; whichever leaf the trie names, all its items
are shown.

Legend: N base rows, L levels, n rows asked, S leaves (the base's, then the added ones).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onesearch.catalog import Catalog, Filters, Item, Rows, columns_of
from onesearch.eligibility import Eligible
from onesearch.sid import Codes
from onesearch.versions import Version, open_version, write_version
from trie import AnyMask, AnyTrie, Overlay, OverlayMask, SidTrie

Quantise = Callable[[Sequence[str]], Codes]
"""Texts of items to their SIDs, uint16 [n, L]"""


class Popularity(Protocol):
    """What orders the items of one SID, highest first; ties go to the lower id."""

    def __call__(
        self, item_ids: npt.NDArray[np.int64], trained: npt.NDArray[np.float32], /
    ) -> npt.NDArray[np.float32]:
        """float32 [n] for item ids int64 [n] whose popularity in the catalog is `trained`, float32 [n]."""
        ...


@dataclass(frozen=True)
class Change:
    """What happened to one item: it is now `item`, or gone (None). reset: it is what the bundle says it is.

    seq numbers all changes of a service, from 1.
    """

    seq: int
    item_id: int
    item: Item | None
    reset: bool = False


@dataclass(frozen=True, eq=False)
class Selection:
    """The eligible items of a snapshot: of its base and of its added items."""

    trie: AnyTrie
    base: Eligible
    added: Eligible

    @property
    def count(self) -> int:
        """Eligible items."""
        return self.base.count + self.added.count

    @property
    def mask(self) -> AnyMask | None:
        """The legal edges of `trie`; None when every SID is legal."""
        base, added = self.base.mask, self.added.mask
        if isinstance(self.trie, SidTrie) or (base is None and added is None):
            return base
        return OverlayMask(base or self.base.trie.all(), added or self.added.trie.all())

    def keeps(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Whether each row of the snapshot is eligible, bool [n]."""
        late = rows >= self.base.catalog.num_items
        kept = np.empty(len(rows), dtype=np.bool_)
        kept[~late] = self.base.keeps(rows[~late])
        kept[late] = self.added.keeps(rows[late] - self.base.catalog.num_items)
        return kept


class Snapshot:
    """All items at one moment. Immutable.

    version names the content: two snapshots of one bundle with the same version show the same items. base: the
    version on disk below; added: the items that are new or changed since; hidden: base rows that were changed or
    removed since, sorted, int64. trie: all live SIDs.
    """

    def __init__(self, version: str, seq: int, base: Version, added: Catalog, hidden: Rows) -> None:
        self.version, self.seq, self.base, self.added, self.hidden = version, seq, base, added, hidden
        self.num_items = base.catalog.num_items - len(hidden) + added.num_items
        self.categories = sorted({*base.catalog.categories, *added.categories})
        self._start = base.catalog.num_items
        self._added_trie = SidTrie.build(added.sids, base.trie.sizes)
        self._twins = base.trie.index(
            self._added_trie.sids()
        )  # the base's leaf of each added SID, -1 if it has none
        self._by_twin = np.argsort(self._twins)
        self.trie: AnyTrie = Overlay(base.trie, self._added_trie) if added.num_items else base.trie
        self._all = self._select(Filters())

    def rows_of(self, item_ids: Sequence[int]) -> Rows:
        """Rows of the ids that are live, in the given order, int64 [m]."""
        rows = self.base.catalog.index(item_ids)
        if len(self.hidden):
            rows = np.where(np.isin(rows, self.hidden), -1, rows)
        if self.added.num_items:
            late = self.added.index(item_ids)
            rows = np.where(late >= 0, self._start + late, rows)
        return rows[rows >= 0]

    def row_of(self, item_id: int) -> int | None:
        """Row of one item, None when it is not live."""
        rows = self.rows_of([item_id])
        return int(rows[0]) if len(rows) else None

    def sids_of(self, item_ids: Sequence[int]) -> Codes:
        """SIDs uint16 [m, L] of the ids that are live, in the given order."""
        return self.sids_at(self.rows_of(item_ids))

    def sids_at(self, rows: Rows) -> Codes:
        """SIDs of rows, uint16 [n, L]."""
        return self._gather(rows, self.base.catalog.sids, self.added.sids)

    def ids_at(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Item ids of rows, int64 [n]."""
        return self._gather(rows, self.base.catalog.item_ids, self.added.item_ids)

    def sid(self, row: int) -> Codes:
        """SID of one item, uint16 [L]."""
        catalog, place = self._place(row)
        return np.asarray(catalog.sids[place])

    def item_json(self, row: int) -> bytes:
        """Public fields of one item as JSON bytes."""
        catalog, place = self._place(row)
        return catalog.item_json(place)

    def item(self, row: int) -> Item:
        """One item in full."""
        catalog, place = self._place(row)
        return catalog.item(place)

    def parts(self, rows: Rows) -> Iterator[tuple[Catalog, Rows]]:
        """Rows by the part that holds them, as rows of that part, int64 [m]; their order is kept within a part."""
        late = rows >= self._start
        yield self.base.catalog, rows[~late]
        yield self.added, rows[late] - self._start

    def select(self, filters: Filters | None = None) -> Selection:
        """The items that satisfy every filter. The filters' part is kept for the next search, exclusions are not."""
        if filters is None:
            return self._all
        chosen = self._select(replace(filters, exclude_items=()))
        if not filters.exclude_items:
            return chosen
        base = chosen.base.without(self.base.catalog.rows_of(filters.exclude_items))
        return Selection(self.trie, base, chosen.added.without(self.added.rows_of(filters.exclude_items)))

    def select_words(self, wanted: Sequence[str], filters: Filters | None = None) -> Selection | None:
        """Of the items that satisfy every filter those that hold the most of some distinct words; None when none holds
        any of them.

        The words are looked up in what the embedder reads of an item.
        """
        parts = (self.base.catalog.words, self.added.words)
        known = tuple(sorted(word for word in wanted if any(len(part.rows(word)) for part in parts)))
        for least in range(len(known), 0, -1):
            chosen = self.select(replace(filters or Filters(), words=known, least_words=least))
            if chosen.count:
                return chosen
        return None

    def expand(
        self, leaves: Rows, limit: int, selection: Selection | None = None, popularity: Popularity | None = None
    ) -> tuple[Rows, Rows]:
        """Rows of the SIDs `leaves` (leaf numbers of `trie`, best first), at most `limit`, ineligible ones left out.

        Returns rows int64 [n] and for each the position of its SID in `leaves`, int64 [n]. The one place that
        knows the order within a SID: popularity, highest first, then item id.
        """
        in_base, in_added = self._both_leaves(leaves)
        at_base, at_added = np.flatnonzero(in_base >= 0), np.flatnonzero(in_added >= 0)
        rows, sources = self.base.catalog.rows_under(in_base[at_base])
        late, late_sources = self.added.rows_under(in_added[at_added])
        rows = np.concatenate([rows, late + self._start])
        sources = np.concatenate([at_base[sources], at_added[late_sources]])
        kept = (selection or self._all).keeps(rows)
        rows, sources = rows[kept], sources[kept]
        if len(late) or popularity:
            order = self._order(rows, sources, popularity)
            rows, sources = rows[order], sources[order]
        return rows[:limit], sources[:limit]

    def _order(self, rows: Rows, sources: Rows, popularity: Popularity | None) -> Rows:
        ids = self.ids_at(rows)
        known = self._gather(rows, self.base.catalog.popularity, self.added.popularity)
        return np.lexsort((ids, -(popularity(ids, known) if popularity else known), sources))

    def _select(self, filters: Filters) -> Selection:
        base, cache = self.base, self.base.eligible
        chosen = cache.get(filters, lambda: Eligible.under(base.catalog, base.trie, filters))
        if len(self.hidden):
            chosen = cache.get((filters, self.seq), lambda: chosen.without(self.hidden))
        added = cache.get(
            (filters, self.seq, "added"), lambda: Eligible.under(self.added, self._added_trie, filters)
        )
        return Selection(self.trie, chosen, added)

    def _both_leaves(self, leaves: Rows) -> tuple[Rows, Rows]:
        """The leaf of each SID in the base and in the added trie, -1 where it has none, int64 [n] each."""
        late = leaves >= self.base.trie.num_sids
        in_base, in_added = np.where(late, -1, leaves), np.where(late, leaves - self.base.trie.num_sids, -1)
        if len(self._twins):
            in_base[late] = self._twins[in_added[late]]
            at = np.minimum(np.searchsorted(self._twins, in_base, sorter=self._by_twin), len(self._twins) - 1)
            twin = self._by_twin[at]
            in_added = np.where((in_base >= 0) & (self._twins[twin] == in_base), twin, in_added)
        return in_base, in_added

    def _place(self, row: int) -> tuple[Catalog, int]:
        return (self.base.catalog, row) if row < self._start else (self.added, row - self._start)

    def _gather(self, rows: Rows, of_base: npt.NDArray[Any], of_added: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values of rows from an array of each part."""
        if not self.added.num_items:
            return np.asarray(of_base[rows])
        late = rows >= self._start
        values = np.empty((len(rows), *of_base.shape[1:]), dtype=of_base.dtype)
        values[~late], values[late] = of_base[rows[~late]], of_added[rows[late] - self._start]
        return values


@dataclass(frozen=True)
class _Placed:
    """What a change made of an item: the item with its SID and popularity, None when it is gone."""

    seq: int
    item: tuple[Item, Codes, float] | None


class LiveCatalog:
    """The items of one bundle, changing. Reading `snapshot` is all that readers do; writers take turns."""

    def __init__(self, catalog: Catalog, trie: SidTrie, version: str, quantise: Quantise) -> None:
        """The items as the bundle has them. version names them; quantise gives new texts their SIDs."""
        self._origin, self._version, self._quantise = Version(0, catalog, trie), version, quantise
        self._writing = threading.Lock()
        self._base = self._origin
        self._changed: dict[int, _Placed] = {}
        self.snapshot = self._make(0)

    @property
    def pending(self) -> int:
        """Changed items that the base version does not hold yet."""
        return len(self._changed)

    def apply(self, changes: Sequence[Change]) -> None:
        """Make changes visible, all at once. Changes that are already part of the snapshot are skipped."""
        with self._writing:
            news = [change for change in changes if change.seq > self.snapshot.seq]
            if news:
                self._changed |= self._placed(news)
                self.snapshot = self._make(news[-1].seq)

    def compact(self, folder: Path) -> None:
        """Write all items as a new version into `folder` and go on from it; changes and searches go on meanwhile.

        A catalog without items stays as it is: a trie of nothing is no version.
        """
        seen = self.snapshot
        if seen.num_items and seen.seq > seen.base.seq:
            write_version(folder, seen.base, seen.hidden, seen.added, seen.seq)
            self.adopt(open_version(folder / str(seen.seq)))

    def adopt(self, version: Version) -> None:
        """Go on from a version of these items; the changes that it holds count as applied."""
        with self._writing:
            if self._base.seq < version.seq:
                self._base = version
                self._changed = {i: placed for i, placed in self._changed.items() if placed.seq > version.seq}
                self.snapshot = self._make(max(self.snapshot.seq, version.seq))

    def _make(self, seq: int) -> Snapshot:
        live = [placed.item for placed in self._changed.values() if placed.item is not None]
        sids = np.asarray([sid for _, sid, _ in live], dtype=np.uint16).reshape(len(live), self._base.trie.levels)
        popularity = np.asarray([known for _, _, known in live], dtype=np.float32)
        added = Catalog.of(columns_of([item for item, _, _ in live], sids, popularity))
        hidden = np.sort(self._base.catalog.rows_of(self._changed))
        return Snapshot(f"{self._version}+{seq}" if seq else self._version, seq, self._base, added, hidden)

    def _placed(self, changes: Sequence[Change]) -> dict[int, _Placed]:
        """What the last change of each item makes of it.

        While its text is the bundle's an item keeps its SID, which balancing may have moved away from the nearest
        code; its popularity it keeps always. So an item depends on its last change alone, in whichever order and
        batches the changes came.
        """
        placed: dict[int, _Placed] = {}
        fresh: list[Change] = []
        for change in {change.item_id: change for change in changes}.values():
            known = self._known(change.item_id)
            if change.reset or change.item is None:
                placed[change.item_id] = _Placed(change.seq, known if change.reset else None)
            elif known and known[0].text() == change.item.text():
                placed[change.item_id] = _Placed(change.seq, (change.item, *known[1:]))
            else:
                fresh.append(change)
        texts = [change.item.text() for change in fresh if change.item]
        for change, sid in zip(fresh, self._quantise(texts) if texts else (), strict=True):
            known = self._known(change.item_id)
            assert change.item is not None
            placed[change.item_id] = _Placed(change.seq, (change.item, sid, known[2] if known else 0.0))
        return placed

    def _known(self, item_id: int) -> tuple[Item, Codes, float] | None:
        """An item as the bundle has it, with its SID and popularity."""
        catalog = self._origin.catalog
        row = catalog.row_of(item_id)
        return None if row is None else (catalog.item(row), catalog.sids[row], float(catalog.popularity[row]))
