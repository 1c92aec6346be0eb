"""Facets: how the candidates of a search divide by category, brand and price.

Candidates are the items behind the SIDs that the beam kept, after filters and at most as many as the beam is wide.
Counts speak of them, never of the whole catalog: a wider beam counts more.

Legend: n candidates.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onesearch.catalog import NO_NAME, Rows
from onesearch.live import Snapshot

MAX_VALUES = 20
PRICE_BANDS = 5


@dataclass(frozen=True)
class Count:
    """A name, which the filter of its facet takes, and how many candidates have it."""

    value: str
    count: int


@dataclass(frozen=True)
class PriceBand:
    """The candidates with prices from price_min to price_max, both included, as the price filter counts them."""

    price_min: float
    price_max: float
    count: int


@dataclass(frozen=True)
class Facets:
    """Names by count, highest first and ties by name, at most MAX_VALUES of each kind; price bands from low to high.

    top_category is the first level of an item's categories, category the last one it has.
    """

    candidates: int
    top_category: tuple[Count, ...]
    category: tuple[Count, ...]
    brand: tuple[Count, ...]
    price: tuple[PriceBand, ...]


def count_facets(catalog: Snapshot, rows: Rows) -> Facets:
    """The facets of some rows of a catalog, int64 [n]. An item without a brand, category or price counts in none."""
    top, leaf, brand = Counter[str](), Counter[str](), Counter[str]()
    prices = []
    for part, places in catalog.parts(rows):
        columns = part.columns.arrays
        levels = columns["categories"][places]
        deepest = (levels != NO_NAME).sum(axis=1) - 1  # -1, the last level, is empty where all are
        _count(top, part.categories, levels[:, 0])
        _count(leaf, part.categories, levels[np.arange(len(places)), deepest])
        _count(brand, part.brands, columns["brand"][places])
        prices.append(columns["price"][places])
    return Facets(len(rows), _most(top), _most(leaf), _most(brand), _bands(np.concatenate(prices)))


def _count(counts: Counter[str], names: list[str], codes: npt.NDArray[np.int32]) -> None:
    found, times = np.unique(codes[codes != NO_NAME], return_counts=True)
    for code, count in zip(found.tolist(), times.tolist(), strict=True):
        counts[names[code]] += count


def _most(counts: Counter[str]) -> tuple[Count, ...]:
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return tuple(Count(*entry) for entry in ranked[:MAX_VALUES])


def _bands(prices: npt.NDArray[np.float32]) -> tuple[PriceBand, ...]:
    """At most PRICE_BANDS bands of about equal size, which begin and end with the price of a candidate."""
    known = np.sort(prices[~np.isnan(prices)])
    if not len(known):
        return ()
    ends = known[-(-np.arange(1, PRICE_BANDS + 1) * len(known) // PRICE_BANDS) - 1]
    stops = np.unique(np.searchsorted(known, ends, side="right"))
    starts = [0, *stops[:-1].tolist()]
    return tuple(
        PriceBand(_shortest(known[start]), _shortest(known[stop - 1]), stop - start)
        for start, stop in zip(starts, stops.tolist(), strict=True)
    )


def _shortest(price: np.float32) -> float:
    """The price as a decimal that reads back as the same float32."""
    return float(str(price))
