"""The items API over a fake model: visible at once, durable, undone by a rollback, and only with the key."""

import asyncio
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from pydantic import SecretStr
from service_fakes import FIRST_ID, fake_deployment, fake_engine, fake_settings
from starlette.testclient import TestClient
from test_service import assert_problem

from onesearch.catalog import Filters, Item
from onesearch.decode import BeamConfig, beam_search
from onesearch.errors import ConfigError
from service.app import create_app
from service.items import Items
from service.journal import Journal, NothingToRollBack
from service.settings import load_settings
from service.store import open_store
from service.telemetry import Metrics

KEY = "correct horse battery"
ADMIN = {"Authorization": f"Bearer {KEY}"}
MUG = {"title": "Running mug", "brand": "Clay", "category": ["home", "kitchen"], "price": 12.5}


def start(folder: Path, **more: Any) -> TestClient:
    """A service whose catalog folder outlives it; the bundle is written anew each time, with the same content."""
    settings = fake_settings(folder).model_copy(update={"admin_key": SecretStr(KEY), **more})
    bundle = folder / f"bundle-{len(list(folder.glob('bundle-*')))}"
    bundle.mkdir()
    app = create_app(settings, fake_deployment(fake_engine(bundle)), open_store(settings))
    return TestClient(app, raise_server_exceptions=False, headers=ADMIN)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with start(tmp_path) as started:
        yield started


def found(client: TestClient, query: str = "running", **more: Any) -> list[int]:
    answer = client.post("/v1/search", json={"query": query, "limit": 100, **more})
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def version(client: TestClient) -> str:
    return str(client.get("/v1/catalog").json()["catalog_version"])


def test_a_new_item_is_in_the_next_search_with_its_sid(client: TestClient) -> None:
    answer = client.put("/v1/items/7", json={**MUG, "attributes": {"colour": "red"}, "published_at": "2026-01-02"})
    assert answer.status_code == 201
    assert answer.json()["sid"] == [1, 1, 1, 1, 1]
    assert answer.json()["published_at"] == 1767312000
    assert answer.json() == client.get("/v1/items/7").json()
    body = client.post("/v1/search", json={"query": "mug"}).json()
    (item,) = body["items"]
    assert (item["item_id"], item["title"], item["price"]) == (7, "Running mug", 12.5)
    assert (item["attributes"], item["sid"]) == ({"colour": "red"}, [1, 1, 1, 1, 1])
    assert body["catalog_version"] == answer.json()["catalog_version"] == version(client) == "c1+1"
    assert found(client, "mug", filters={"brand": "clay", "published_after": "2026-01-02T00:00:00Z"}) == [7]
    assert found(client, "mug", filters={"published_after": 1767312001}) == []
    assert found(client, "mug", filters={"category": "kitchen", "price_max": 12}) == []


def test_a_changed_item_is_shown_as_it_is_now_and_keeps_its_place(client: TestClient) -> None:
    before = client.get(f"/v1/items/{FIRST_ID}").json()
    kept = {key: before[key] for key in ("title", "brand", "category", "image_url", "attributes")}
    answer = client.put(f"/v1/items/{FIRST_ID}", json={**kept, "price": 5, "in_stock": False})
    assert answer.status_code == 200
    assert (answer.json()["price"], answer.json()["in_stock"]) == (5, False)
    assert answer.json()["sid"] == before["sid"]
    assert FIRST_ID in found(client, "trail running shoes")
    assert FIRST_ID not in found(client, filters={"in_stock": True})


def test_a_removed_item_is_gone_at_once(client: TestClient) -> None:
    assert FIRST_ID in found(client)
    answer = client.delete(f"/v1/items/{FIRST_ID}")
    assert answer.json() == {"catalog_version": "c1+1"}
    assert FIRST_ID not in found(client)
    assert_problem(client.get(f"/v1/items/{FIRST_ID}"), 404)
    assert_problem(client.delete(f"/v1/items/{FIRST_ID}"), 404)
    assert (
        client.post("/v1/events", json={"type": "click", "item_id": FIRST_ID, "user_id": "u"}).status_code == 422
    )
    assert version(client) == "c1+1"


def test_a_bulk_of_changes_becomes_visible_together(client: TestClient) -> None:
    body = {"put": [{**MUG, "item_id": i} for i in range(1, 6)], "delete": [FIRST_ID, 999]}
    answer = client.post("/v1/items:bulk", json=body)
    assert answer.json() == {"catalog_version": "c1+6", "put": 5, "deleted": 1, "not_found": [999]}
    assert sorted(found(client, "mug")) == [1, 2, 3, 4, 5]
    assert client.get("/v1/catalog").json()["items"] == 10
    assert client.get("/v1/catalog").json()["bundles"] == [
        {"name": "tiny", "catalog_version": "c1+6", "items": 10, "changed": 6}
    ]
    many = {"put": [{**MUG, "item_id": 1000 + i, "attributes": {"note": "x" * 200}} for i in range(1000)]}
    assert client.post("/v1/items:bulk", json=many).json()["put"] == 1000
    assert len(found(client, "mug")) == 100


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"title": ""}, "title"),
        ({"title": None}, "title"),
        ({"price": -1}, "price"),
        ({"price": "12"}, "price"),
        ({"category": ["a", "b", "c", "d"]}, "category"),
        ({"category": [""]}, "category.0"),
        ({"in_stock": 1}, "in_stock"),
        ({"attributes": {"a": {"b": 1}}}, "attributes.a"),
        ({"published_at": "yesterday"}, "published_at"),
        ({"titel": "x"}, "titel"),
        ({"brand": "a\u0000b"}, "brand"),
    ],
)
def test_a_wrong_item_names_the_field_and_changes_nothing(
    client: TestClient, change: dict[str, Any], field: str
) -> None:
    problem = assert_problem(client.put("/v1/items/7", json={**MUG, **change}), 422)
    assert any(error["field"].startswith(field) for error in problem["errors"]), problem
    bulk = {"put": [{**MUG, "item_id": 1}, {**MUG, **change, "item_id": 2}]}
    problem = assert_problem(client.post("/v1/items:bulk", json=bulk), 422)
    assert any(error["field"].startswith(f"put.1.{field}") for error in problem["errors"]), problem
    assert version(client) == "c1"


def test_a_bulk_is_bounded_and_names_each_item_once(client: TestClient) -> None:
    for body in (
        {},
        {"delete": list(range(1001))},
        {"put": [{**MUG, "item_id": 1}], "delete": list(range(2, 1003))},
    ):
        assert_problem(client.post("/v1/items:bulk", json=body), 422)
    twice = client.post("/v1/items:bulk", json={"put": [{**MUG, "item_id": 5}], "delete": [5]})
    assert "item 5" in assert_problem(twice, 422)["detail"]
    assert_problem(client.post("/v1/items:bulk", json={"delete": [1], "x": "y" * 5_000_000}), 413)
    assert_problem(client.put("/v1/items/7", json={**MUG, "image_url": "x" * 70_000}), 413)
    assert_problem(client.put(f"/v1/items/{2**63}", json=MUG), 422)


CHANGES = (
    ("PUT", "/v1/items/7"),
    ("DELETE", "/v1/items/7"),
    ("POST", "/v1/items:bulk"),
    ("POST", "/v1/catalog/rollback"),
)


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_changes_need_the_key_and_reading_does_not(
    client: TestClient, method: str, path: str, tmp_path: Path
) -> None:
    for given in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer ключ"):
        answer = client.request(method, path, json={}, headers={"Authorization": given.encode()})
        problem = assert_problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in answer.text
        assert problem["type"].endswith("unauthorized")
    assert client.get(f"/v1/items/{FIRST_ID}", headers={"Authorization": ""}).status_code == 200
    assert version(client) == "c1"


def test_without_a_key_nobody_may_change_anything(tmp_path: Path) -> None:
    with start(tmp_path, admin_key=None) as client:
        for method, path in CHANGES:
            assert_problem(client.request(method, path, json={}, headers=ADMIN), 403)


def test_changes_outlive_a_restart_compacted_or_not(tmp_path: Path) -> None:
    with start(tmp_path) as client:
        client.put("/v1/items/7", json=MUG)
        client.delete(f"/v1/items/{FIRST_ID}")
    for compact_after in (2, 1000):
        with start(tmp_path, compact_after=compact_after) as client:
            assert (found(client, "mug"), version(client)) == ([7], "c1+2")
            assert FIRST_ID not in found(client)
    (seq,) = (path.name for path in (tmp_path / "catalog" / "versions").glob("*/[0-9]*"))
    assert seq == "2"
    with start(tmp_path) as client:
        assert client.get("/v1/catalog").json()["bundles"][0]["changed"] == 0
        client.put("/v1/items/8", json=MUG)
    for damaged in (tmp_path / "catalog" / "versions").glob("*/2/items/items.bin"):
        damaged.write_bytes(b"{}")
    with start(tmp_path) as client:
        assert sorted(found(client, "mug")) == [7, 8]
        assert client.get("/v1/catalog").json()["bundles"][0]["changed"] == 3


def test_a_rollback_goes_from_version_to_version(tmp_path: Path) -> None:
    with start(tmp_path) as client:
        items: Items = client.app_state["items"]
        assert client.portal is not None
        assert_problem(client.post("/v1/catalog/rollback"), 409)
        before = found(client)
        client.put("/v1/items/7", json=MUG)
        client.delete(f"/v1/items/{FIRST_ID}")
        assert client.post("/v1/catalog/rollback").json() == {"catalog_version": "c1+4"}
        assert sorted(found(client)) == sorted(before)
        assert_problem(client.post("/v1/catalog/rollback"), 409)
        client.put("/v1/items/8", json=MUG)
        client.portal.call(items.compact)
        client.put("/v1/items/8", json={**MUG, "price": 1})
        client.put("/v1/items/9", json=MUG)
        client.portal.call(items.compact)
        client.put("/v1/items/10", json=MUG)
        prices = []
        for expected in ([8, 9], [8], None):
            answer = client.post("/v1/catalog/rollback")
            if expected is None:
                assert_problem(answer, 409)
                continue
            assert sorted(found(client, "mug")) == expected
            prices.append(client.get("/v1/items/8").json()["price"])
        assert prices == [1, 12.5]
        text = client.get("/metrics").text
        assert "onesearch_rollbacks_total 3.0" in text
        assert "onesearch_compactions_total 2.0" in text
        assert 'onesearch_item_changes_total{kind="put"} 5.0' in text
    with start(tmp_path) as client:
        assert found(client, "mug") == [8]


def test_processes_that_share_the_folder_see_each_others_changes_in_the_next_search(tmp_path: Path) -> None:
    with start(tmp_path, compact_after=5) as one, start(tmp_path, compact_after=5) as other:
        for n in range(12):
            one.put(f"/v1/items/{n}", json=MUG)
            assert sorted(found(other, "mug")) == list(range(n + 1))
            assert version(other) == version(one)
            other.delete(f"/v1/items/{100 + n}")
            assert found(one) == found(other)
        other.post("/v1/catalog/rollback")
        assert version(one) == version(other)
        assert found(one, "mug") == found(other, "mug")


KILLED = """
import sys
from pathlib import Path
from onesearch.catalog import Filters, Item
from onesearch.decode import BeamConfig, beam_search
from service.journal import Journal
journal = Journal(Path(sys.argv[1]))
for batch in range(10_000):
    journal.append([(i, Item(i, f"batch {batch}")) for i in range(20)])
    print(batch, flush=True)
"""


def test_what_was_accepted_outlives_a_kill_and_half_a_batch_never_shows(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            accepted = [process.stdout.readline() for _ in range(7)]
            os.kill(process.pid, signal.SIGKILL)
            accepted += process.stdout.readlines()
        last = int([line for line in accepted if line.endswith("\n")][-1])
        journal = Journal(path)
        changes = journal.since(0)
        journal.close()
        assert len(changes) % 20 == 0
        newest = changes[-20:]
        assert len({change.item.title for change in newest if change.item}) == 1
        assert newest[0].item is not None
        assert int(newest[0].item.title.split()[1]) >= last


def test_a_torn_tail_is_dropped_and_what_was_before_it_stays(tmp_path: Path) -> None:
    journal, copy = Journal(tmp_path / "journal.sqlite3"), tmp_path / "copy.sqlite3"
    for n in range(3):
        journal.append([(n, Item(n, "mug"))])
    copy.write_bytes((tmp_path / "journal.sqlite3").read_bytes())
    log = (tmp_path / "journal.sqlite3-wal").read_bytes()
    for torn in (log[:-100], log[:-4096], log[:-10] + b"\xff" * 10):
        (tmp_path / "copy.sqlite3-wal").write_bytes(torn)
        (tmp_path / "copy.sqlite3-shm").unlink(missing_ok=True)
        reopened = Journal(copy)
        kept = [change.item_id for change in reopened.since(0)]
        reopened._watch.close()
        assert kept in ([0, 1], [0, 1, 2])
        assert len(kept) == 2 or torn is not log
    journal.close()


OPENING = """
import sys, time
from pathlib import Path
from service.journal import Journal
print(flush=True)
sys.stdin.readline()
print(Journal(Path(sys.argv[1])).id)
"""


def test_workers_that_start_together_open_one_journal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENING, str(tmp_path / "journal.sqlite3")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    identities = [worker.communicate(timeout=30)[0] for worker in workers]
    assert len(set(identities)) == 1
    assert identities[0]


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match=r"journal\.sqlite3"):
        Journal(tmp_path / "journal.sqlite3")


def test_pruning_keeps_every_state_that_can_be_asked_for(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite3")
    state: dict[int, Any] = {}

    def replayed(until: int = 10**9) -> dict[int, Any]:
        return {c.item_id: c.item and c.item.title for c in journal.since(0) if c.seq <= until and not c.reset}

    sealed: list[dict[int, Any]] = []
    for n in range(60):
        item = None if n % 4 == 3 else Item(n % 7, f"state {n}")
        journal.append([(n % 7, item)])
        state[n % 7] = item and item.title
        if n % 10 == 9:
            journal.seal(journal.head())
            sealed.append(dict(state))
        assert replayed() == state
    assert len(journal.since(0)) < 30
    journal.append([(1, Item(1, "late"))])
    journal.roll_back()
    assert replayed() == sealed[-1]
    journal.roll_back()
    assert replayed() == sealed[-2]
    with pytest.raises(NothingToRollBack):
        journal.roll_back()
    journal.close()


def test_a_search_goes_on_while_the_journal_is_away(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    items = Items([engine], tmp_path / "catalog", 100, Metrics())

    async def work() -> None:
        await items.change([(7, Item(7, "mug"))])
        items._journal._watch.close()
        await items.catch_up()
        assert engine.live.snapshot.row_of(7) is not None

    asyncio.run(work())


def test_the_key_is_not_told_when_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONESEARCH_ADMIN_KEY", "short-secret")
    with pytest.raises(ConfigError, match="ONESEARCH_ADMIN_KEY") as caught:
        load_settings()
    assert "short-secret" not in str(caught.value)
    monkeypatch.setenv("ONESEARCH_ADMIN_KEY", KEY)
    assert KEY not in repr(load_settings())


def test_the_journal_is_one_plain_sqlite_file(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.sqlite3").close()
    with sqlite3.connect(tmp_path / "journal.sqlite3") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_searches_never_fail_through_changes_compactions_swaps_and_rollbacks(tmp_path: Path) -> None:
    """Readers check that every page is one whole state; at the end nothing of the old versions is in memory."""
    engine = fake_engine(tmp_path)
    items = Items([engine], tmp_path / "catalog", 30, Metrics())
    stop, faults, searches = threading.Event(), [], [0] * 3

    def read(reader: int) -> None:
        while not stop.is_set():
            try:
                snapshot = engine.live.snapshot
                selection = snapshot.select(Filters(brand="clay", exclude_items=(1000,)) if reader else None)
                found = beam_search(flat, snapshot.trie, BeamConfig(50, 50), selection.mask)
                rows, _ = snapshot.expand(found.leaves, 1000, selection)
                shown = [orjson.loads(snapshot.item_json(row)) for row in rows.tolist()]
                prices = {item["price"] for item in shown if 1000 < item["item_id"] < 2000}
                ids = {item["item_id"] for item in shown}
                if len(ids) != len(shown) or len(ids) != selection.count or len(prices) > 1:
                    faults.append(f"{snapshot.version}: {len(shown)} shown, {len(ids)} distinct, prices {prices}")
                if reader and (1000 in ids or any(item["brand"] != "Clay" for item in shown)):
                    faults.append(f"{snapshot.version}: shows what the filters forbid")
                searches[reader] += 1
            except Exception as error:
                faults.append(repr(error))

    async def write() -> None:
        states: list[tuple[str, int]] = []
        for n in range(100):
            batch = [(1000 + i, Item(1000 + i, "mug", "Clay", price=float(n))) for i in range(12)]
            await items.change([*batch, (2000 + n, Item(2000 + n, "cup", price=float(n))), (2000 + n - 20, None)])
            states.append((engine.live.snapshot.version, engine.live.snapshot.num_items))
            if n % 40 == 39:
                await items.roll_back()
                states.append((engine.live.snapshot.version, engine.live.snapshot.num_items))
        assert len({version for version, _ in states}) == len(states)
        await items.compact()

    threads = [threading.Thread(target=read, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        asyncio.run(write())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert min(searches) > 20
    gc.collect()
    folder = str(tmp_path / "catalog" / "versions")
    mapped = {
        line.split(folder)[1].split("/")[2]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if folder in line
    }
    assert mapped == {str(engine.live.snapshot.base.seq)}
    asyncio.run(items.close())


def flat(codes: np.ndarray, parents: np.ndarray) -> np.ndarray:
    return np.zeros((len(codes), (3, 2, 3, 2, 2)[codes.shape[1]]), dtype=np.float32)
