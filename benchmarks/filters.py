"""What filters cost at decode time: from a request's filters to the edges that a beam may take.

`python -m benchmarks.filters [--items N] [--json]`

Every filter is checked before anything is timed: its items against a plain reading of the columns, its search
against the same search over a trie of nothing but the eligible SIDs, and its page for being full. Then, per filter:

- *uncached*: columns compared, SIDs marked, edges lifted; the first request with this filter.
- *cached*: the same filter again; *excluding*: with 100 items of its own excluded; *live*: both, on a catalog with
  1,000 changed items.
- *decode*: the beam search of five levels, 512 beams, with logits that cost nothing, with and without the mask.

`cached_share` is the cached filter's part of a search whose model costs nothing, so the most it can ever be. Times
are medians in milliseconds, with [lowest, highest]. The first row is the word index: the time to make it, and its size.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from benchmarks.trie import SIZES, TOP_N, WIDTH, catalog, logits, timed
from benchmarks.wire import report
from onesearch.catalog import Catalog, Columns, Filters, Item
from onesearch.decode import BeamConfig, BeamResult, beam_search
from onesearch.eligibility import RecentlyUsed
from onesearch.hardware import hardware
from onesearch.live import Change, LiveCatalog, Snapshot
from onesearch.versions import Version
from onesearch.word_index import WordIndex
from trie import AnyMask, AnyTrie, SidTrie

NOW, DAY = 1_800_000_000, 86_400
CHANGED, EXCLUDED = 1000, 100
BODY = Item(0, "").to_json()
FILTERS = {
    "category": Filters(category="category 7"),
    "brand": Filters(brand="brand 11"),
    "price": Filters(price_min=20.0, price_max=60.0),
    "stock": Filters(in_stock=True),
    "fresh": Filters(published_after=NOW - 30 * DAY),
    "all of them": Filters("category 7", None, 20.0, 60.0, True, (), NOW - 300 * DAY),
    "two words": Filters(words=("w40", "w500"), least_words=2),
    "two of three words": Filters(words=("w3", "w40", "w500"), least_words=2),
    "one item in 10,000": Filters("category 7", "brand 11", 20.0, 60.0, True),
}


def titles(items: int, seed: int = 0) -> list[str]:
    """Six words for each item, a Zipf-like choice of 50,000."""
    ranks = (np.random.default_rng([seed, 1]).random((items, 6)) ** 4 * 50_000).astype(np.int64)
    return [" ".join(f"w{rank}" for rank in row) for row in ranks.tolist()]


def columns(items: int, words: WordIndex, seed: int = 0) -> Columns:
    """Items with skewed SIDs, a Zipf-like choice of 30 categories and 2,000 brands, prices, stock and dates."""
    rng = np.random.default_rng(seed)
    sids = catalog(items, seed)
    sids = sids[np.lexsort(sids.T[::-1])]
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "item_ids": rng.permutation(items).astype(np.int64),
        "item_sids": sids,
        "offsets": np.arange(items + 1, dtype=np.uint64) * np.uint64(len(BODY)),
        "categories": (rng.random((items, 3)) ** 2 * 30).astype(np.int32),
        "brand": (rng.random(items) ** 2 * 2000).astype(np.int32),
        "price": rng.lognormal(3.5, 1.0, items).astype(np.float32),
        "in_stock": rng.random(items) < 0.8,
        "published_at": (NOW - rng.exponential(200 * DAY, items)).astype(np.int64),
        "popularity": np.zeros(items, dtype=np.float32),
    }
    names = [f"category {i}" for i in range(30)], [f"brand {i}" for i in range(2000)]
    return Columns(arrays, np.frombuffer(BODY * items, dtype=np.uint8), *names, words)


def passing(columns: Columns, filters: Filters) -> npt.NDArray[np.bool_]:
    """bool [N]: a plain reading of the filters, by names."""
    arrays, keep = columns.arrays, np.ones(len(columns.arrays["item_ids"]), dtype=np.bool_)
    if filters.category:
        keep &= (np.asarray(columns.categories)[arrays["categories"]] == filters.category).any(axis=1)
    if filters.brand:
        keep &= np.asarray(columns.brands)[arrays["brand"]] == filters.brand
    for bound, compare in ((filters.price_min, np.greater_equal), (filters.price_max, np.less_equal)):
        keep &= True if bound is None else compare(arrays["price"], bound)
    if filters.in_stock is not None:
        keep &= arrays["in_stock"] == filters.in_stock
    if filters.published_after is not None:
        keep &= arrays["published_at"] >= filters.published_after
    if filters.words:
        held = (len(set(text.split()).intersection(filters.words)) for text in titles(len(keep)))
        keep &= np.fromiter(held, dtype=np.int64) >= filters.least_words
    return keep


def search(trie: AnyTrie, mask: AnyMask | None = None) -> Callable[[], BeamResult]:
    """A search whose logits depend on the level alone and cost nothing."""
    bank = [np.broadcast_to(level[0], (WIDTH, level.shape[1])).copy() for level in logits()]
    config = BeamConfig(width=WIDTH, top_n=TOP_N)
    return lambda: beam_search(lambda codes, _: bank[codes.shape[1]][: len(codes)], trie, config, mask)


def check(snapshot: Snapshot, filters: Filters) -> int:
    """Eligible items, after every check; SystemExit names what differs."""
    base = snapshot.base
    expected = passing(base.catalog.columns, filters)
    selection = snapshot.select(filters)
    if not np.array_equal(selection.base.keeps(np.arange(len(expected))), expected):
        raise SystemExit(f"{filters}: other items than a plain reading; nothing was timed")
    found = search(snapshot.trie, selection.mask)()
    alone = search(SidTrie.build(base.catalog.sids[expected], SIZES))()
    if not np.array_equal(found.codes, alone.codes) or found.scores.tobytes() != alone.scores.tobytes():
        raise SystemExit(f"{filters}: another search than over the eligible SIDs alone; nothing was timed")
    rows, _ = snapshot.expand(found.leaves, TOP_N, selection)
    if len(rows) != min(TOP_N, int(expected.sum())) or not expected[rows].all():
        raise SystemExit(f"{filters}: the page holds {len(rows)} items; nothing was timed")
    return selection.count


def changed(version: Version) -> Snapshot:
    """The same catalog with CHANGED items replaced, some under a SID of their own."""
    rng, sids = np.random.default_rng(5), catalog(CHANGED, seed=6)
    live = LiveCatalog(version.catalog, version.trie, "bench", lambda texts: sids[: len(texts)])
    ids = rng.choice(version.catalog.item_ids, CHANGED, replace=False).tolist()
    live.apply(
        [Change(n, i, Item(i, f"item {i}", "brand 11", ("category 7",), 30.0)) for n, i in enumerate(ids, 1)]
    )
    return live.snapshot


def spread(times: list[float]) -> str:
    """Lowest and highest."""
    return f"[{min(times):.3f}, {max(times):.3f}]"


def measure(name: str, filters: Filters, snapshots: tuple[Snapshot, Snapshot, Snapshot]) -> dict[str, object]:
    """Times of one filter over a catalog without a cache, with one, and with changes."""
    uncached, cached, live = snapshots
    eligible = check(cached, filters)
    shown = np.flatnonzero(cached.select(filters).base.keeps(np.arange(cached.base.catalog.num_items)))
    excluded = cached.base.catalog.item_ids[shown[:: max(1, len(shown) // EXCLUDED)]][:EXCLUDED]
    excluding = replace(filters, exclude_items=tuple(excluded.tolist()))
    calls: dict[str, Callable[[], object]] = {
        "uncached": lambda: uncached.select(filters).mask,
        "cached": lambda: cached.select(filters).mask,
        "excluding": lambda: cached.select(excluding).mask,
        "live": lambda: live.select(excluding).mask,
        "decode": search(cached.trie),
        "decode_masked": search(cached.trie, cached.select(filters).mask),
    }
    row: dict[str, object] = {"filter": name, "items": cached.num_items, "eligible": eligible}
    medians = {}
    for call, work in calls.items():
        times = timed(work, 25)
        medians[call] = statistics.median(times)
        row |= {f"{call}_ms": round(medians[call], 4), f"{call}_range": spread(times)}
    share = medians["cached"] / (medians["cached"] + medians["decode_masked"])
    return row | {"cached_share": round(share, 4), "hardware": hardware()}


def main() -> None:
    """Measure every filter."""
    parser = argparse.ArgumentParser(description="Time filters as masks over a large catalog.")
    parser.add_argument("--items", type=int, default=1_000_000, help="catalog size (default 1000000)")
    parser.add_argument("--json", action="store_true", help="one JSON object per line and nothing else")
    arguments = parser.parse_args()
    texts = titles(arguments.items)
    start = time.perf_counter()
    words = WordIndex.of(texts)
    made = {"words": len(words.words), "made_s": round(time.perf_counter() - start, 2)}
    megabytes = round(sum(array.nbytes for array in words.arrays.values()) / 1e6, 1)
    report({"items": arguments.items, **made, "mb": megabytes, "hardware": hardware()}, arguments.json)
    items = Catalog.of(columns(arguments.items, words))
    trie = SidTrie.build(items.sids, SIZES)
    nothing = Catalog.of(columns(0, WordIndex.of([])))
    plain = Version(0, items, trie)
    forgetful = Version(0, items, trie, RecentlyUsed(0))
    none = np.zeros(0, dtype=np.int64)
    snapshots = (
        Snapshot("b", 0, forgetful, nothing, none),
        Snapshot("b", 0, plain, nothing, none),
        changed(plain),
    )
    for name, filters in FILTERS.items():
        report(measure(name, filters, snapshots), arguments.json)


if __name__ == "__main__":
    main()
