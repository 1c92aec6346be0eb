"""Keyword entries and their queue: one suite for both stores. And the cache that a process reads them through."""

import asyncio

import pytest

from service.keywords import DEAD_SECONDS, MISS_SECONDS, Entry, Job, KeywordCache, QueueState, entry_key
from service.store import Store

NOW = 1_700_000_000.0
pytestmark = pytest.mark.anyio


async def test_entries_are_found_while_kept_also_when_no_longer_fresh(store: Store) -> None:
    entry = Entry(("running shoes", "红色跑鞋"), NOW + 100)
    await store.keywords.finish("a", {"a": entry, "none": Entry((), NOW + 100)}, NOW)
    assert await store.keywords.lookup(["a", "none", "b"], NOW + 150) == {"a": entry, "none": Entry((), NOW + 100)}
    newer = Entry(("socks",), NOW + 900)
    await store.keywords.finish("a", {"a": newer}, NOW)
    assert await store.keywords.lookup(["a"], NOW) == {"a": newer}


async def test_a_job_waits_once_however_often_it_is_asked_for(store: Store) -> None:
    job = Job('红 "shoes"', None, NOW)
    await asyncio.gather(*(store.keywords.enqueue([job, job], NOW) for _ in range(5)))
    await store.keywords.enqueue([Job(job.query, "ann", NOW + 1)], NOW + 1)
    assert await store.keywords.queue(NOW + 10) == QueueState(2, 0, 10.0)
    claims = await store.keywords.claim(9, 60, NOW + 10)
    assert [(claim.job, claim.attempts) for claim in claims] == [(job, 1), (Job(job.query, "ann", NOW + 1), 1)]


async def test_a_claimed_job_is_nobody_elses_until_its_lease_ends(store: Store) -> None:
    await store.keywords.enqueue([Job(f"q{i}", None, NOW) for i in range(20)], NOW)
    taken = await asyncio.gather(*(store.keywords.claim(6, 60, NOW) for _ in range(4)))
    queries = [claim.job.query for claims in taken for claim in claims]
    assert sorted(queries) == sorted({*queries}) == sorted(f"q{i}" for i in range(20))
    assert await store.keywords.claim(20, 60, NOW + 59) == []
    again = await store.keywords.claim(20, 60, NOW + 61)  # as if all workers had died
    assert [claim.attempts for claim in again] == [2] * 20


async def test_finished_jobs_are_gone_and_retried_ones_come_back_when_due(store: Store) -> None:
    done, failed = Job("done", None, NOW), Job("failed", None, NOW)
    await store.keywords.enqueue([done, failed], NOW)
    await store.keywords.claim(2, 60, NOW)
    await store.keywords.finish(done.key, {done.key: Entry(("x",), NOW + 10)}, NOW)
    await store.keywords.retry(failed.key, NOW + 5)
    assert await store.keywords.claim(2, 60, NOW + 4) == []
    (claim,) = await store.keywords.claim(2, 60, NOW + 5)
    assert (claim.job, claim.attempts) == (failed, 2)
    assert await store.keywords.queue(NOW + 5) == QueueState(1, 0, 5.0)


async def test_a_buried_job_is_not_asked_for_again_for_a_day(store: Store) -> None:
    job = Job("bad", None, NOW)
    await store.keywords.enqueue([job], NOW)
    await store.keywords.claim(1, 60, NOW)
    await store.keywords.bury(job.key, NOW)
    await store.keywords.enqueue([job], NOW + DEAD_SECONDS - 1)
    assert await store.keywords.queue(NOW) == QueueState(0, 1, 0.0)
    assert await store.keywords.claim(1, 60, NOW + DEAD_SECONDS - 1) == []
    await store.keywords.enqueue([job], NOW + DEAD_SECONDS + 1)
    (claim,) = await store.keywords.claim(1, 60, NOW + DEAD_SECONDS + 1)
    assert claim.attempts == 1


async def test_a_full_queue_takes_no_more(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("service.keywords_sqlite", "service.keywords_redis"):
        monkeypatch.setattr(f"{module}.MAX_JOBS", 3)
    await store.keywords.enqueue([Job(f"q{i}", None, NOW) for i in range(5)], NOW)
    assert (await store.keywords.queue(NOW)).waiting == 3


def test_keys_tell_users_apart_and_hide_what_was_typed() -> None:
    keys = {entry_key("a"), entry_key("a", "b"), entry_key("b", "a"), entry_key("ab"), entry_key("", "ab")}
    assert len(keys) == 5
    assert all(len(key) == 32 and "shoes" not in entry_key("shoes") for key in keys)


def test_the_cache_asks_the_store_once_until_an_entry_is_stale_or_a_miss_is_old() -> None:
    cache = KeywordCache(size=2)
    entry = Entry(("x",), NOW + 100)
    assert cache.get("a", NOW) == (None, False)
    assert cache.put(["a", "b"], {"a": entry}, NOW) == ["b"]
    assert cache.get("a", NOW + 99) == (entry, True)
    assert cache.get("a", NOW + 100) == (None, False)
    assert cache.get("b", NOW + MISS_SECONDS - 0.1) == (None, True)
    assert cache.get("b", NOW + MISS_SECONDS) == (None, False)
    assert cache.put(["a"], {"a": entry}, NOW + 101) == ["a"]  # stale: served, and asked for
    assert cache.get("a", NOW + 101) == (entry, True)
    cache.put(["c"], {}, NOW + 101)
    assert cache.get("b", NOW + 1) == (None, False)  # the least recently used went
