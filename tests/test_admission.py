"""Admission: the queue is bounded and fair, late work is not started, beams narrow before anything is turned away."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from service_fakes import FakeRunner, fake_deployment, fake_engine, fake_settings
from starlette.testclient import TestClient
from starlette.types import Scope

from onesearch.context import SearchContext
from onesearch.errors import ConfigError, DeadlineError
from onesearch.live import LiveCatalog
from onesearch.search import Clock, SearchOptions, SearchResult
from service.admission import Admission, Overloaded, ladder
from service.app import create_app
from service.inference import EmbeddedRunner, own_cores, search_threads
from service.limits import RateLimit, TooManyRequests
from service.problems import MEDIA_TYPE
from service.store import open_store

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


async def use(gate: Admission, seconds: float, patience: float = 60.0, width: int = 512) -> int:
    """Search for some time; returns the width that was given."""
    async with gate.slot("bundle", width, 20, time.monotonic() + patience) as given:
        await asyncio.sleep(seconds)
    return given


def test_the_ladder_halves_twice_and_always_fills_the_page() -> None:
    assert ladder(512, 20) == (512, 256, 128)
    assert ladder(512, 200) == (512, 256)
    assert ladder(128, 100) == (128,)
    assert ladder(16, 50) == (16,)


async def test_one_more_is_let_in_than_runs_and_the_others_follow_in_the_order_they_came() -> None:
    gate, started, most = Admission(2, 10), [], 0

    async def one(number: int) -> None:
        nonlocal most
        async with gate.slot("bundle", 512, 20, time.monotonic() + 60):
            started.append(number)
            most = max(most, gate.running)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(one(i) for i in range(8)))
    assert (most, started, gate.running, gate.waiting) == (3, list(range(8)), 0, 0)


async def test_a_full_queue_turns_away_at_once() -> None:
    gate = Admission(1, 2)
    running = [asyncio.create_task(use(gate, 0.05)) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await use(gate, 0)
    assert caught.value.retry_after >= 1
    await asyncio.gather(*running)
    await asyncio.sleep(1.5)  # until the pressure has faded
    assert await use(gate, 0) == 512


async def test_a_queue_too_long_for_the_deadline_turns_away_at_once_and_a_patient_search_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.admission._MEMORY", 1e-9)
    gate = Admission(1, 100)
    for width in (512, 256, 128):
        gate._times.observe("bundle", width, 0.04)
    running = [asyncio.create_task(use(gate, 0.04)) for _ in range(4)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):  # at once: a search that waited would get DeadlineError
        await use(gate, 0, patience=0.05)
    assert await use(gate, 0, patience=5) == 512
    await asyncio.gather(*running)


async def test_work_whose_deadline_has_passed_is_not_started() -> None:
    gate = Admission(1, 10)
    with pytest.raises(DeadlineError):
        await use(gate, 0, patience=0)
    running = [asyncio.create_task(use(gate, 0.2)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(DeadlineError, match="waited"):
        await use(gate, 0, patience=0.03)
    assert (gate.running, gate.waiting) == (2, 0)
    await asyncio.gather(*running)


async def test_beams_narrow_step_by_step_with_the_queue_and_widen_when_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.admission._MEMORY", 1e-9)
    gate = Admission(2, 100)
    release = [asyncio.Event() for _ in range(7)]
    given: list[int] = []

    async def one(number: int) -> None:
        async with gate.slot("bundle", 512, 20, time.monotonic() + 60) as width:
            given.append(width)
            await release[number].wait()

    searches = [asyncio.create_task(one(i)) for i in range(7)]
    for event in release:
        await asyncio.sleep(0.001)
        event.set()
    await asyncio.gather(*searches)
    # The third is at hand, one rung down. Behind the next ones wait 3, 2 and 1, and each is at hand itself: 4, 3 and 2
    # are two rungs down. The last one is alone at hand.
    assert given == [512, 512, 256, 128, 128, 128, 256]
    assert await use(gate, 0) == 512


async def test_the_pressure_of_a_burst_fades(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("service.admission.time.monotonic", lambda: clock[0])
    gate = Admission(2, 100)
    gate.waiting = 4
    assert gate._choose("bundle", ladder(512, 20), 9) == 128
    gate.waiting = 0
    widths = []
    for _ in range(4):
        clock[0] += 0.25
        widths.append(gate._choose("bundle", ladder(512, 20), 9))
    # 4 e^-0.5 = 2.4 and e^-1 = 1.5 of it: two rungs down, then one; 0.9 and 0.5: none.
    assert widths == [128, 256, 512, 512]


async def test_a_beam_narrows_to_fit_the_time_left_and_an_idle_service_always_tries() -> None:
    gate = Admission(1, 10)
    for width, seconds in ((512, 0.4), (256, 0.2), (128, 0.1)):
        gate._times.observe("bundle", width, seconds)
    assert [await use(gate, 0, patience) for patience in (0.5, 0.3, 0.15, 0.05)] == [512, 256, 128, 128]


async def test_service_times_are_learnt_per_bundle_and_width_and_failures_teach_nothing() -> None:
    gate = Admission(1, 10)
    await use(gate, 0.02)
    learnt = gate._times.estimate("bundle", 512)
    assert 0.02 <= learnt < 0.2
    assert gate._times.estimate("bundle", 256) == gate._times.estimate("other", 512) == 0
    with pytest.raises(RuntimeError):
        async with gate.slot("bundle", 512, 20, time.monotonic() + 9):
            raise RuntimeError
    assert gate._times.estimate("bundle", 512) == learnt
    assert gate.running == 0


async def test_a_caller_that_leaves_the_queue_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.admission._MEMORY", 1e-9)
    gate = Admission(1, 10)
    *running, leaving = (asyncio.create_task(use(gate, 0.03)) for _ in range(3))
    await asyncio.sleep(0.005)
    assert gate.waiting == 1
    leaving.cancel()
    await asyncio.gather(*running)
    assert (gate.running, gate.waiting) == (0, 0)
    assert await use(gate, 0) == 512


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux only")
async def test_searches_yield_to_the_event_loop() -> None:
    class Priority:
        def search(self, context: SearchContext, options: SearchOptions) -> int:
            return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    runner = EmbeddedRunner(Priority(), search_threads(1))  # type: ignore[arg-type]
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    lowered = await runner.search(SearchContext("shoe"), SearchOptions())
    await runner.close()
    assert lowered == min(19, own + 5)  # type: ignore[comparison-overlap]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a core of their own on Linux only")
def test_threads_that_fill_the_machine_keep_to_a_core_each() -> None:
    mine = os.sched_getaffinity(0)
    assert own_cores(len(mine)) == tuple(sorted(mine))
    assert own_cores(len(mine) + 1) == ()
    together = threading.Barrier(2)

    def where() -> set[int]:
        together.wait(10)
        return os.sched_getaffinity(threading.get_native_id())

    core = min(mine)
    for cores, expected in (([core, core], [{core}, {core}]), ((), [mine, mine])):
        with search_threads(2, cores) as threads:
            assert [future.result(10) for future in [threads.submit(where) for _ in range(2)]] == expected
    assert os.sched_getaffinity(0) == mine


class SlowRunner(FakeRunner):
    """One search at a time, which takes a while in proportion to its width and is not begun after its deadline."""

    def __init__(self, live: LiveCatalog) -> None:
        super().__init__(live)
        self._thread = asyncio.Lock()

    async def search(self, context: SearchContext, options: SearchOptions) -> SearchResult:
        async with self._thread:
            Clock(deadline=options.deadline).check()
            await asyncio.sleep(options.width / 64 * 0.02)
        return await super().search(context, options)


Start = Callable[..., TestClient]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a service with a slow runner and some settings."""
    opened: list[TestClient] = []

    def start(**settings: Any) -> TestClient:
        chosen = fake_settings(tmp_path).model_copy(update=settings)
        engine = fake_engine(tmp_path)
        object.__setattr__(engine, "runner", SlowRunner(engine.live))
        app = create_app(chosen, fake_deployment(engine), open_store(chosen))
        client = TestClient(app, raise_server_exceptions=False)
        opened.append(client.__enter__())
        return client

    yield start
    for client in opened:
        client.__exit__(None, None, None)


async def flood(client: TestClient, count: int, headers: dict[str, str] | None = None) -> list[Any]:
    """Many searches at once."""
    body = {"query": "shoes", "explain": True, "limit": 5}
    send = [asyncio.to_thread(client.post, "/v1/search", json=body, headers=headers) for _ in range(count)]
    return list(await asyncio.gather(*send))


async def test_a_flooded_service_narrows_then_refuses_with_retry_after_and_recovers(start: Start) -> None:
    client = start(concurrency=1, queue_limit=3)
    answers = await flood(client, 16)
    served = [answer.json() for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(served) >= 5
    assert {answer.status_code for answer in refused} == {503}
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["content-type"] == MEDIA_TYPE
        assert answer.json()["type"] == "urn:onesearch:problem:overloaded"
    narrow = [body for body in served if "narrow_beam" in body["degraded"]]
    assert narrow
    assert {body["explain"]["options"]["width"] for body in narrow} <= {32, 16}
    assert all(body["explain"]["options"]["width"] == 64 for body in served if body not in narrow)
    text = client.get("/metrics").text
    assert f'onesearch_problems_total{{code="overloaded"}} {float(len(refused))}' in text
    assert f'onesearch_degraded_total{{reason="narrow_beam"}} {float(len(narrow))}' in text
    assert "onesearch_searches_waiting 0.0" in text
    assert 'onesearch_stage_seconds_count{stage="queue"' in text
    await asyncio.sleep(2)  # until the pressure has faded
    after = client.post("/v1/search", json={"query": "shoes"}).json()
    assert after["degraded"] == []


async def test_the_deadline_of_a_request_is_kept(start: Start) -> None:
    client = start(concurrency=1, queue_limit=50)
    hurried = await flood(client, 6, {"X-OneSearch-Deadline-Ms": "30"})
    late = [answer for answer in hurried if answer.status_code == 503]
    assert late
    kinds = {answer.json()["type"].rpartition(":")[2] for answer in late}
    assert kinds <= {"deadline-exceeded", "overloaded"}
    assert all("retry-after" in answer.headers for answer in late)
    assert all(answer.status_code == 200 for answer in await flood(client, 6))
    for wrong in ("0", "-1", "soon", "1e3", "60001", "9" * 40, "٣"):
        headers = {"X-OneSearch-Deadline-Ms": wrong.encode()}
        answer = client.post("/v1/search", json={"query": "x"}, headers=headers)
        assert answer.status_code == 400, wrong
        assert answer.json()["errors"][0]["field"] == "X-OneSearch-Deadline-Ms"


def scope(address: str, **headers: str) -> Scope:
    return {"client": (address, 1), "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()]}


def test_clients_are_limited_each_on_its_own_by_address_or_header() -> None:
    by_address = RateLimit("2/minute", None)
    for _ in range(2):
        by_address.check(scope("10.0.0.1"))
    with pytest.raises(TooManyRequests) as caught:
        by_address.check(scope("10.0.0.1", key="b"))
    assert 1 <= caught.value.retry_after <= 120
    by_address.check(scope("10.0.0.2"))
    by_key = RateLimit("1/minute", "Key")
    by_key.check(scope("10.0.0.1", key="a"))
    by_key.check(scope("10.0.0.1", key="b"))
    by_key.check(scope("10.0.0.1"))
    for same in ({"key": "a"}, {}):
        with pytest.raises(TooManyRequests):
            by_key.check(scope("10.0.0.1", **same))
    with pytest.raises(ConfigError, match="'many' is no rate"):
        RateLimit("many", None)


def test_the_rate_limit_answers_429_and_spares_probes(start: Start) -> None:
    client = start(rate_limit="3/minute")
    codes = [client.get("/v1/variants").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    refused = client.post("/v1/search", json={"query": "shoes"})
    assert (refused.status_code, refused.headers["content-type"]) == (429, MEDIA_TYPE)
    assert int(refused.headers["retry-after"]) >= 1
    assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200
    assert 'onesearch_problems_total{code="rate-limited"} 3.0' in client.get("/metrics").text
