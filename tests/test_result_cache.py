"""The cache of answers: a hit is the miss again, and whatever an answer follows from makes it a miss."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from service_fakes import FIRST_ID, FakeRunner, fake_deployment, fake_engine, fake_settings
from starlette.testclient import TestClient

from onesearch.errors import DeadlineError
from onesearch.live import Change
from service.admission import Admission, Overloaded
from service.app import create_app
from service.deployment import Deployment
from service.result_cache import ENTRY_BYTES, FRESH_SECONDS, Found, Outcome, ResultCache, Twins
from service.store import Store, open_store
from service.variants import VariantOptions, WeightedSplit

CONTROL = {"X-OneSearch-Variant": "control"}
OWN = re.compile(rb'"request_id":"[^"]*"|"timings_ms":\{[^}]*\}')


class Shop:
    """A service with a cache of four answers."""

    def __init__(self, folder: Path) -> None:
        settings = fake_settings(folder).model_copy(update={"result_cache": 4, "rates_refresh_seconds": 3600.0})
        engine = fake_engine(folder)
        assert isinstance(engine.runner, FakeRunner)
        self.runner, self.live = engine.runner, engine.live
        self.deployment: Deployment = fake_deployment(engine)
        self.store: Store = open_store(settings)
        self.client = TestClient(create_app(settings, self.deployment, self.store))

    def search(self, query: str = "running shoes", variant: dict[str, str] = CONTROL, **more: Any) -> Any:
        answer = self.client.post("/v1/search", json={"query": query, **more}, headers=variant)
        assert answer.status_code == 200, answer.text
        return answer

    def ran(self, query: str = "running shoes", **more: Any) -> bool:
        """Whether a search reached the model."""
        before = len(self.runner.seen)
        self.search(query, **more)
        return len(self.runner.seen) > before

    def click(self, user: str) -> None:
        event = {"type": "click", "item_id": FIRST_ID + 2, "user_id": user}
        assert self.client.post("/v1/events", json=event).status_code == 202


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    started = Shop(tmp_path)
    with started.client:
        yield started


def test_a_hit_is_the_miss_again_but_for_its_id_and_timings(shop: Shop) -> None:
    more: dict[str, Any] = {"facets": True, "filters": {"price_max": 120}, "limit": 3}
    miss, hit = shop.search(**more), shop.search(**more)
    assert len(shop.runner.seen) == 1
    assert OWN.sub(b"", hit.content) == OWN.sub(b"", miss.content)
    assert hit.json()["request_id"] == hit.headers["x-request-id"] != miss.json()["request_id"]
    assert miss.json()["timings_ms"].keys() > hit.json()["timings_ms"].keys() == {"state", "cache", "total"}
    assert hit.json()["facets"]["candidates"] == 3
    text = shop.client.get("/metrics").text
    assert 'onesearch_result_lookups_total{result="hit"} 1.0' in text
    assert 'onesearch_result_lookups_total{result="miss"} 1.0' in text


def test_a_query_is_told_as_it_was_typed(shop: Shop) -> None:
    shop.search("Running  SHOES")
    assert not shop.ran("running shoes")
    assert shop.search("RUNNING shoes").json()["query"] == "RUNNING shoes"


@pytest.mark.parametrize(
    "more",
    [
        {"limit": 7},
        {"filters": {"brand": "fleet"}},
        {"filters": {"exclude_items": [FIRST_ID]}},
        {"facets": True},
        {"variant": {"X-OneSearch-Variant": "keywords"}},
        {"query": "running shoe"},
    ],
)
def test_another_question_is_another_entry(shop: Shop, more: dict[str, Any]) -> None:
    shop.search()
    assert shop.ran(**more)
    assert not shop.ran(**more)
    assert not shop.ran()


def _change_catalog(shop: Shop) -> None:
    item = shop.live.snapshot.item(0)
    shop.live.apply([Change(shop.live.snapshot.seq + 1, item.item_id, replace(item, price=1.0))])


def _reload(shop: Shop) -> None:
    shop.deployment.adopt(WeightedSplit({"control": VariantOptions(bundle="tiny", width=32)}))


def _match(shop: Shop) -> None:
    shop.deployment.adopt(WeightedSplit({"control": VariantOptions(bundle="tiny", width=64, match=True)}))


@pytest.mark.parametrize(
    "change",
    [_change_catalog, _reload, _match, lambda shop: shop.deployment.rates.update({FIRST_ID: (9, 3, 1)})],
    ids=["catalog", "variant", "match", "counters"],
)
def test_a_change_behind_an_answer_makes_it_a_miss(shop: Shop, change: Callable[[Shop], None]) -> None:
    shop.search()
    assert not shop.ran()
    change(shop)
    assert shop.ran()
    assert not shop.ran()


def test_counters_that_say_nothing_new_change_nothing(shop: Shop) -> None:
    shop.search()
    shop.deployment.rates.update({})
    assert not shop.ran()


def test_a_user_gets_answers_of_their_own_history(shop: Shop) -> None:
    shop.search()
    assert not shop.ran(user_id="new")  # a stranger is nobody in particular
    shop.click("ann")
    assert shop.ran(user_id="ann")
    assert not shop.ran(user_id="ann")
    shop.click("ann")
    assert shop.ran(user_id="ann")
    assert not shop.ran()
    shop.client.put("/v1/users/ann", json={"gender": "F"})
    assert shop.ran(user_id="ann")


def test_explained_and_narrowed_searches_stay_off_the_cache(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shop.ran(explain=True)
    assert shop.ran(explain=True)
    assert shop.ran()
    with monkeypatch.context() as pressed:
        pressed.setattr(Admission, "_choose", lambda *_: 32)
        shop.search("socks")
    assert shop.ran("socks")
    assert not shop.ran("socks")


def test_a_known_answer_is_given_under_load_and_a_new_one_is_not(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise Overloaded("full", 1)

    shop.search()
    monkeypatch.setattr(Admission, "check", full)
    assert not shop.ran()
    assert shop.client.post("/v1/search", json={"query": "socks"}).status_code == 503


async def exposures(store: Store) -> list[bytes]:
    return [entry.body for entry in await store.events.entries("", 100) if entry.kind == "exposure"]


@pytest.mark.anyio
async def test_every_answer_is_exposed_under_its_own_id(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    with shop.client:
        told = [shop.search().json()["request_id"] for _ in range(3)]
    reopened = open_store(fake_settings(tmp_path))
    logged = await exposures(reopened)
    await reopened.close()
    assert [sum(f'"{request}"'.encode() in body for body in logged) for request in told] == [1, 1, 1]
    assert all(b'"items":[100,101,102]' in body for body in logged)


def found(size: int) -> Found:
    ids = np.empty(0, dtype=np.int64)
    return Found(b"x" * size, ids, np.zeros(5, np.uint16), (), (), 0, 0, b"", (), "m", "c")


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = ResultCache(2)
    for key in (b"1", b"2"):
        cache.put(key, found(1), 0.0)
    assert cache.get(b"1", 0.0)
    cache.put(b"3", found(1), 0.0)
    assert [cache.get(key, 0.0) is not None for key in (b"1", b"2", b"3")] == [True, False, True]


def test_bytes_are_bounded_and_counted_once() -> None:
    cache = ResultCache(1000, max_bytes=3 * (ENTRY_BYTES + 100))
    for _ in range(5):
        cache.put(b"same", found(100), 0.0)
    for key in (b"1", b"2"):
        cache.put(key, found(100), 0.0)
    assert cache.get(b"same", 0.0)
    cache.put(b"3", found(100), 0.0)
    assert [cache.get(key, 0.0) is not None for key in (b"same", b"1", b"2", b"3")] == [True, False, True, True]
    cache.put(b"4", found(3 * ENTRY_BYTES + 301), 0.0)
    assert cache.get(b"4", 0.0) is None
    assert cache.get(b"3", 0.0)


def test_an_answer_ends_in_time() -> None:
    cache = ResultCache(2)
    cache.put(b"1", found(1), 100.0)
    assert cache.get(b"1", 100.0 + FRESH_SECONDS - 0.1)
    assert cache.get(b"1", 100.0 + FRESH_SECONDS) is None


def outcome(width: int) -> Outcome:
    return found(1), width


@pytest.mark.anyio
async def test_equal_searches_run_once_and_others_for_themselves() -> None:
    twins, ran = Twins(), []

    async def ask(key: bytes) -> tuple[Outcome, bool]:
        async def run() -> Outcome:
            ran.append(key)
            await asyncio.sleep(0.01)
            return outcome(len(ran))

        return await twins.once(key, run, time.monotonic() + 9)

    told = await asyncio.gather(*(ask(key) for key in (b"a", b"a", b"b", b"a")))
    assert ran == [b"a", b"b"]
    assert [shared for _, shared in told] == [False, True, False, True]
    assert told[0][0] is told[1][0] is told[3][0]
    assert not (await ask(b"a"))[1]  # nothing is kept


@pytest.mark.anyio
async def test_a_search_that_fails_or_is_given_up_fails_alone_and_a_late_one_does_not_wait() -> None:
    twins, tries = Twins(), 0

    async def run() -> Outcome:
        nonlocal tries
        tries += 1
        mine = tries
        await asyncio.sleep(0.02)
        if mine == 1:
            raise Overloaded("full", 1)
        if mine == 2:
            await asyncio.sleep(60)
        return outcome(mine)

    async def ask(patience: float = 9.0) -> tuple[Outcome, bool]:
        return await twins.once(b"a", run, time.monotonic() + patience)

    asked = [asyncio.create_task(ask()) for _ in range(3)]
    impatient = asyncio.create_task(ask(0.005))
    with pytest.raises(Overloaded):
        await asked[0]
    with pytest.raises(DeadlineError, match="equal search"):
        await impatient
    await asyncio.sleep(0.03)
    asked[1].cancel()  # its client has gone while it ran for both
    (_, width), shared = await asked[2]
    assert (width, shared) == (3, False)


def test_a_crowd_with_one_question_is_one_search_with_an_answer_each(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = shop.runner.search

    async def slow(context: Any, options: Any) -> Any:
        await asyncio.sleep(0.3)
        return await search(context, options)

    monkeypatch.setattr(shop.runner, "search", slow)
    with ThreadPoolExecutor(6) as crowd:
        answers = list(crowd.map(lambda _: shop.search(), range(6)))
    assert len(shop.runner.seen) == 1
    assert len({answer.json()["request_id"] for answer in answers}) == 6
    assert len({OWN.sub(b"", answer.content) for answer in answers}) == 1
    assert 'onesearch_result_lookups_total{result="shared"} 5.0' in shop.client.get("/metrics").text
