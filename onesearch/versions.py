"""Versions of a live catalog on disk: what compaction writes, a folder of items and trie that opens like a bundle's.

A version is named by the number of the last change it holds. It is immutable and only saves work: it can always be
made again from the bundle and the changes, so a damaged one is an error to report, not a loss.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from onesearch.bundle import sha256
from onesearch.catalog import NO_NAME, Catalog, Columns, Rows
from onesearch.eligibility import Eligible, RecentlyUsed
from onesearch.errors import BundleError
from trie import SidTrie

FILTER_CACHE_BYTES = 64 << 20
_SEAL = "version.json"


@dataclass(frozen=True, eq=False)
class Version:
    """Items and their trie, immutable; seq is the last change they hold. eligible: what filters allow, kept."""

    seq: int
    catalog: Catalog
    trie: SidTrie
    eligible: RecentlyUsed[Eligible] = field(default_factory=lambda: RecentlyUsed(FILTER_CACHE_BYTES))


def write_version(folder: Path, base: Version, hidden: Rows, added: Catalog, seq: int) -> None:
    """Write base without its hidden rows and with the added items to `folder/seq`, which appears whole or not at all.

    Raises ValueError when no item is left: a trie of nothing cannot be served.
    """
    kept = np.ones(base.catalog.num_items, dtype=np.bool_)
    kept[hidden] = False
    rows, late = np.flatnonzero(kept), np.arange(added.num_items)
    if len(rows) + len(late) == 0:
        raise ValueError("the catalog is empty")
    partial = folder / f".{seq}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "items").mkdir(parents=True)
    sids = np.concatenate([base.catalog.sids[rows], added.sids])
    trie = SidTrie.build(sids, base.trie.sizes)
    ids = np.concatenate([base.catalog.item_ids[rows], added.item_ids])
    popularity = np.concatenate([base.catalog.popularity[rows], added.popularity])
    order = np.lexsort((ids, -popularity, trie.index(sids)))
    rows = np.concatenate([rows, base.catalog.num_items + late])[order]
    _merge(base.catalog.columns, added.columns, rows).save(partial / "items")
    trie.save(partial / "trie.bin")
    names = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
    (partial / _SEAL).write_bytes(orjson.dumps({name: sha256(partial / name) for name in names}))
    partial.replace(folder / str(seq))


def open_version(path: Path) -> Version:
    """Verify and open a version. Raises BundleError listing every fault."""
    try:
        sealed: dict[str, str] = orjson.loads((path / _SEAL).read_bytes())
        faults = [f"{name}: is damaged" for name, expected in sealed.items() if sha256(path / name) != expected]
    except (OSError, orjson.JSONDecodeError, AttributeError) as error:
        faults = [f"is no version: {error}"]
    if faults:
        raise BundleError(f"catalog version {path}", faults)
    return Version(int(path.name), Catalog(path / "items"), SidTrie.open(path / "trie.bin"))


def list_versions(folder: Path) -> list[int]:
    """Numbers of the complete versions of a folder, ascending."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdecimal())


def remove_versions(folder: Path, keep: int) -> None:
    """Remove all versions but one. Readers that have an old one mapped keep it until they let go."""
    for seq in list_versions(folder):
        if seq != keep:
            shutil.rmtree(folder / str(seq), ignore_errors=True)


def _merge(base: Columns, added: Columns, rows: Rows) -> Columns:
    """The given rows, in this order; numbers beyond the base's count the added ones."""
    start = len(base.arrays["item_ids"])
    late = rows >= start
    places = np.where(late, rows - start, rows)

    def pick(of_base: npt.NDArray[Any], of_added: npt.NDArray[Any]) -> npt.NDArray[Any]:
        picked = np.empty((len(rows), *of_base.shape[1:]), dtype=of_base.dtype)
        picked[~late], picked[late] = of_base[places[~late]], of_added[places[late]]
        return picked

    plain = ("item_ids", "item_sids", "price", "in_stock", "published_at", "popularity")
    arrays = {name: pick(base.arrays[name], added.arrays[name]) for name in plain}
    categories, recode = _joined(base.categories, added.categories)
    arrays["categories"] = pick(
        *(code[c.arrays["categories"]] for code, c in zip(recode, (base, added), strict=True))
    )
    brands, recode = _joined(base.brands, added.brands)
    arrays["brand"] = pick(*(code[c.arrays["brand"]] for code, c in zip(recode, (base, added), strict=True)))
    lengths = pick(np.diff(base.arrays["offsets"]), np.diff(added.arrays["offsets"]))
    offsets = arrays["offsets"] = np.r_[np.uint64(0), np.cumsum(lengths, dtype=np.uint64)]
    bodies = np.empty(int(offsets[-1]), dtype=np.uint8)
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(late.astype(np.int8)) != 0)) + 1
    for first, stop in zip([0, *breaks], [*breaks, len(rows)], strict=True):  # neighbours are copied in one piece
        part = added if late[first] else base
        begin, end = part.arrays["offsets"][places[first]], part.arrays["offsets"][places[stop - 1] + 1]
        bodies[int(offsets[first]) : int(offsets[stop])] = part.bodies[int(begin) : int(end)]
    return Columns(arrays, bodies, categories, brands)


def _joined(one: Sequence[str], other: Sequence[str]) -> tuple[list[str], list[npt.NDArray[np.int32]]]:
    """All names in sorted order, and for each list the new codes by old code; NO_NAME, the last, stays itself."""
    names = sorted({*one, *other})
    code = {name: i for i, name in enumerate(names)}
    return names, [np.asarray([*(code[name] for name in part), NO_NAME], dtype=np.int32) for part in (one, other)]
