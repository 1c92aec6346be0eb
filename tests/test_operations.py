"""Running it for real: draining, worker processes, the dashboard, traces and the OpenAPI document under attack."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from service_fakes import FIRST_ID, fake_deployment, fake_engine, fake_settings
from starlette.testclient import TestClient

from service.app import create_app
from service.envelope import Envelope
from service.protocol import Protocol
from service.store import open_store
from service.telemetry import Metrics
from service.tracing import Tracer

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana" / "onesearch.json"


@pytest.fixture
def bundle(exported: tuple[Path, Any, Any]) -> Path:
    return exported[0]


@contextmanager
def process(bundle: Path, folder: Path, *options: str, **variables: str) -> Iterator[tuple[Any, str]]:
    """The command as a process, ready; its address."""
    command = [sys.executable, "-c", "from service.cli import main; main()", str(bundle), "--port", "0", *options]
    environment = {**os.environ, **{f"ONESEARCH_{name.upper()}": value for name, value in variables.items()}}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment) as started:
        assert started.stderr is not None
        try:
            for line in started.stderr:
                if found := re.search(r"running on (http://[0-9.:]+)", line):
                    break
            threading.Thread(target=started.stderr.read, daemon=True).start()
            until = time.monotonic() + 60
            while status(f"{found[1]}/readyz") != 200:
                assert time.monotonic() < until
                time.sleep(0.05)
            yield started, found[1]
        finally:
            started.kill()


def status(url: str) -> int:
    """The status of a page, 0 without an answer."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_a_stop_under_load_drops_nothing_and_is_told_first(bundle: Path, tmp_path: Path) -> None:
    answers: list[int] = []
    told = threading.Event()

    def shop(address: str) -> None:
        """Searches over kept connections until the balancer says that this instance leaves."""
        with httpx2.Client(base_url=address, timeout=30) as client:
            while not told.is_set():
                try:
                    answers.append(client.get("/v1/search", params={"q": "red mug", "limit": 3}).status_code)
                except httpx2.HTTPError:
                    answers.append(0)

    with process(bundle, tmp_path, notice_seconds="0.7") as (started, address):
        shoppers = [threading.Thread(target=shop, args=(address,)) for _ in range(6)]
        for shopper in shoppers:
            shopper.start()
        while len(answers) < 12:
            time.sleep(0.01)
        before = len(answers)
        started.send_signal(signal.SIGTERM)
        while (ready := status(f"{address}/readyz")) == 200:
            time.sleep(0.01)
        assert ready == 503
        time.sleep(0.2)
        told.set()
        for shopper in shoppers:
            shopper.join()
        assert started.wait(timeout=60) == 0
        assert status(f"{address}/healthz") == 0
    assert set(answers) == {200}
    assert len(answers) > before


def test_workers_share_a_port_add_up_their_metrics_and_are_replaced(bundle: Path, tmp_path: Path) -> None:
    with process(bundle, tmp_path, "--workers", "2", notice_seconds="0") as (started, address):

        def gauge(name: str) -> float:
            text = httpx2.get(f"{address}/metrics", timeout=60).text
            found = re.search(rf"^{name} ([0-9.]+)$", text, re.M)
            return float(found[1]) if found else 0.0

        def workers() -> list[int]:
            children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
            return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]

        def settle() -> None:
            until = time.monotonic() + 60
            while gauge("onesearch_workers") != 2 or status(f"{address}/readyz") != 200:
                assert time.monotonic() < until
                time.sleep(0.1)

        settle()
        for _ in range(12):  # each over a connection of its own, so both workers get some
            assert status(f"{address}/v1/search?q=red+mug&limit=2") == 200
        text = httpx2.get(f"{address}/metrics").text
        counted = re.findall(r'onesearch_requests_total\{route="/v1/search",status="200",[^}]*\} ([0-9.]+)', text)
        assert sum(map(float, counted)) == 12
        first, second = workers()
        os.kill(first, signal.SIGKILL)
        until = time.monotonic() + 30
        while first in workers() or len(workers()) < 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        settle()
        assert second in workers()
        assert status(f"{address}/v1/search?q=red+mug&limit=2") == 200
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=60) == 0


def test_the_dashboard_asks_for_metrics_that_exist(tmp_path: Path) -> None:
    app = create_app(
        fake_settings(tmp_path), fake_deployment(fake_engine(tmp_path)), open_store(fake_settings(tmp_path))
    )
    with TestClient(app) as client:
        client.post("/v1/search", json={"query": "shoes", "user_id": "ann"})
        client.post("/v1/search", json={"query": "shoes"}, headers={"X-OneSearch-Deadline-Ms": "0"})
        client.post("/v1/events", json={"type": "click", "item_id": FIRST_ID, "user_id": "ann"})
        text = client.get("/metrics").text
    families = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    labels: dict[str, set[str]] = {}
    for name, inside in re.findall(r"^(\w+)\{([^}]*)\}", text, re.M):
        labels.setdefault(name, set()).update(re.findall(r'(\w+)="', inside))
    asked = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    ]
    seen = set()
    for query in asked:
        for name in re.findall(r"onesearch_\w+", query):
            base = name.removesuffix("_bucket")
            assert base in families, query
            assert (families[base] == "histogram") == name.endswith("_bucket"), query
            seen.add(base)
        if name in labels:
            wanted = set(re.findall(r"(\w+)=", query)) | set(
                re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query)))
            )
            assert wanted <= labels[name], query
    assert {"onesearch_requests_total", "onesearch_searches_total", "onesearch_searches_waiting"} <= seen


def test_a_request_is_a_trace_with_a_span_per_stage_and_nothing_typed(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    app = create_app(
        fake_settings(tmp_path), fake_deployment(fake_engine(tmp_path)), open_store(fake_settings(tmp_path))
    )
    tracer = Tracer(exporter)
    traced = Envelope(app, Metrics(), app.state.readiness, tracer=tracer)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with TestClient(app) as started:
        client = TestClient(traced)
        client.app_state.update(started.app_state)
        client.post("/v1/search", json={"query": "secret shoes"}, headers={"traceparent": parent})
        assert client.get("/v1/items/7").status_code == 404
    tracer.close()
    spans = exporter.get_finished_spans()
    roots = {span.name: span for span in spans if span.name.startswith(("GET", "POST"))}
    search = roots["POST /v1/search"]
    assert f"{search.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert search.parent is not None
    stages = [span for span in spans if span.parent and span.parent.span_id == search.context.span_id]
    assert {"state", "queue", "understand", "prefill", "decode", "expand"} <= {span.name for span in stages}
    decode = next(span for span in stages if span.name == "decode")
    assert decode.end_time - decode.start_time == 2_000_000
    assert all(search.start_time <= span.start_time for span in stages)
    assert search.attributes["http.response.status_code"] == 200
    assert roots["GET /v1/items/{item_id}"].attributes["http.response.status_code"] == 404
    assert "secret" not in "".join(span.to_json() for span in spans)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The whole application over a fake model, served from a thread."""
    folder = tmp_path_factory.mktemp("attacked")
    app = create_app(
        fake_settings(folder), fake_deployment(fake_engine(folder)), open_store(fake_settings(folder))
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Protocol, log_config=None, access_log=False))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
]


def test_nothing_the_openapi_document_allows_or_forbids_breaks_the_service(address: str) -> None:
    statuses: dict[str, set[int]] = {}
    for found in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:

            @settings(ATTACK)
            @given(case=operation.as_strategy(generation_mode=mode))
            def attack(case: schemathesis.Case) -> None:
                case.headers.pop("X-OneSearch-Variant", None)  # no made-up name is that of a variant
                answer = case.call()
                statuses.setdefault(case.operation.label, set()).add(answer.status_code)
                case.validate_response(answer, checks=CHECKS)

            try:
                attack()
            except Unsatisfiable:  # there is no wrong way to ask a route that takes nothing
                assert mode is schemathesis.GenerationMode.NEGATIVE
    assert len(statuses) >= 9
    assert {200, 422} <= statuses["POST /v1/search"]
    assert 200 in statuses["GET /v1/search"]


ATTACK = settings(
    max_examples=8,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
