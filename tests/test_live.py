"""The live catalog against a catalog written anew from the same items after every step, and under load."""

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_catalog import make_items

from onesearch.catalog import Catalog, Filters, Item, write_catalog
from onesearch.decode import BeamConfig, beam_search
from onesearch.errors import BundleError
from onesearch.live import Change, LiveCatalog
from onesearch.text import words
from onesearch.versions import list_versions, open_version, remove_versions
from trie import SidTrie

SIZES = (3, 3, 3, 3, 3)


def quantise(texts) -> np.ndarray:
    """A SID that depends on the title alone; few of them, so that items collide with old and with new ones."""
    return np.asarray(
        [[sum(text.encode()) % 3, len(text) % 3, 0, len(text) % 2, 0] for text in texts], dtype=np.uint16
    )


class World:
    """A live catalog beside the plain list of what it must hold."""

    def __init__(self, folder: Path, seed: int = 0, count: int = 40) -> None:
        made, sids, popularity = make_items(count, seed)
        items = [replace(item, item_id=n) for n, item in enumerate(made)]
        write_catalog(folder, items, sids, popularity)
        catalog = Catalog(folder)
        self.live = LiveCatalog(catalog, SidTrie.build(sids, SIZES), "v", quantise)
        self.first = {i.item_id: (i, sid, p) for i, sid, p in zip(items, sids, popularity, strict=True)}
        self.now = dict(self.first)
        self.seq = 0

    def change(self, *changes: tuple[int, Item | None, bool]) -> None:
        made = [Change(self.seq + n, *change) for n, change in enumerate(changes, 1)]
        self.seq += len(made)
        self.live.apply(made)
        for change in made:
            known = self.first.get(change.item_id)
            if change.reset and known:
                self.now[change.item_id] = known
            elif change.item is None:
                self.now.pop(change.item_id, None)
            elif known and known[0].text() == change.item.text():
                self.now[change.item_id] = (change.item, known[1], known[2])
            else:
                sid = quantise([change.item.text()])[0]
                self.now[change.item_id] = (change.item, sid, known[2] if known else np.float32(0))

    def expected(self, filters: Filters) -> list[int]:
        """Ids of all eligible items: by SID in code order, then popularity, then id."""
        keys = [(*sid.tolist(), -float(p), i.item_id) for i, sid, p in self.now.values() if passes(i, filters)]
        return [key[-1] for key in sorted(keys)]

    def check(self, filters: Filters, limit: int = 1000) -> None:
        """A search in which all SIDs score the same lists SIDs in code order, hence everything in `expected` order."""
        snapshot = self.live.snapshot
        assert snapshot.num_items == len(self.now)
        expected = self.expected(filters)
        selection = snapshot.select(filters)
        assert selection.count == len(expected)
        found = beam_search(flat, snapshot.trie, BeamConfig(width=300, top_n=300), selection.mask)
        rows, sources = snapshot.expand(found.leaves, limit, selection)
        ids = [snapshot.item(row).item_id for row in rows.tolist()]
        assert ids == expected[:limit]
        assert len(np.unique(found.codes, axis=0)) == len(found.codes)
        assert snapshot.sids_at(rows).tolist() == found.codes[sources].tolist()
        assert [snapshot.item(row) for row in rows.tolist()] == [self.now[i][0] for i in ids]


def flat(codes, parents):
    return np.zeros((len(codes), 3), dtype=np.float32)


def passes(item: Item, f: Filters) -> bool:
    return (
        item.item_id not in f.exclude_items
        and (f.brand is None or item.brand.casefold() == f.brand)
        and (f.price_max is None or (item.price is not None and item.price <= f.price_max))
        and (f.in_stock is None or item.in_stock == f.in_stock)
        and (not f.words or len(set(words(item.text())) & set(f.words)) >= f.least_words)
    )


IDS = st.integers(0, 60)  # the first forty are in the catalog from the start
TITLES = ("mug", "red mug", "lamp")


@st.composite
def batches(draw, world: World):
    """Changes of up to twelve items: new ones, other texts, the same text with another price, removals, resets."""
    made = []
    for item_id in draw(st.lists(IDS, min_size=1, max_size=12)):
        kind = draw(st.sampled_from(["put", "put", "reprice", "remove", "reset"]))
        price, in_stock = draw(st.none() | st.integers(1, 50).map(float)), draw(st.booleans())
        item = Item(
            item_id, draw(st.sampled_from(TITLES)), draw(st.sampled_from(["Acme", ""])), (), price, None, in_stock
        )
        if kind == "reprice" and item_id in world.first:
            item = replace(world.first[item_id][0], price=price, in_stock=in_stock)
        made.append((item_id, None if kind in ("remove", "reset") else item, kind == "reset"))
    return made


@st.composite
def filters(draw):
    return Filters(
        brand=draw(st.sampled_from([None, None, "acme"])),
        price_max=draw(st.none() | st.integers(1, 50).map(float)),
        in_stock=draw(st.none() | st.booleans()),
        exclude_items=tuple(draw(st.lists(IDS, max_size=20))),
        words=tuple(draw(st.lists(st.sampled_from(["red", "mug", "item", "acme", "7"]), unique=True))),
        least_words=draw(st.integers(0, 3)),
    )


@given(st.data(), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_after_any_changes_it_equals_a_catalog_written_anew(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("world")
    world = World(folder, seed)
    for _ in range(data.draw(st.integers(1, 5))):
        world.change(*data.draw(batches(world)))
        if data.draw(st.integers(0, 3)) == 0:
            world.live.compact(folder)
            assert world.live.pending == 0 or not world.now
        for _ in range(3):
            world.check(data.draw(filters()), data.draw(st.sampled_from([1000, 7, 1])))
        for item_id in range(61):
            row = world.live.snapshot.row_of(item_id)
            assert (row is None) == (item_id not in world.now)
            assert row is None or world.live.snapshot.item(row) == world.now[item_id][0]
        asked = data.draw(st.lists(IDS, max_size=30))
        rows = world.live.snapshot.rows_of(asked)
        assert [world.live.snapshot.item(row).item_id for row in rows.tolist()] == [
            i for i in asked if i in world.now
        ]


def test_every_change_changes_the_version_and_compaction_does_not(tmp_path: Path) -> None:
    world, seen = World(tmp_path), ["v"]
    assert world.live.snapshot.version == "v"
    for item in (Item(50, "mug"), Item(3, "mug"), None):
        world.change((50, item, False))
        assert world.live.snapshot.version not in seen
        seen.append(world.live.snapshot.version)
        world.live.compact(tmp_path)
        assert world.live.snapshot.version == seen[-1]


def test_a_snapshot_that_is_held_stays_what_it_was(tmp_path: Path) -> None:
    world = World(tmp_path)
    held, before = world.live.snapshot, world.expected(Filters())
    world.change((3, None, False), (50, Item(50, "mug"), False))
    world.live.compact(tmp_path)
    remove_versions(tmp_path, keep=0)
    for snapshot, ids in ((held, before), (world.live.snapshot, world.expected(Filters()))):
        rows, _ = snapshot.expand(beam_search(flat, snapshot.trie, BeamConfig(300, 300)).leaves, 1000)
        assert [snapshot.item(row).item_id for row in rows.tolist()] == ids


def test_what_no_search_holds_any_more_is_let_go(tmp_path: Path) -> None:
    world, held = World(tmp_path), []
    for n in range(30):
        world.change((n, Item(n, "mug"), False))
        world.live.snapshot.select(Filters(brand="acme"))
        held += [weakref.ref(world.live.snapshot), weakref.ref(world.live.snapshot.base)]
        if n % 10 == 9:
            world.live.compact(tmp_path)
    gc.collect()
    alive = {id(each()) for each in held if each() is not None}
    assert alive <= {id(world.live.snapshot), id(world.live.snapshot.base), id(world.live._origin)}


def test_changes_that_were_applied_before_are_skipped(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.change((50, Item(50, "mug"), False))
    first = world.live.snapshot
    world.live.apply([Change(1, 50, None)])
    assert world.live.snapshot is first


def test_the_service_may_order_the_items_of_a_sid(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.change(*[(50 + n, Item(50 + n, "mug"), False) for n in range(5)])
    snapshot = world.live.snapshot
    leaves = beam_search(flat, snapshot.trie, BeamConfig(300, 300)).leaves
    rows, sources = snapshot.expand(leaves, 1000, popularity=lambda ids, trained: (ids % 7).astype(np.float32))
    ids = [snapshot.item(row).item_id for row in rows.tolist()]
    keys = [(source, -(item_id % 7), item_id) for source, item_id in zip(sources.tolist(), ids, strict=True)]
    assert keys == sorted(keys)
    assert sorted(ids) == sorted(world.now)


def test_a_catalog_can_lose_all_its_items_and_get_new_ones(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.change(*[(item_id, None, False) for item_id in world.first])
    world.live.compact(tmp_path)
    world.check(Filters())
    assert list_versions(tmp_path) == []
    world.change((7, Item(7, "mug"), False))
    world.check(Filters())
    world.check(Filters(brand="acme"))


def test_a_version_says_where_it_is_damaged(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.change((50, Item(50, "mug"), False))
    world.live.compact(tmp_path)
    assert open_version(tmp_path / "1").catalog.num_items == 41
    body = tmp_path / "1" / "items" / "items.bin"
    body.write_bytes(body.read_bytes().replace(b"mug", b"rug"))
    with pytest.raises(BundleError, match=r"items/items.bin: is damaged"):
        open_version(tmp_path / "1")
    (tmp_path / "1" / "version.json").unlink()
    with pytest.raises(BundleError, match="no version"):
        open_version(tmp_path / "1")


def test_searches_go_on_undisturbed_while_everything_changes(tmp_path: Path) -> None:
    """Four readers against a writer and a compactor: every answer is a whole state, the newest or the one before."""
    world, stop = World(tmp_path), threading.Event()
    counts: dict[str, int] = {"v": len(world.now)}
    faults: list[str] = []
    answered = [0] * 4

    def read(reader: int) -> None:
        chosen = Filters(in_stock=True) if reader % 2 else Filters()
        while not stop.is_set():
            snapshot = world.live.snapshot
            selection = snapshot.select(chosen)
            found = beam_search(flat, snapshot.trie, BeamConfig(300, 300), selection.mask)
            rows, _ = snapshot.expand(found.leaves, 1000, selection)
            items = [snapshot.item(row) for row in rows.tolist()]
            ids = [item.item_id for item in items]
            if len(set(ids)) != len(ids) or len(ids) != selection.count:
                faults.append(f"{snapshot.version}: {len(ids)} items, {len(set(ids))} of them distinct")
            if reader % 2 and not all(item.in_stock for item in items):
                faults.append(f"{snapshot.version}: shows what is not in stock")
            if not reader % 2 and len(ids) != counts[snapshot.version]:
                faults.append(f"{snapshot.version}: {len(ids)} items, expected {counts[snapshot.version]}")
            if not reader % 2 and len({item.title for item in items if item.item_id >= 1000}) > 1:
                faults.append(f"{snapshot.version}: half a batch")
            answered[reader] += 1

    def compact() -> None:
        while not stop.is_set():
            world.live.compact(tmp_path)
            remove_versions(tmp_path, keep=world.live.snapshot.base.seq)

    def guarded(work: Callable[..., None], *args: int) -> None:
        try:
            work(*args)
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=guarded, args=(read, n)) for n in range(4)]
    threads.append(threading.Thread(target=guarded, args=(compact,)))
    for thread in threads:
        thread.start()
    rng = np.random.default_rng(0)
    try:
        for n in range(300):
            batch = [Item(1000 + i, f"batch {n % 9}", in_stock=bool(n % 2)) for i in range(20)]
            single = int(rng.integers(0, 60))
            made = [(i.item_id, i, False) for i in batch]
            made.append((single, None if n % 3 else Item(single, TITLES[n % 2], price=float(n)), False))
            planned = {**world.now, **{i: (item, None, None) for i, item, _ in made if item}}
            planned = {i: kept for i, kept in planned.items() if i != single or made[-1][1]}
            counts[f"v+{world.seq + len(made)}"] = len(planned)
            world.change(*made)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert min(answered) > 20
    world.check(Filters())
    assert world.live.snapshot.base.seq > 0
