"""The circuit breaker against a real Redis that is killed, frozen and brought back, and its states by the clock."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import RETENTION, TTL
from redis_server import RedisServer
from service_fakes import FIRST_ID, fake_deployment, fake_engine, fake_settings
from starlette.testclient import TestClient

from service import breaker as breaker_module
from service.app import create_app
from service.breaker import FAILURES_IN_A_ROW, RECENT_CALLS, Breaker, BreakerState
from service.state import StateStore, StateUnavailable, Visit
from service.store import redis_store

TIMEOUT = 0.05
pytestmark = pytest.mark.anyio


class CountedUsers:
    """User state that counts the searches that got as far as asking for it."""

    def __init__(self, users: StateStore) -> None:
        self._users, self.asked = users, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._users, name)

    async def visit(self, *arguments: Any) -> Visit:
        self.asked += 1
        return await self._users.visit(*arguments)


class Service:
    """A gateway over a Redis that the test mistreats."""

    def __init__(self, folder: Path, server: RedisServer) -> None:
        self.server = server
        settings = fake_settings(folder).model_copy(update={"state_timeout_ms": int(TIMEOUT * 1000)})
        store = redis_store(server.url, TTL, RETENTION, TIMEOUT)
        self.users = CountedUsers(store.users)
        store = replace(store, users=self.users)
        self.client = TestClient(create_app(settings, fake_deployment(fake_engine(folder)), store))

    def search(self) -> list[str]:
        """What a search went without."""
        answer = self.client.post("/v1/search", json={"query": "shoes", "user_id": "ann"})
        assert answer.status_code == 200
        assert len(answer.json()["items"]) == 2
        degraded: list[str] = answer.json()["degraded"]
        return degraded

    def searches_away(self, count: int) -> int:
        """Searches while Redis is away: each does without it. How many of them waited for it."""
        before = self.users.asked
        assert [self.search() for _ in range(count)] == [["state_unavailable"]] * count
        return self.users.asked - before

    def click(self) -> int:
        event = {"type": "click", "item_id": FIRST_ID, "user_id": "ann", "event_id": "e1"}
        return int(self.client.post("/v1/events", json=event).status_code)

    def until_personal(self) -> float:
        """Seconds until searches have their history again."""
        started = time.monotonic()
        while self.search():
            assert time.monotonic() - started < 10
            time.sleep(0.02)
        return time.monotonic() - started


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Service]:
    server = RedisServer(tmp_path, durable=True)
    service = Service(tmp_path, server)
    with service.client:
        yield service
    server.thaw()
    server.kill()


@pytest.mark.redis
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_searches_do_without_a_redis_that_is_away_and_have_it_back_without_a_restart(
    running: Service, how: str
) -> None:
    running.search()
    assert running.search() == []
    if how == "killed":
        running.server.kill()
    else:
        running.server.freeze()
    assert running.searches_away(200) <= FAILURES_IN_A_ROW  # while open no request pays the timeout
    assert running.click() == 503
    assert 'onesearch_store_breaker{state="closed"} 0.0' in running.client.get("/metrics").text
    if how == "killed":
        running.server.start()
    else:
        running.server.thaw()
    assert running.until_personal() < 5
    assert running.click() == 202
    assert 'onesearch_store_breaker{state="closed"} 1.0' in running.client.get("/metrics").text


@pytest.mark.redis
def test_a_flapping_redis_costs_few_timeouts(running: Service) -> None:
    running.search()
    for _ in range(3):
        running.server.freeze()
        assert 1 <= running.searches_away(40) <= FAILURES_IN_A_ROW
        running.server.thaw()
        running.until_personal()


class Flaky:
    """A store whose calls fail or hang on demand."""

    def __init__(self) -> None:
        self.mode, self.calls, self.pings = "good", 0, 0

    async def call(self) -> int:
        self.calls += 1
        return await self._answer()

    async def ping(self) -> None:
        self.pings += 1
        await self._answer()

    async def _answer(self) -> int:
        if self.mode == "hang":
            await asyncio.sleep(60)
        if self.mode == "down":
            raise StateUnavailable("down")
        return 7


async def failed(breaker: Breaker, store: Flaky) -> bool:
    try:
        assert await breaker.call(store.call) == 7
    except StateUnavailable:
        return True
    return False


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(breaker_module, "LONGEST_PAUSE", 0.04)


@pytest.mark.parametrize("mode", ["down", "hang"])
async def test_it_opens_after_failures_in_a_row_probes_by_itself_and_closes(fast: Any, mode: str) -> None:
    store, states = Flaky(), list[BreakerState]()
    breaker = Breaker(store.ping, 0.01, states.append)
    assert not await failed(breaker, store)
    store.mode = mode
    assert [await failed(breaker, store) for _ in range(10)] == [True] * 10
    assert (store.calls, breaker.state) == (1 + FAILURES_IN_A_ROW, "open")
    await asyncio.sleep(0.3)
    assert 2 <= store.pings <= 15  # with growing pauses
    assert breaker.state != "closed"
    store.mode = "good"
    for _ in range(100):
        await asyncio.sleep(0.01)
        if breaker.state == "closed":
            break
    assert not await failed(breaker, store)
    assert states[:2] == ["open", "half_open"]
    assert states[-2:] == ["half_open", "closed"]
    await breaker.close()


async def test_a_call_may_be_given_more_time_than_others() -> None:
    breaker = Breaker(Flaky().ping, 0.01, lambda state: None)
    with pytest.raises(StateUnavailable, match=r"longer than 0\.01 s"):
        await breaker.call(lambda: asyncio.sleep(0.05))
    assert await breaker.call(lambda: asyncio.sleep(0.05, "written"), timeout=5) == "written"


async def test_it_opens_when_half_of_the_recent_calls_fail_and_not_before(fast: Any) -> None:
    store = Flaky()
    breaker = Breaker(store.ping, 0.01, lambda state: None)
    for _ in range(RECENT_CALLS // 2):
        assert breaker.state == "closed"
        store.mode = "down"
        assert await failed(breaker, store)
        store.mode = "good"
        await failed(breaker, store)
    assert breaker.state == "open"
    await breaker.close()
