"""Items as columns: their SIDs, what filters compare, and bodies as ready-made JSON bytes. Immutable.

On disk it is the bundle's `items` folder, memory-mapped; in memory, the few items a live catalog has added.

Row order is the expansion rule: rows are sorted by SID, and within one SID by popularity (log-smoothed click rate
before the training cut), highest first, then by item id (spec §5.2). An item has one SID, so results built by
walking SIDs in score order and rows in row order hold no duplicates.

Legend: N items, L levels, M distinct SIDs (in sorted order, the leaves of the trie).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import orjson

from onesearch.errors import BundleError
from onesearch.sid import Codes
from onesearch.text import normalise
from onesearch.word_index import ARRAYS as _WORD_ARRAYS
from onesearch.word_index import WordIndex

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
Rows = npt.NDArray[np.int64]


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

    @classmethod
    def from_json(cls, body: bytes, published_at: int) -> Self:
        """The item that `to_json` wrote; the time is not among the public fields."""
        raw = orjson.loads(body)
        raw |= {"brand": raw["brand"] or "", "category": tuple(raw["category"])}
        return cls(**{**raw, "attributes": tuple(raw["attributes"].items()), "published_at": published_at})


@dataclass(frozen=True)
class Filters:
    """What a request demands of every item. Names compare after normalisation; bounds are inclusive.

    published_after is in Unix seconds; an item without a time or a price satisfies no bound on it. At least
    `least_words` of the distinct `words` have to be in the item's text.
    """

    category: str | None = None
    brand: str | None = None
    price_min: float | None = None
    price_max: float | None = None
    in_stock: bool | None = None
    exclude_items: tuple[int, ...] = ()
    published_after: int | None = None
    words: tuple[str, ...] = ()
    least_words: int = 0


@dataclass(frozen=True)
class Columns:
    """What a catalog is made of, in row order: arrays by name, all bodies joined, the names that codes stand for.

    words: the words of the items' texts, None until they are written.
    """

    arrays: dict[str, npt.NDArray[Any]]
    bodies: npt.NDArray[np.uint8]
    categories: list[str]
    brands: list[str]
    words: WordIndex | None = None

    def index_words(self) -> WordIndex:
        """The words of the items' texts; linear in all texts."""
        offsets = self.arrays["offsets"].tolist()
        bodies = (bytes(self.bodies[start:stop]) for start, stop in pairwise(offsets))
        return WordIndex.of(Item.from_json(body, 0).text() for body in bodies)

    def save(self, folder: Path) -> None:
        """Write into an existing folder what `Catalog` reads."""
        arrays = {name: self.arrays[name] for name in _ARRAYS} | self.index_words().arrays
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        self.bodies.tofile(folder / "items.bin")
        (folder / "names.json").write_bytes(orjson.dumps({"categories": self.categories, "brands": self.brands}))


def write_catalog(folder: Path, items: Sequence[Item], sids: Codes, popularity: npt.NDArray[np.float32]) -> None:
    """Write items with SIDs uint16 [N, L] and popularity float32 [N] into an existing folder, in row order."""
    columns_of(items, sids, popularity).save(folder)


def columns_of(items: Sequence[Item], sids: Codes, popularity: npt.NDArray[np.float32]) -> Columns:
    """Items with SIDs uint16 [N, L] and popularity float32 [N], brought into row order."""
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
        "categories": category_ids.reshape(-1, CATEGORY_LEVELS),
        "brand": brand_ids.reshape(-1),
        "price": np.asarray([np.nan if i.price is None else i.price for i in rows], dtype=np.float32),
        "in_stock": np.asarray([i.in_stock for i in rows], dtype=np.bool_),
        "published_at": np.asarray([i.published_at for i in rows], dtype=np.int64),
        "popularity": popularity[order].astype(np.float32),
    }
    return Columns(arrays, np.frombuffer(b"".join(bodies), dtype=np.uint8), categories, brands)


def _codes(names: Sequence[Sequence[str]]) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Distinct non-empty names in sorted order, and the position of each name; NO_NAME where it is empty."""
    distinct = sorted({name for row in names for name in row if name})
    position = {name: i for i, name in enumerate(distinct)}
    return distinct, np.asarray([[position.get(n, NO_NAME) for n in row] for row in names], dtype=np.int32)


class Catalog:
    """Read-only view of a folder written by `write_catalog`. Raises BundleError listing every fault."""

    def __init__(self, folder: Path) -> None:
        self._view(_read_columns(folder))

    @classmethod
    def of(cls, columns: Columns) -> Self:
        """A catalog in memory; it may be empty."""
        catalog = cls.__new__(cls)
        catalog._view(columns)
        return catalog

    def _view(self, columns: Columns) -> None:
        self.columns = columns
        # Reading single values through a view is several times faster than through the array.
        self._bodies, self._offsets = columns.bodies.data, columns.arrays["offsets"].data
        self.item_ids: npt.NDArray[np.int64] = columns.arrays["item_ids"]
        self.sids: Codes = columns.arrays["item_sids"]
        self.popularity: npt.NDArray[np.float32] = columns.arrays["popularity"]
        self.categories, self.brands = columns.categories, columns.brands
        self._category_codes, self._brand_codes = _by_name(self.categories), _by_name(self.brands)
        self._by_id = np.argsort(self.item_ids, kind="stable")
        self._sorted_ids = self.item_ids[self._by_id]
        starts = np.flatnonzero((self.sids[1:] != self.sids[:-1]).any(axis=1)) + 1
        self._leaf_starts = np.r_[np.zeros(min(self.num_items, 1), np.int64), starts, self.num_items]

    @property
    def num_items(self) -> int:
        """Number of items N."""
        return len(self.item_ids)

    @property
    def num_sids(self) -> int:
        """Number of distinct SIDs M, equal to the trie's."""
        return len(self._leaf_starts) - 1

    def index(self, item_ids: Iterable[int]) -> Rows:
        """Row of each id, int64 [m]; -1 where there is none."""
        wanted = np.asarray(list(item_ids), dtype=np.int64)
        if not self.num_items:
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self._sorted_ids, wanted), self.num_items - 1)
        return np.where(self._sorted_ids[at] == wanted, self._by_id[at], -1)

    def rows_of(self, item_ids: Iterable[int]) -> Rows:
        """Rows of the ids that exist, in the given order, int64 [m]."""
        rows = self.index(item_ids)
        return rows[rows >= 0]

    def row_of(self, item_id: int) -> int | None:
        """Row of one item, None when it is not in the catalog."""
        rows = self.rows_of([item_id])
        return int(rows[0]) if len(rows) else None

    def sids_of(self, item_ids: Sequence[int]) -> Codes:
        """SIDs uint16 [m, L] of the ids that exist, in the given order."""
        return np.asarray(self.sids[self.rows_of(item_ids)])

    def item_json(self, row: int) -> bytes:
        """Public fields of one item as JSON bytes."""
        return bytes(self._bodies[self._offsets[row] : self._offsets[row + 1]])

    def item(self, row: int) -> Item:
        """One item in full."""
        return Item.from_json(self.item_json(row), self.published_at(row))

    def published_at(self, row: int) -> int:
        """When an item was published, in Unix seconds; 0 if unknown."""
        return int(self.columns.arrays["published_at"][row])

    @cached_property
    def words(self) -> WordIndex:
        """The words of the items' texts; made at the first use for items that are not on disk."""
        return self.columns.words or self.columns.index_words()

    def eligible(self, filters: Filters) -> npt.NDArray[np.bool_]:
        """bool [N]: rows that satisfy every filter. An unknown category or brand satisfies nothing."""
        columns = self.columns.arrays
        keep = np.ones(self.num_items, dtype=np.bool_)
        if filters.category is not None:
            codes = self._category_codes.get(normalise(filters.category), [])
            keep &= _equals_any([columns["categories"][:, level] for level in range(CATEGORY_LEVELS)], codes)
        if filters.brand is not None:
            keep &= _equals_any([columns["brand"]], self._brand_codes.get(normalise(filters.brand), []))
        with np.errstate(over="ignore"):  # a bound too large for the type of prices is infinite
            if filters.price_min is not None:
                keep &= columns["price"] >= filters.price_min
            if filters.price_max is not None:
                keep &= columns["price"] <= filters.price_max
        if filters.in_stock is not None:
            keep &= columns["in_stock"] == filters.in_stock
        if filters.published_after is not None:
            keep &= columns["published_at"] >= max(filters.published_after, 1)
        if filters.words:
            keep &= self.words.counts(filters.words, self.num_items) >= filters.least_words
        keep[self.rows_of(filters.exclude_items)] = False
        return keep

    def sid_mask(self, eligible: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """bool [M]: SIDs that hold at least one eligible row."""
        return np.logical_or.reduceat(eligible, self._leaf_starts[:-1]) if self.num_items else eligible

    def leaves_at(self, rows: Rows) -> Rows:
        """Leaf number of the SID of each row, int64 [n]."""
        return np.searchsorted(self._leaf_starts, rows, side="right") - 1

    def rows_under(self, leaves: Rows) -> tuple[Rows, Rows]:
        """All rows of the SIDs `leaves`, SID by SID in the given order, int64 [n]; and the position of each row's
        SID in `leaves`, int64 [n]."""
        starts = self._leaf_starts[leaves]
        counts = self._leaf_starts[np.asarray(leaves) + 1] - starts
        sources = np.repeat(np.arange(len(leaves)), counts)
        within = np.arange(len(sources)) - np.repeat(np.cumsum(counts) - counts, counts)
        return starts[sources] + within, sources


def _by_name(names: Sequence[str]) -> dict[str, list[int]]:
    """Codes of the names that are the same after normalisation."""
    codes: dict[str, list[int]] = {}
    for code, name in enumerate(names):
        codes.setdefault(normalise(name), []).append(code)
    return codes


def _equals_any(columns: Sequence[npt.NDArray[Any]], codes: Sequence[int]) -> npt.NDArray[np.bool_]:
    """bool [N]: rows where any column holds any of the codes."""
    found = np.zeros(len(columns[0]), dtype=np.bool_)
    for column in columns:
        for code in codes:
            found |= column == code
    return found


def _read_columns(folder: Path) -> Columns:
    arrays: dict[str, npt.NDArray[Any]] = {}
    faults: list[str] = []
    for name in (*_ARRAYS, *_WORD_ARRAYS, "items.bin", "names.json"):
        path = folder / (name if "." in name else f"{name}.npy")
        try:
            if path.suffix == ".npy":
                arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            elif path.stat().st_size == 0:
                faults.append(f"{path.name}: is empty")
        except (OSError, ValueError, EOFError) as error:
            faults.append(f"{path.name}: {error}")
    if faults:
        raise BundleError(f"catalog {folder}", faults)
    names = orjson.loads((folder / "names.json").read_bytes())
    bodies = np.asarray(np.memmap(folder / "items.bin", dtype=np.uint8, mode="r"))
    index = WordIndex(**{name: arrays.pop(name) for name in _WORD_ARRAYS})
    columns = Columns(arrays, bodies, names["categories"], names["brands"], index)
    if faults := _column_faults(columns):
        raise BundleError(f"catalog {folder}", faults)
    return columns


def _column_faults(columns: Columns) -> list[str]:
    n, offsets = len(columns.arrays["item_ids"]), columns.arrays["offsets"]
    faults = [
        f"{name}.npy: has {len(columns.arrays[name])} rows, expected {n + (name == 'offsets')}"
        for name in _ARRAYS
        if len(columns.arrays[name]) != n + (name == "offsets")
    ]
    if n == 0:
        faults.append("item_ids.npy: holds no items")
    elif int(offsets[-1]) != len(columns.bodies) or (offsets[1:] < offsets[:-1]).any():
        faults.append(f"offsets.npy: does not divide items.bin of {len(columns.bodies)} bytes")
    if columns.words:
        faults += columns.words.faults(n)
    return faults
