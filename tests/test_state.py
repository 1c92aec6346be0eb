"""User state: one suite that the SQLite file and a real Redis must both pass."""

import asyncio
import random
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import RETENTION, TTL
from redis.asyncio import Redis

from onesearch.errors import ConfigError
from service.events import Event, EventType
from service.keywords import Entry
from service.state import LIMITS, StateUnavailable, UserState
from service.store import Store, redis_store, sqlite_store

NOW = 1_700_000_000.0
pytestmark = pytest.mark.anyio
number = iter(range(1_000_000))


async def ask(store: Store, user: str, query: str, now: float = NOW) -> UserState:
    return (await store.users.visit(user, query, [], now)).state


async def do(store: Store, user: str, kind: EventType, item: int, now: float = NOW) -> None:
    assert await store.events.record([Event(f"e{next(number)}", kind, item, user, now)]) == 1


def values(state: UserState) -> tuple[list[str], list[str], list[str]]:
    return tuple([entry.value for entry in part] for part in (state.queries, state.clicks, state.orders))  # type: ignore[return-value]


async def test_a_user_never_seen_is_unknown(store: Store) -> None:
    state = await store.users.read("ann", NOW)
    assert state == UserState()
    assert not state.known


async def test_a_visit_returns_what_was_before_it_and_keeps_the_query(store: Store) -> None:
    assert await ask(store, "ann", "red shoes") == UserState()
    second = await ask(store, "ann", "socks", NOW + 1)
    assert values(second) == (["red shoes"], [], [])
    assert second.known
    assert values(await store.users.read("ann", NOW + 2)) == (["red shoes", "socks"], [], [])


async def test_a_visit_brings_keywords_with_or_without_a_user(store: Store) -> None:
    entry = Entry(("shoes", "红色"), NOW + 10)
    await store.keywords.finish("a", {"a": entry, "b": Entry((), NOW + 20)}, NOW)
    known = {"a": entry, "b": Entry((), NOW + 20)}
    assert (await store.users.visit("ann", "x", ["a", "b", "c"], NOW)).keywords == known
    assert await store.users.visit(None, "x", ["c", "a"], NOW) == (UserState(), {"a": entry})
    assert values(await store.users.read("ann", NOW))[0] == ["x"]


async def test_items_are_appended_to_the_histories_of_their_events_with_their_times(store: Store) -> None:
    await do(store, "ann", "click", 7, NOW)
    await do(store, "ann", "order", 9, NOW + 0.25)
    await do(store, "ann", "impression", 10, NOW + 0.5)
    await do(store, "ann", "cart", 11, NOW + 0.75)
    state = await store.users.read("ann", NOW + 1)
    assert values(state) == ([], ["7"], ["9"])
    assert [entry.at for entry in (*state.clicks, *state.orders)] == [NOW, NOW + 0.25]
    assert values(state.before(NOW + 0.25)) == ([], ["7"], [])


async def test_a_profile_replaces_the_former_one_and_can_be_dropped(store: Store) -> None:
    await store.users.set_profile("ann", "24-30 F", NOW)
    await store.users.set_profile("ann", "31-40 F", NOW + 1)
    await store.users.set_profile("bob", "50+ M", NOW + 1)
    state = await ask(store, "ann", "x", NOW + 2)
    assert (state.profile, state.known) == ("31-40 F", True)
    await store.users.set_profile("ann", "", NOW + 3)
    assert (await store.users.read("ann", NOW + 3)).profile == ""
    assert (await store.users.read("bob", NOW + 3)).profile == "50+ M"
    assert (await store.users.read("bob", NOW + TTL + 2)).profile == ""


async def test_a_forgotten_user_is_unknown_and_others_stay(store: Store) -> None:
    for user in ("ann", "bob"):
        await ask(store, user, "x")
        await do(store, user, "click", 1)
        await store.users.set_profile(user, "24-30 F", NOW)
    await store.users.forget("ann")
    assert await store.users.read("ann", NOW) == UserState()
    assert values(await store.users.read("bob", NOW)) == (["x"], ["1"], [])


async def test_users_do_not_share_state(store: Store) -> None:
    odd = ["ann", "ann:queries", "{ann}", "a b", "дядя", "*", "ann\u2028"]
    for user in odd:
        await ask(store, user, f"query of {user}")
    for user in odd:
        assert values(await store.users.read(user, NOW))[0] == [f"query of {user}"]


async def test_queries_come_back_letter_by_letter(store: Store) -> None:
    odd = ["  two  spaces ", "红色跑鞋", "a'; DROP TABLE history; --", "1700000000.0 like an entry", '🥾 %s \\ "']
    for query in odd:
        await ask(store, "ann", query)
    assert values(await store.users.read("ann", NOW))[0] == odd


async def test_times_come_back_to_the_last_bit(store: Store) -> None:
    chance = random.Random(1)
    times = sorted(NOW - chance.random() * 1000 for _ in range(25))
    for number, at in enumerate(times):
        await ask(store, "ann", f"q{number}", at)
    assert [query.at for query in (await store.users.read("ann", NOW)).queries] == times


async def test_lists_are_bounded_and_keep_the_latest(store: Store) -> None:
    count = LIMITS["clicks"] + 5
    await store.events.record([Event(f"b{i}", "click", i, "ann", NOW + i) for i in range(count)])
    for i in range(LIMITS["queries"] + 5):
        await ask(store, "ann", f"q{i}", NOW + 200 + i)
    await do(store, "bob", "click", 1)
    await store.events.record([Event(f"o{i}", "order", i, "ann", NOW + i) for i in range(3)])
    queries, clicks, orders = values(await store.users.read("ann", NOW + 300))
    assert queries == [f"q{i}" for i in range(5, LIMITS["queries"] + 5)]
    assert clicks == [str(i) for i in range(count - LIMITS["clicks"], count)]
    assert orders == ["0", "1", "2"]  # however many clicks there are
    assert values(await store.users.read("bob", NOW + 300))[1] == ["1"]


async def test_entries_older_than_the_time_to_live_are_forgotten(store: Store) -> None:
    await ask(store, "ann", "old", NOW)
    await ask(store, "ann", "new", NOW + TTL / 2)
    assert values(await store.users.read("ann", NOW + TTL + 1))[0] == ["new"]
    assert not (await store.users.read("ann", NOW + 2 * TTL)).known


async def test_concurrent_visits_lose_nothing(store: Store) -> None:
    before = await asyncio.gather(*(ask(store, "ann", f"q{i}") for i in range(16)))
    assert sorted(len(state.queries) for state in before) == list(range(16))
    assert sorted(values(await store.users.read("ann", NOW))[0]) == sorted(f"q{i}" for i in range(16))


async def test_sqlite_state_survives_a_restart_and_two_processes_share_it(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    first, second = sqlite_store(path, TTL, RETENTION), sqlite_store(path, TTL, RETENTION)
    await ask(first, "ann", "shoes")
    assert values(await ask(second, "ann", "socks"))[0] == ["shoes"]
    await first.close()
    await second.close()
    third = sqlite_store(path, TTL, RETENTION)
    assert values(await third.users.read("ann", NOW))[0] == ["shoes", "socks"]
    await third.close()


OPENING = """
import sys, time
from pathlib import Path
from service.sqlite_file import SqliteFile
print(flush=True)
start = float(sys.stdin.readline())
for number in range(25):
    time.sleep(max(0.0, start + number / 25 - time.time()))
    SqliteFile(Path(sys.argv[1]) / f"{number}.sqlite3")
print("opened")
"""


def test_processes_that_start_together_share_a_new_sqlite_state(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENING, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        process.stdout.readline()
    start = time.time() + 0.05
    for process in processes:
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    assert [process.communicate(timeout=30)[0] for process in processes] == ["opened\n"] * len(processes)


async def test_sqlite_gives_back_the_space_of_forgotten_users(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    store = sqlite_store(path, TTL, RETENTION)
    await ask(store, "ann", "shoes")
    await store.users.set_profile("ann", "24-30 F", NOW)
    await ask(store, "bob", "socks", NOW + 2 * TTL)
    await store.users.set_profile("bob", "24-30 F", NOW + 2 * TTL)
    await store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT user FROM history").fetchall() == [("bob",)]
        assert db.execute("SELECT user FROM profile").fetchall() == [("bob",)]
    db.close()


async def test_sqlite_leaves_out_a_list_of_a_former_version_and_forgets_it_too(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    store = sqlite_store(path, TTL, RETENTION)
    await do(store, "ann", "click", 7)
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO history (user, list, at, value) VALUES ('ann', 'long', ?, '9')", (NOW,))
    assert values(await ask(store, "ann", "shoes")) == ([], ["7"], [])
    await store.users.forget("ann")
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT * FROM history").fetchall() == []
    db.close()
    await store.close()


async def test_a_state_file_that_is_no_database_is_a_config_error(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match=r"state\.sqlite3: cannot be used"):
        sqlite_store(path, TTL, RETENTION)
    with pytest.raises(ConfigError, match="missing"):
        sqlite_store(tmp_path / "missing" / "state.sqlite3", TTL, RETENTION)


async def test_a_redis_that_is_away_is_unavailable_and_not_an_error_of_its_own(tmp_path: Path) -> None:
    store = redis_store(f"unix://{tmp_path / 'nobody.sock'}", TTL, RETENTION, timeout_seconds=0.2)
    calls = (
        store.ping(),
        store.users.read("ann", NOW),
        store.users.visit("ann", "shoes", [], NOW),
        store.events.record([Event("e", "click", 1, "ann", NOW)]),
        store.events.counts(0, 1),
        store.keywords.claim(1, 1.0, NOW),
        store.keywords.queue(NOW),
    )
    for call in calls:
        with pytest.raises(StateUnavailable):
            await call
    await store.close()


@pytest.mark.redis
async def test_redis_does_a_visit_in_one_round_trip_and_sets_an_expiry(redis_url: str) -> None:
    store = redis_store(redis_url, TTL, RETENTION, timeout_seconds=5.0)
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        await client.flushall()
        await store.users.visit("ann", "warm the connection", ["k"], NOW)
        before = (await client.info("stats"))["total_reads_processed"]
        await store.users.visit("ann", "shoes", ["k", "l"], NOW)
        after = (await client.info("stats"))["total_reads_processed"]
        assert after - before == 2  # the visit and the second question for the counter
        keys = [key async for key in client.scan_iter()]
        assert keys == ["onesearch:user:ann:queries"]
        assert TTL - 5 < await client.ttl(keys[0]) <= TTL
    await store.close()


@pytest.mark.redis
async def test_redis_leaves_out_a_list_of_a_former_version_and_forgets_it_too(redis_url: str) -> None:
    store = redis_store(redis_url, TTL, RETENTION, timeout_seconds=5.0)
    async with Redis.from_url(redis_url, decode_responses=True) as client:
        await client.flushall()
        await do(store, "ann", "click", 7)
        await client.rpush("onesearch:user:ann:long", f"{NOW!r} 9")
        assert values(await ask(store, "ann", "shoes")) == ([], ["7"], [])
        await store.users.forget("ann")
        assert [key async for key in client.scan_iter("onesearch:user:*")] == []
    await store.close()
