"""A service without a model: a real tiny catalog, a runner that ranks by shared words, stores that fail."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np

from onesearch.catalog import Catalog, Item, write_catalog
from onesearch.context import SearchContext
from onesearch.facets import count_facets
from onesearch.live import LiveCatalog
from onesearch.search import SearchOptions, SearchResult
from service.deployment import Deployment, Engine
from service.settings import Settings
from service.state import StateUnavailable
from service.store import Store
from service.variants import VariantOptions, WeightedSplit
from trie import SidTrie

TITLES = (
    ("Trail running shoes", "Fleet", "shoes", 79.0),
    ("Road running shoes", "Fleet", "shoes", 99.5),
    ("Running socks", "Pace", "socks", 9.0),
    ("Leather <b>boots</b>", "Oak", "shoes", 149.0),
    ("Wool socks “warm”", "Oak", "socks", None),
    ("Espresso machine", "Crema", "kitchen", 249.0),
)
FIRST_ID = 100


def tiny_catalog(folder: Path) -> LiveCatalog:
    """Catalog "c1": six items with ids from FIRST_ID, two to a SID; the third is out of stock."""
    items = [
        Item(FIRST_ID + i, title, brand, ("sport" if i < 5 else "home", category), price, None, i != 2)
        for i, (title, brand, category, price) in enumerate(TITLES)
    ]
    sids = np.asarray([[i // 2, 0, i // 2, 1, 0] for i in range(len(items))], dtype=np.uint16)
    folder.mkdir(parents=True)
    write_catalog(folder, items, sids, np.zeros(len(items), dtype=np.float32))
    new = np.asarray([1, 1, 1, 1, 1], dtype=np.uint16)
    return LiveCatalog(
        Catalog(folder), SidTrie.build(sids, (3, 2, 3, 2, 2)), "c1", lambda texts: new[None].repeat(len(texts), 0)
    )


class FakeRunner:
    """Ranks items by how many words of the query their title has. A query "boom" fails, as a model might."""

    def __init__(self, live: LiveCatalog) -> None:
        self.live = live
        self.seen: list[tuple[SearchContext, SearchOptions]] = []
        self.closed = False

    async def search(self, context: SearchContext, options: SearchOptions) -> SearchResult:
        self.seen.append((context, options))
        await asyncio.sleep(0)
        if context.query == "boom":
            raise RuntimeError(f"the model broke on {context.query!r}")
        words = context.query.casefold().split()
        catalog = self.live.snapshot
        everything, _ = catalog.expand(np.arange(catalog.trie.num_sids), 1000, catalog.select(options.filters))
        titles = {row: catalog.item(row).title.casefold() for row in everything.tolist()}
        hits = {row: sum(word in title for word in words) for row, title in titles.items()}
        ranked = sorted((i for i, hit in hits.items() if hit), key=lambda i: (-hits[i], i))
        facets = count_facets(catalog, np.asarray(ranked, dtype=np.int64)) if options.facets else None
        rows = ranked[: options.limit]
        scores = np.asarray([-1.0 / hits[row] for row in rows], dtype=np.float32)
        timings = {"understand": 0.1, "mask": 0.0, "prefill": 1.0, "decode": 2.0, "expand": 0.1}
        keywords = tuple(words) if options.keywords else ()
        query_sid = np.zeros(5, dtype=np.uint16)
        found = np.asarray(rows, dtype=np.int64)
        eligible = len(everything)
        return SearchResult(catalog, found, scores, query_sid, keywords, (1, 3), timings, eligible, facets=facets)

    async def close(self) -> None:
        self.closed = True


def broken_store(delay: float = 0.0) -> Store:
    """A store that is down, or hangs."""

    class Broken:
        def __getattr__(self, name: str) -> Any:
            return fail

    async def fail(*arguments: Any) -> None:
        await asyncio.sleep(delay)
        raise StateUnavailable("down")

    async def close() -> None:
        pass

    return Store(Broken(), Broken(), Broken(), ping=fail, close=close)


def fake_engine(folder: Path, faults: tuple[str, ...] = ()) -> Engine:
    """An engine named "tiny" over the tiny catalog; its check reports the given faults."""
    live = tiny_catalog(folder / "items")
    return Engine(
        name="tiny",
        model_version="m1",
        identifiers="tiny",
        live=live,
        runner=FakeRunner(live),
        check=lambda: list(faults),
        examples=("running shoes", "wool socks"),
    )


def fake_deployment(engine: Engine) -> Deployment:
    """Two equal variants of one engine: control, and keywords on."""
    options = VariantOptions(bundle=engine.name, width=64)
    return Deployment(
        [engine], WeightedSplit({"control": options, "keywords": options.model_copy(update={"keywords": True})})
    )


def fake_settings(folder: Path) -> Settings:
    """Settings with the state in a file of the given folder and a patient state timeout."""
    return Settings(state=f"sqlite:{folder / 'state.sqlite3'}", catalog=folder / "catalog", state_timeout_ms=5000)
