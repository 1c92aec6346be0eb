"""A process's access to the store: live rates, deferred writes while the store is away, keyword lookups asked once."""

import time
from pathlib import Path

import numpy as np
import orjson
import pytest
from service_fakes import FIRST_ID, broken_store, fake_settings, tiny_catalog

from onesearch.rates import CalibratedRates
from service import outbox
from service.events import Event, Exposure
from service.memory import EVENTS_AT_ONCE, Memory
from service.store import Store
from service.telemetry import Metrics

pytestmark = pytest.mark.anyio


def exposure(number: int) -> Exposure:
    return Exposure(f"r{number}", "control", {}, "beef", None, "shoes", time.time(), (1,), 1.0)


async def test_events_reorder_the_items_of_one_sid_after_a_refresh(store: Store, tmp_path: Path) -> None:
    rates = CalibratedRates()
    memory = Memory(store, fake_settings(tmp_path), Metrics(), rates)
    items = tiny_catalog(tmp_path / "items").snapshot

    def shown() -> list[int]:
        rows, _ = items.expand(np.asarray([0]), 2, popularity=rates)
        return items.ids_at(rows).tolist()

    clicks = [Event(f"e{i}", "click", FIRST_ID + 1, "ann", time.time()) for i in range(2 * EVENTS_AT_ONCE + 1)]
    clicks += [Event(f"o{i}", "order", FIRST_ID + 1, "ann", time.time()) for i in range(20)]
    assert await memory.record(clicks) == len(clicks)
    assert shown() == [FIRST_ID, FIRST_ID + 1]
    await memory.refresh()
    assert shown() == [FIRST_ID + 1, FIRST_ID]
    await memory.close()


async def test_deferred_writes_wait_for_the_store_within_bounds(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING", 150)
    metrics, away = Metrics(), broken_store()
    memory = Memory(away, fake_settings(tmp_path), metrics, CalibratedRates())
    for number in range(160):
        memory.expose(exposure(number))
    await memory._outbox.flush()
    assert b'onesearch_outbox_dropped_total{kind="exposure"} 10.0' in metrics.exposition()
    memory._outbox._store = store  # it is back
    await memory.close()
    logged = await store.events.entries("", 1000)
    assert len(logged) == 150
    assert orjson.loads(logged[0].body)["request_id"] == "r10"


async def test_a_missing_keyword_is_enqueued_once_by_all_processes(store: Store, tmp_path: Path) -> None:
    memories = [Memory(store, fake_settings(tmp_path), Metrics(), CalibratedRates()) for _ in range(3)]
    for memory in memories:
        for _ in range(5):
            recalled = await memory.recall(None, "Red  Shoes", keywords=True)
            assert (recalled.keywords, recalled.degraded) == (None, ())
        await memory.close()
    claims = await store.keywords.claim(10, 60, time.time() + 1)
    assert [(claim.job.query, claim.job.user) for claim in claims] == [("red shoes", None)]


async def test_searches_without_user_or_keywords_never_touch_the_store(tmp_path: Path) -> None:
    memory = Memory(broken_store(delay=60), fake_settings(tmp_path), Metrics(), CalibratedRates())
    assert (await memory.recall(None, "shoes", keywords=False)).degraded == ()
    await memory.close()
