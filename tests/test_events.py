"""The event log: events count once, whatever is sent again or killed; one suite for both stores."""

import asyncio
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import orjson
import pytest
from conftest import RETENTION, TTL
from hypothesis import given
from hypothesis import strategies as st
from redis_server import RedisServer

from onesearch.rates import CalibratedRates, calibrated_rate
from service.events import Counts, Event, Exposure
from service.store import Store, redis_store, sqlite_store

NOW = 1_700_000_000.0
pytestmark = pytest.mark.anyio


def exposure(request_id: str, at: float = NOW) -> Exposure:
    return Exposure(request_id, "control", {"e": "a"}, "beef", "ann", "红鞋", at, (2**63 - 1, 2), 12.5)


async def test_an_event_is_logged_counted_and_remembered_once(store: Store) -> None:
    event = Event("e1", "order", 2**63 - 1, "ann", NOW, "r1", 'a "query" 红', "control", 9.5, 3)
    assert await store.events.record([event, event]) == 1
    assert await store.events.record([event]) == 0
    (logged,) = await store.events.entries("", 10)
    assert logged.kind == "event"
    assert Event(**orjson.loads(logged.body)) == event
    assert (await store.events.counts(0, 10))[1] == {2**63 - 1: Counts(orders=1)}
    assert [entry.value for entry in (await store.users.read("ann", NOW)).orders] == [str(2**63 - 1)]


async def test_counters_are_read_by_what_changed(store: Store) -> None:
    kinds = ("impression", "click", "cart", "order")
    await store.events.record([Event(f"{k}{i}", k, i, "ann", NOW) for i in range(5) for k in kinds])
    mark, first = await store.events.counts(0, 3)
    mark, rest = await store.events.counts(mark, 3)
    assert first | rest == {i: Counts(1, 1, 1, 1) for i in range(5)}
    assert (len(first), len(rest)) == (3, 2)
    assert (await store.events.counts(mark, 3))[1] == {}
    await store.events.record([Event("again", "click", 1, "bob", NOW)])
    after, changed = await store.events.counts(mark, 3)
    assert changed == {1: Counts(1, 2, 1, 1)}
    assert (await store.events.counts(after, 3))[1] == {}


async def test_entries_are_read_in_order_from_a_position(store: Store) -> None:
    await store.events.expose([exposure("r1"), exposure("r2")])
    await store.events.record([Event("e1", "click", 2, "ann", NOW, "r2")])
    await store.events.expose([])
    first = await store.events.entries("", 2)
    rest = await store.events.entries(first[-1].position, 10)
    assert [entry.kind for entry in first + rest] == ["exposure", "exposure", "event"]
    read = orjson.loads(first[1].body)
    assert Exposure(**{**read, "items": tuple(read["items"])}) == exposure("r2")


async def test_concurrent_copies_of_a_batch_count_once(store: Store) -> None:
    batch = [Event(f"e{i}", "click", i % 3, "ann", NOW) for i in range(30)]
    new = await asyncio.gather(*(store.events.record(batch) for _ in range(4)))
    assert sorted(new) == [0, 0, 0, 30]
    assert (await store.events.counts(0, 10))[1] == {i: Counts(clicks=10) for i in range(3)}


async def test_sqlite_lets_go_of_what_is_past_its_retention(tmp_path: Path) -> None:
    store = sqlite_store(tmp_path / "state.sqlite3", TTL, RETENTION)
    await store.events.expose([exposure("old")])
    await store.events.expose([exposure("new", NOW + RETENTION + 1)])
    assert [orjson.loads(e.body)["request_id"] for e in await store.events.entries("", 9)] == ["new"]
    await store.close()


@pytest.mark.redis
async def test_redis_lets_go_of_what_is_past_its_retention(redis_url: str) -> None:
    import time

    store = redis_store(redis_url, TTL, RETENTION, timeout_seconds=5.0)
    count = 300  # Redis drops whole nodes of about a hundred entries
    await store.events.expose([exposure(f"old{i}") for i in range(count)])
    await store.events.expose([exposure("late", time.time() + RETENTION + 60)])
    assert len(await store.events.entries("", 2 * count)) <= 101
    await store.close()


# What a gateway does with events, in a process of its own: one call per event, told on its output once accepted.
_RECORDER = """
    import asyncio, sys
    from pathlib import Path
    from service.events import Event
    from service.store import redis_store, sqlite_store

    async def main(place):
        store = redis_store(place, 1e9, 1e9, 5.0) if "://" in place else sqlite_store(Path(place), 1e9, 1e9)
        for i in range(100_000):
            pair = Event(f"e{i}", "click", i % 7, "ann", 1.7e9), Event(f"f{i}", "order", 9, "ann", 1.7e9)
            await store.events.record(pair)
            print(i, flush=True)

    asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
async def test_a_process_killed_at_any_moment_loses_nothing_and_doubles_nothing(tmp_path: Path, kind: str) -> None:
    server = RedisServer(tmp_path, durable=True) if kind == "redis" else None
    place = server.url if server else str(tmp_path / "state.sqlite3")
    accepted = []
    for _ in range(2):  # the second process sends everything again, as a client would that got no answers
        command = [sys.executable, "-c", textwrap.dedent(_RECORDER), place]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                accepted.append(int(line))
                if accepted[-1] >= 60:
                    process.send_signal(signal.SIGKILL)
                    break
            accepted += [int(line) for line in process.stdout if line.strip()]
    if server:
        server.kill()  # the server dies as well, and finds its data in the append-only file
        server.start()
    store = redis_store(place, 1e9, 1e9, 5.0) if server else sqlite_store(Path(place), 1e9, 1e9)
    logged = [Event(**orjson.loads(entry.body)) for entry in await store.events.entries("", 100_000)]
    ids = [event.event_id for event in logged]
    assert len(set(ids)) == len(ids)
    assert set(ids) >= {f"{letter}{i}" for i in accepted for letter in "ef"}
    assert sum(letter.startswith("e") for letter in ids) == sum(letter.startswith("f") for letter in ids)
    clicked = [e.item_id for e in logged if e.type == "click"]
    expected = {item: Counts(clicks=clicked.count(item)) for item in set(clicked)}
    assert (await store.events.counts(0, 100))[1] == expected | {9: Counts(orders=ids.__len__() // 2)}
    state = await store.users.read("ann", 1.7e9)
    for behaviour, remembered in (("click", state.clicks), ("order", state.orders)):
        assert [int(e.value) for e in remembered] == [e.item_id for e in logged if e.type == behaviour][-100:]
    await store.close()
    if server:
        server.kill()


def test_calibrated_rates_are_those_of_the_formula() -> None:
    assert calibrated_rate(0, 0, 0) == pytest.approx(0.5)
    # log 100 = 2 log 10: Ctr = 2 / (3 + 2 + 1), Cvr = 1 / 2 in logarithms of base 10
    assert calibrated_rate(990, 90, 0) == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))


@given(st.integers(0, 10**6), st.integers(0, 10**5), st.integers(0, 10**4), st.integers(1, 100))
def test_orders_raise_a_rate_and_impressions_lower_it(shown: int, clicked: int, ordered: int, more: int) -> None:
    shown, clicked = shown + clicked, clicked + ordered
    assert calibrated_rate(shown + more, clicked, ordered) < calibrated_rate(shown, clicked, ordered)
    assert calibrated_rate(shown, clicked + more, ordered + more) > calibrated_rate(shown, clicked, ordered)


def test_rates_move_trained_ones_by_what_events_add() -> None:
    import numpy as np

    rates = CalibratedRates()
    ids, trained = np.asarray([5, 7, 2**62]), np.asarray([0.7, 0.6, 0.1], dtype=np.float32)
    assert rates(ids, trained) is trained
    rates.update({7: (10, 8, 4), 2**62: (50, 0, 0)})
    moved = rates(ids, trained)
    assert moved[0] == trained[0]
    assert moved[1] == pytest.approx(0.6 + calibrated_rate(10, 8, 4) - 0.5)
    assert moved[2] < trained[2]
