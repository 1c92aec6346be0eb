"""The near-line worker: searches miss, it fills, failures are retried and given up, users' outcomes stay out."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
from service_fakes import FakeRunner, fake_deployment, fake_engine, fake_settings
from starlette.testclient import TestClient
from tiny_bundle import write_tiny_bundle

from onesearch.bundle import open_bundle
from onesearch.errors import ProviderError
from onesearch.llm import Usage
from onesearch.taqu import RuleProvider, UserNotes
from service.app import create_app
from service.events import Event
from service.keyword_worker import MAX_ATTEMPTS, Worker, titles_of
from service.keywords import DAY, Job, entry_key
from service.store import Store, open_store
from service.telemetry import WorkerMetrics

pytestmark = pytest.mark.anyio


class Provider:
    """Answers with what it was asked; fails for "bad" queries as often as told."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.notes: list[UserNotes] = []
        self.asked: list[str] = []

    async def keywords(self, query: str) -> tuple[str, ...]:
        self.asked.append(query)
        if query.startswith("bad") and self.failures:
            self.failures -= 1
            raise ProviderError("no")
        return () if query == "track parcel" else (f"{query} keyword",)

    async def personal(self, query: str, candidates: Sequence[str], user: UserNotes) -> tuple[str, ...]:
        self.notes.append(user)
        return (*candidates, user.profile)


def worker_of(store: Store, provider: Provider) -> Worker:
    def titles(items: Sequence[int]) -> tuple[str, ...]:
        return tuple(f"title {item}" for item in items)

    return Worker(store, provider, titles, 7 * DAY, WorkerMetrics(Usage()))


async def test_a_missed_search_is_answered_from_the_cache_the_next_time(tmp_path: Path) -> None:
    settings = fake_settings(tmp_path)
    engine = fake_engine(tmp_path)
    runner, forced = engine.runner, {"X-OneSearch-Variant": "keywords"}
    assert isinstance(runner, FakeRunner)
    with TestClient(create_app(settings, fake_deployment(engine), open_store(settings))) as client:
        for _ in range(3):
            body = {"query": "Running  SHOES", "user_id": "ann", "explain": True}
            answer = client.post("/v1/search", json=body, headers=forced).json()
        assert answer["explain"]["keyword_source"] == "none"
        assert runner.seen[-1][1].keywords  # the dictionary of the bundle is asked instead
    store, provider = open_store(settings), Provider()
    assert await worker_of(store, provider).step() == 2
    assert provider.asked == ["running shoes"]
    await store.close()
    with TestClient(create_app(settings, fake_deployment(engine), open_store(settings))) as client:
        mine = client.post("/v1/search", json=body, headers=forced).json()
        assert mine["explain"]["keyword_source"] == "user"
        everybody = client.post("/v1/search", json=body | {"user_id": "bob"}, headers=forced).json()
        assert everybody["explain"]["keyword_source"] == "query"
        context, options = runner.seen[-1]
        assert (context.keywords, options.keywords) == (("running shoes keyword",), False)
        metrics = client.get("/metrics").text
        assert 'onesearch_keyword_lookups_total{result="user"} 1.0' in metrics
        assert 'onesearch_keyword_lookups_total{result="query"} 1.0' in metrics


async def test_a_query_without_keywords_is_known_to_have_none(store: Store) -> None:
    now = time.time()
    await store.keywords.enqueue([Job("track parcel", None, now)], now)
    await worker_of(store, Provider()).step()
    key = entry_key("track parcel")
    entry = (await store.keywords.lookup([key], now))[key]
    assert entry.keywords == ()
    assert entry.fresh_until < now + 2 * DAY


async def test_failures_are_tried_again_and_then_given_up(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.keyword_worker.FIRST_PAUSE", 0.0)
    now = time.time()
    await store.keywords.enqueue([Job("bad", None, now), Job("good", None, now)], now)
    provider = Provider(failures=2)
    worker = worker_of(store, provider)
    assert [await worker.step() for _ in range(4)] == [2, 1, 1, 0]
    assert provider.asked.count("bad") == 3
    assert set(await store.keywords.lookup([entry_key("bad"), entry_key("good")], now)) == {
        entry_key("bad"),
        entry_key("good"),
    }
    hopeless = Provider(failures=1000)
    await store.keywords.enqueue([Job("bad again", None, now)], now)
    worker = worker_of(store, hopeless)
    for _ in range(MAX_ATTEMPTS + 1):
        await worker.step()
    assert hopeless.asked.count("bad again") == MAX_ATTEMPTS
    state = await store.keywords.queue(time.time())
    assert (state.waiting, state.dead) == (0, 1)


async def test_a_job_that_kills_its_workers_is_given_up(store: Store) -> None:
    """Nobody settles it, so nothing but the number of leases tells."""
    now = time.time()
    await store.keywords.enqueue([Job("deadly", None, now - 100)], now - 100)
    for lease in range(MAX_ATTEMPTS):  # workers that take it and die
        assert len(await store.keywords.claim(1, 1.0, now - 100 + lease * 2)) == 1
    await store.keywords.enqueue([Job("good", None, now)], now)
    provider = Provider()
    await worker_of(store, provider).step()
    assert provider.asked == ["good"]
    state = await store.keywords.queue(time.time())
    assert (state.waiting, state.dead) == (0, 1)


async def test_what_a_search_led_to_never_reaches_its_own_keywords(store: Store) -> None:
    asked = time.time()
    await store.users.set_profile("ann", "24-30 F", asked)
    await store.users.visit("ann", "lamp", [], asked - 10)
    await store.events.record([Event("before", "click", 3, "ann", asked - 5)])
    await store.users.visit("ann", "red shoes", [], asked)
    await store.keywords.enqueue([Job("red shoes", "ann", asked)], asked)
    await store.events.record(
        [Event("after", "order", 8, "ann", asked + 1), Event("a2", "click", 8, "ann", asked)]
    )
    provider = Provider()
    await worker_of(store, provider).step()
    assert provider.notes == [UserNotes("24-30 F", ("lamp",), ("title 3",))]


async def test_workers_share_the_queue_and_make_every_entry_once(store: Store) -> None:
    now = time.time()
    await store.keywords.enqueue([Job(f"q{i}", None, now) for i in range(40)], now)
    provider = Provider()
    workers = [worker_of(store, provider) for _ in range(3)]

    async def drain(worker: Worker) -> None:
        while await worker.step():
            pass

    await asyncio.gather(*map(drain, workers))
    assert sorted(provider.asked) == sorted(f"q{i}" for i in range(40))
    assert (await store.keywords.queue(now)).waiting == 0


async def test_rules_put_what_the_user_clicked_first_and_drop_what_the_query_excludes(tmp_path: Path) -> None:
    from onesearch.keywords import KeywordRules

    rules = KeywordRules({"red": "Color", "blue": "Color", "shoes": "Entity", "trail": "Scene"})
    provider = RuleProvider(rules)
    assert await provider.keywords("shoes but not red") == ("shoes",)
    assert await provider.keywords("red blue shoes") == ("red", "blue", "shoes")
    notes = UserNotes(clicks=("Blue trail shoes", "Blue shoes", "Red lamp"))
    assert await provider.personal("shoes", ("red", "shoes", "blue"), notes) == ("shoes", "blue", "red", "trail")


def test_the_command_works_until_told_to_stop(tmp_path: Path) -> None:
    path, _ = write_tiny_bundle(tmp_path)
    bundle = open_bundle(path, graphs=False)
    assert titles_of(bundle.catalog)([3, 999]) == ("green shoes",)
    state = f"sqlite:{tmp_path / 'state.sqlite3'}"

    async def ask() -> None:
        store = open_store(fake_settings(tmp_path))
        await store.keywords.enqueue([Job("red shoes", None, time.time())], time.time())
        for _ in range(300):
            if entry := (await store.keywords.lookup([entry_key("red shoes")], time.time())):
                break
            await asyncio.sleep(0.1)
        await store.close()
        assert [e.keywords for e in entry.values()] == [bundle.keywords.match("red shoes")]

    command = [sys.executable, "-c", "from service.keyword_worker import main; main()", str(path)]
    command += ["--metrics-port", "19108"]
    with subprocess.Popen(command, env=os.environ | {"ONESEARCH_STATE": state}, stderr=subprocess.PIPE) as process:
        asyncio.run(ask())
        with urllib.request.urlopen("http://127.0.0.1:19108/metrics") as answer:
            assert b'onesearch_keywords_jobs_total{outcome="done"} 1.0' in answer.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
