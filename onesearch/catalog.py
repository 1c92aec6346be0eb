"""The live items: SID to item expansion, filters, and item bodies as ready-made JSON bytes, memory-mapped.

Row order is the expansion rule: rows are sorted by SID, and within one SID by popularity (log-smoothed click rate
before the training cut), highest first, then by item id (spec §5.2). An item has one SID, so results built by
walking SIDs in score order and rows in row order hold no duplicates.

Legend: N items, L levels, M distinct SIDs (in sorted order, the leaves of the trie).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from onesearch.errors import BundleError
from onesearch.sid import Codes
from onesearch.text import normalise

_ARRAYS = (
    "item_ids",
    "item_sids",
    "offsets",
    "categories",
    "brand",
    "price",
    "in_stock",
    "published_at",
    "popularity",
)
CATEGORY_LEVELS = 3
NO_NAME = -1


@dataclass(frozen=True)
class Item:
    """One item as the tables give it; text is kept as written. published_at is in Unix seconds, 0 if unknown."""

    item_id: int
    title: str
    brand: str = ""
    category: tuple[str, ...] = ()
    price: float | None = None
    image_url: str | None = None
    in_stock: bool = True
    attributes: tuple[tuple[str, Any], ...] = ()
    published_at: int = 0

    def text(self) -> str:
        """What the embedder reads of an item: title, brand, category names and a description, if it has one."""
        described = dict(self.attributes).get("description", "")
        return " ".join(part for part in (self.title, self.brand, *self.category, str(described)) if part)

    def to_json(self) -> bytes:
        """The public fields of a search result, as UTF-8 JSON."""
        return orjson.dumps(
            {
                "item_id": self.item_id,
                "title": self.title,
                "brand": self.brand or None,
                "category": list(self.category),
                "price": self.price,
                "image_url": self.image_url,
                "in_stock": self.in_stock,
                "attributes": dict(self.attributes),
            }
        )


@dataclass(frozen=True)
class Filters:
    """What a request demands of every item. Names compare after normalisation; bounds are inclusive."""

    category: str | None = None
    brand: str | None = None
    price_min: float | None = None
    price_max: float | None = None
    in_stock: bool | None = None
    exclude_items: tuple[int, ...] = ()


def write_catalog(folder: Path, items: Sequence[Item], sids: Codes, popularity: npt.NDArray[np.float32]) -> None:
    """Write items with SIDs uint16 [N, L] and popularity float32 [N] into an existing folder, in row order."""
    ids = np.asarray([item.item_id for item in items], dtype=np.int64)
    keys: list[npt.NDArray[Any]] = [ids, -popularity, *sids.T[::-1]]  # lexsort reads the last key first
    order = np.lexsort(keys)
    rows = [items[i] for i in order]
    bodies = [item.to_json() for item in rows]
    categories, category_ids = _codes([[*i.category, *[""] * CATEGORY_LEVELS][:CATEGORY_LEVELS] for i in rows])
    brands, brand_ids = _codes([[item.brand] for item in rows])
    arrays: dict[str, npt.NDArray[Any]] = {
        "item_ids": ids[order],
        "item_sids": sids[order],
        "offsets": np.concatenate([[0], np.cumsum([len(b) for b in bodies], dtype=np.uint64)]).astype(np.uint64),
        "categories": category_ids,
        "brand": brand_ids[:, 0],
        "price": np.asarray([np.nan if i.price is None else i.price for i in rows], dtype=np.float32),
        "in_stock": np.asarray([i.in_stock for i in rows], dtype=np.bool_),
        "published_at": np.asarray([i.published_at for i in rows], dtype=np.int64),
        "popularity": popularity[order].astype(np.float32),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    (folder / "items.bin").write_bytes(b"".join(bodies))
    (folder / "names.json").write_bytes(orjson.dumps({"categories": categories, "brands": brands}))


def _codes(names: Sequence[Sequence[str]]) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Distinct non-empty names in sorted order, and the position of each name; NO_NAME where it is empty."""
    distinct = sorted({name for row in names for name in row if name})
    position = {name: i for i, name in enumerate(distinct)}
    return distinct, np.asarray([[position.get(n, NO_NAME) for n in row] for row in names], dtype=np.int32)


class Catalog:
    """Read-only view of a folder written by `write_catalog`. Raises BundleError listing every fault."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        arrays = self._load_arrays()
        self.item_ids: npt.NDArray[np.int64] = arrays["item_ids"]
        self.sids: Codes = arrays["item_sids"]
        self._columns = arrays
        self._bodies = np.memmap(folder / "items.bin", dtype=np.uint8, mode="r")
        names = orjson.loads((folder / "names.json").read_bytes())
        self.categories: list[str] = names["categories"]
        self.brands: list[str] = names["brands"]
        self._check()
        self._by_id = np.argsort(self.item_ids, kind="stable")
        self._sorted_ids = self.item_ids[self._by_id]
        starts = np.flatnonzero(np.r_[True, (self.sids[1:] != self.sids[:-1]).any(axis=1)])
        self._leaf_starts = np.r_[starts, self.num_items].astype(np.int64)

    @property
    def num_items(self) -> int:
        """Number of live items."""
        return len(self.item_ids)

    @property
    def num_sids(self) -> int:
        """Number of distinct SIDs, equal to the trie's."""
        return len(self._leaf_starts) - 1

    def rows_of(self, item_ids: Iterable[int]) -> npt.NDArray[np.int64]:
        """Rows of the ids that exist, in the given order, int64 [m]."""
        wanted = np.asarray(list(item_ids), dtype=np.int64)
        at = np.minimum(np.searchsorted(self._sorted_ids, wanted), self.num_items - 1)
        return np.asarray(self._by_id[at[self._sorted_ids[at] == wanted]], dtype=np.int64)

    def row_of(self, item_id: int) -> int | None:
        """Row of one item, None when it is not in the catalog."""
        rows = self.rows_of([item_id])
        return int(rows[0]) if len(rows) else None

    def sids_of(self, item_ids: Sequence[int]) -> Codes:
        """SIDs uint16 [m, L] of the ids that exist, in the given order."""
        return np.asarray(self.sids[self.rows_of(item_ids)])

    def item_json(self, row: int) -> bytes:
        """Public fields of one item as JSON bytes."""
        start, stop = self._columns["offsets"][row : row + 2]
        return self._bodies[int(start) : int(stop)].tobytes()

    def eligible(self, filters: Filters) -> npt.NDArray[np.bool_]:
        """bool [N]: rows that satisfy every filter. An unknown category or brand satisfies nothing.

        An item without a price satisfies no price bound.
        """
        keep = np.ones(self.num_items, dtype=np.bool_)
        if filters.category is not None:
            keep &= np.isin(self._columns["categories"], _positions(self.categories, filters.category)).any(axis=1)
        if filters.brand is not None:
            keep &= np.isin(self._columns["brand"], _positions(self.brands, filters.brand))
        if filters.price_min is not None:
            keep &= self._columns["price"] >= filters.price_min
        if filters.price_max is not None:
            keep &= self._columns["price"] <= filters.price_max
        if filters.in_stock is not None:
            keep &= self._columns["in_stock"] == filters.in_stock
        keep[self.rows_of(filters.exclude_items)] = False
        return keep

    def sid_mask(self, eligible: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """bool [M]: SIDs that hold at least one eligible row."""
        return np.logical_or.reduceat(eligible, self._leaf_starts[:-1])

    def expand(
        self,
        leaves: npt.NDArray[np.int64],
        limit: int,
        eligible: npt.NDArray[np.bool_] | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows of the SIDs `leaves` (trie leaf numbers, best first), at most `limit`, ineligible rows left out.

        Returns rows int64 [n] and for each the position of its SID in `leaves`, int64 [n].
        """
        starts = self._leaf_starts[leaves]
        counts = self._leaf_starts[np.asarray(leaves) + 1] - starts
        sources = np.repeat(np.arange(len(leaves)), counts)
        within = np.arange(len(sources)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = starts[sources] + within
        if eligible is not None:
            kept = eligible[rows]
            rows, sources = rows[kept], sources[kept]
        return rows[:limit].astype(np.int64), sources[:limit].astype(np.int64)

    def _load_arrays(self) -> dict[str, npt.NDArray[Any]]:
        arrays: dict[str, npt.NDArray[Any]] = {}
        faults: list[str] = []
        for name in (*_ARRAYS, "items.bin", "names.json"):
            path = self._folder / (name if "." in name else f"{name}.npy")
            try:
                if path.suffix == ".npy":
                    arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
                elif path.stat().st_size == 0:
                    faults.append(f"{path.name}: is empty")
            except (OSError, ValueError, EOFError) as error:
                faults.append(f"{path.name}: {error}")
        if faults:
            raise BundleError(f"catalog {self._folder}", faults)
        return arrays

    def _check(self) -> None:
        n, offsets = self.num_items, self._columns["offsets"]
        faults = [
            f"{name}.npy: has {len(self._columns[name])} rows, expected {n + (name == 'offsets')}"
            for name in _ARRAYS
            if len(self._columns[name]) != n + (name == "offsets")
        ]
        if n == 0:
            faults.append("item_ids.npy: holds no items")
        elif int(offsets[-1]) != len(self._bodies) or (offsets[1:] < offsets[:-1]).any():
            faults.append(f"offsets.npy: does not divide items.bin of {len(self._bodies)} bytes")
        if faults:
            raise BundleError(f"catalog {self._folder}", faults)


def _positions(names: Sequence[str], wanted: str) -> list[int]:
    key = normalise(wanted)
    return [i for i, name in enumerate(names) if normalise(name) == key]
