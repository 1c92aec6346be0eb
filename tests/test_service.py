"""The HTTP contract over a fake model: answers, variants, history, degradation and what bad input gets."""

import json
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service_fakes import FIRST_ID, FakeRunner, broken_store, fake_deployment, fake_engine, fake_settings
from starlette.testclient import TestClient

from service.app import create_app
from service.envelope import MAX_BODY_BYTES
from service.problems import MEDIA_TYPE
from service.schemas import SearchFilters
from service.store import open_store
from service.telemetry import JsonFormatter


class Running:
    """A started service, its client and its fake runner."""

    def __init__(self, folder: Path, store: Any = None, faults: tuple[str, ...] = ()) -> None:
        settings = fake_settings(folder)
        engine = fake_engine(folder, faults)
        assert isinstance(engine.runner, FakeRunner)
        self.runner = engine.runner
        app = create_app(settings, fake_deployment(engine), store or open_store(settings))
        self.client = TestClient(app, raise_server_exceptions=False)

    def search(self, query: str, headers: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/search", json={"query": query, **more}, headers=headers)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def event(self, kind: str, item_id: int, user: str | int) -> int:
        body = {"type": kind, "item_id": item_id, "user_id": user}
        return int(self.client.post("/v1/events", json=body).status_code)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    started = Running(tmp_path)
    with started.client:
        yield started


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One service for the many requests that must never reach the model."""
    started = Running(tmp_path_factory.mktemp("refusing"))
    with started.client:
        yield started


def assert_problem(answer: Any, status: int, field: str = "") -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    body: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail", "instance"} <= body.keys()
    assert body["status"] == status
    assert body["instance"] == answer.headers["x-request-id"]
    if field:
        assert field in [error["field"] for error in body["errors"]]
    return body


def test_a_search_answers_with_ranked_items_and_everything_the_contract_names(running: Running) -> None:
    body = running.search("running shoes", limit=2)
    assert body.keys() == {
        *("request_id", "query", "variant", "model_version", "catalog_version", "keywords", "items"),
        *("degraded", "timings_ms"),
    }
    assert body["query"] == "running shoes"
    assert (body["model_version"], body["catalog_version"]) == ("m1", "c1")
    assert body["degraded"] == []
    first, second = body["items"]
    assert (first["rank"], first["item_id"], first["title"]) == (1, FIRST_ID, "Trail running shoes")
    assert first["sid"] == [0, 0, 0, 1, 0]
    assert first["score"] == pytest.approx(-0.5)
    assert (second["rank"], second["item_id"], second["price"]) == (2, FIRST_ID + 1, 99.5)
    assert {"state", "prefill", "decode", "total"} <= body["timings_ms"].keys()


def test_item_fields_survive_splicing_quotes_and_markup(running: Running) -> None:
    assert running.search("boots")["items"][0]["title"] == "Leather <b>boots</b>"
    assert running.search("warm")["items"][0]["title"] == "Wool socks “warm”"


def test_the_browser_form_gives_the_same_answer(running: Running) -> None:
    posted = running.search("shoes", filters={"price_max": 100, "in_stock": True}, limit=5)
    got = running.client.get("/v1/search", params={"q": "shoes", "price_max": 100, "in_stock": True, "limit": 5})
    assert got.status_code == 200
    assert got.json()["items"] == posted["items"]
    assert len(posted["items"]) == 2


def test_filters_reach_the_catalog(running: Running) -> None:
    assert [i["item_id"] for i in running.search("socks")["items"]] == [FIRST_ID + 2, FIRST_ID + 4]
    assert [i["item_id"] for i in running.search("socks", filters={"in_stock": True})["items"]] == [FIRST_ID + 4]
    assert running.search("socks", filters={"category": "kitchen"})["items"] == []
    kept = running.search("shoes", filters={"exclude_items": [FIRST_ID]})["items"]
    assert FIRST_ID not in [i["item_id"] for i in kept]
    running.search("shoes", filters={})
    assert running.runner.seen[-1][1].filters is None


def test_facets_count_the_candidates_and_only_on_demand(running: Running) -> None:
    assert "facets" not in running.search("shoes")
    facets = running.search("shoes socks", facets=True, limit=1, filters={"in_stock": True})["facets"]
    assert facets["candidates"] == 3  # more than the page shows
    assert facets["category"] == [{"value": "shoes", "count": 2}, {"value": "socks", "count": 1}]
    assert facets["price"][0] == {"price_min": 79.0, "price_max": 79.0, "count": 1}
    got = running.client.get("/v1/search", params={"q": "shoes socks", "facets": True, "in_stock": True})
    assert got.json()["facets"] == facets


def test_explain_tells_what_was_searched_and_only_on_demand(running: Running) -> None:
    assert "explain" not in running.search("shoes")
    control = {"X-OneSearch-Variant": "control"}
    explained = running.search("shoes", control, explain=True, filters={"brand": "fleet"})["explain"]
    assert explained["query_sid"] == [0] * 5
    assert explained["eligible"] == 2
    assert explained["matched"] == 0
    assert explained["options"] == {"width": 64, "score": "level", "keywords": False, "match": False}
    assert explained["filters"] == SearchFilters(brand="fleet").model_dump()


def test_headers_name_the_request_the_variant_and_the_timings(running: Running) -> None:
    answer = running.client.post("/v1/search", json={"query": "shoes"}, headers={"X-Request-Id": "my-id.1"})
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "my-id.1"
    assert answer.headers["x-onesearch-variant"] == answer.json()["variant"]
    assert "decode;dur=2.00" in answer.headers["server-timing"]
    assert "total;dur=" in answer.headers["server-timing"]
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_an_unsafe_request_id_is_replaced(running: Running) -> None:
    for given in ("", "a b", "x" * 65, '"><script>'):
        answer = running.client.get("/healthz", headers={"X-Request-Id": given})
        assert answer.headers["x-request-id"] != given


def test_a_header_forces_a_variant(running: Running) -> None:
    for name in ("control", "keywords"):
        body = running.search("running shoes", headers={"X-OneSearch-Variant": name})
        assert body["variant"] == name
    assert body["keywords"] == ["running", "shoes"]
    answer = running.client.post("/v1/search", json={"query": "x"}, headers={"X-OneSearch-Variant": "nope"})
    problem = assert_problem(answer, 400, "X-OneSearch-Variant")
    assert "control, keywords" in problem["detail"]
    answer = running.client.post("/v1/search", json={"query": "x"}, headers={"X-OneSearch-Bucket-Key": "k" * 257})
    assert_problem(answer, 400, "X-OneSearch-Bucket-Key")


def test_the_split_sticks_to_the_bucket_key_then_to_the_user(running: Running) -> None:
    def variant(headers: dict[str, str] | None = None, **more: Any) -> str:
        return str(running.search("shoes", headers, **more)["variant"])

    by_key = {f"k{i}": variant({"X-OneSearch-Bucket-Key": f"k{i}"}) for i in range(20)}
    assert set(by_key.values()) == {"control", "keywords"}
    for i, (key, expected) in enumerate(by_key.items()):
        assert variant({"X-OneSearch-Bucket-Key": key}, user_id=i) == expected
    for user in range(10):
        assert variant(user_id=user) == variant(user_id=str(user))


def test_history_enters_the_context_and_the_query_itself_does_not(running: Running) -> None:
    assert running.search("shoes", user_id="ann")["degraded"] == ["unknown_user"]
    assert running.event("click", FIRST_ID + 1, "ann") == 202
    assert running.event("order", FIRST_ID + 2, "ann") == 202
    assert running.event("impression", FIRST_ID + 3, "ann") == 202
    assert running.search("shoes", user_id="ann")["degraded"] == []
    assert running.search("socks", user_id="ann")["degraded"] == []
    running.search("socks", user_id="ann")
    running.search("socks", user_id="bob")
    first, again, second, repeat, other = (context for context, _ in running.runner.seen)
    assert first.recent_queries == again.recent_queries == ()
    assert second.recent_queries == repeat.recent_queries == ("shoes",)
    assert second.recent_items == (FIRST_ID + 1,)
    assert (second.long_clicks, second.long_orders) == ((FIRST_ID + 1,), (FIRST_ID + 2,))
    assert (other.recent_queries, other.recent_items) == ((), ())


def test_a_number_and_its_text_are_the_same_user(running: Running) -> None:
    running.event("click", FIRST_ID, 42)
    assert running.search("shoes", user_id="42")["degraded"] == []
    assert running.runner.seen[-1][0].recent_items == (FIRST_ID,)


@pytest.mark.parametrize("delay", [0.0, 30.0])
def test_without_state_a_search_is_served_and_an_event_is_refused(tmp_path: Path, delay: float) -> None:
    settings = fake_settings(tmp_path).model_copy(update={"state_timeout_ms": 20})
    app = create_app(settings, fake_deployment(fake_engine(tmp_path)), broken_store(delay))
    with TestClient(app) as client:
        answer = client.post("/v1/search", json={"query": "shoes", "user_id": "ann"})
        assert answer.status_code == 200
        assert answer.json()["degraded"] == ["state_unavailable"]
        assert len(answer.json()["items"]) == 2
        assert client.post("/v1/search", json={"query": "shoes"}).json()["degraded"] == []
        event = client.post("/v1/events", json={"type": "click", "item_id": FIRST_ID, "user_id": "ann"})
        assert_problem(event, 503)
        assert event.headers["retry-after"] == "1"


BAD_BODIES: list[tuple[Any, str]] = [
    ({"query": ""}, "query"),
    ({"query": " \u3000 "}, "query"),
    ({"query": "<>"}, "query"),
    ({"query": "x" * 257}, "query"),
    ({"query": "red\nshoes"}, "query"),
    ({"query": "red\x00shoes"}, "query"),
    ({"query": "red \ud800"}, "query"),
    ({"query": 5}, "query"),
    ({"query": None}, "query"),
    ({}, "query"),
    ({"query": "x", "qeury": "y"}, "qeury"),
    ({"query": "x", "limit": 0}, "limit"),
    ({"query": "x", "limit": 201}, "limit"),
    ({"query": "x", "limit": "5"}, "limit"),
    ({"query": "x", "limit": 2.5}, "limit"),
    ({"query": "x", "limit": True}, "limit"),
    ({"query": "x", "limit": 10**30}, "limit"),
    ({"query": "x", "user_id": ""}, "user_id"),
    ({"query": "x", "user_id": "u" * 129}, "user_id"),
    ({"query": "x", "user_id": True}, "user_id"),
    ({"query": "x", "user_id": [1]}, "user_id"),
    ({"query": "x", "explain": "yes"}, "explain"),
    ({"query": "x", "filters": []}, "filters"),
    ({"query": "x", "filters": {"colour": "red"}}, "filters.colour"),
    ({"query": "x", "filters": {"price_min": -1}}, "filters.price_min"),
    ({"query": "x", "filters": {"price_min": "1"}}, "filters.price_min"),
    ({"query": "x", "filters": {"price_min": float("nan")}}, "filters.price_min"),
    ({"query": "x", "filters": {"price_min": 2, "price_max": 1}}, "filters.price_max"),
    ({"query": "x", "filters": {"in_stock": 1}}, "filters.in_stock"),
    ({"query": "x", "filters": {"exclude_items": [1, "a"]}}, "filters.exclude_items.1"),
    ({"query": "x", "filters": {"exclude_items": [2**63]}}, "filters.exclude_items.0"),
    ([], "body"),
    ("x", "body"),
    (None, "body"),
]


@pytest.mark.parametrize(
    ("body", "field"), BAD_BODIES, ids=lambda v: str(v)[:40].encode("ascii", "replace").decode()
)
def test_a_bad_body_is_refused_by_the_name_of_its_field(refusing: Running, body: Any, field: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert_problem(refusing.client.post("/v1/search", content=json.dumps(body), headers=headers), 422, field)
    assert refusing.runner.seen == []


def test_several_faults_are_named_at_once(running: Running) -> None:
    answer = running.client.post("/v1/search", json={"query": "", "limit": 0, "x": 1})
    problem = assert_problem(answer, 422)
    assert {error["field"] for error in problem["errors"]} == {"query", "limit", "x"}


@pytest.mark.parametrize("content", [b"{", b'{"query": }', b"\xff\xfe\x00", b"[" * 30_000])
def test_malformed_json_is_a_400(refusing: Running, content: bytes) -> None:
    answer = refusing.client.post("/v1/search", content=content, headers={"Content-Type": "application/json"})
    assert_problem(answer, 400, "body")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_of_another_type_is_a_415(refusing: Running, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert_problem(refusing.client.post("/v1/search", content=b'{"query": "x"}', headers=headers), 415)


def test_a_large_body_is_a_413_whether_declared_or_streamed(running: Running) -> None:
    large = b" " * (MAX_BODY_BYTES + 1)
    headers = {"Content-Type": "application/json"}
    assert_problem(running.client.post("/v1/search", content=large, headers=headers), 413, "body")
    chunks = (large[i : i + 1000] for i in range(0, len(large), 1000))
    assert_problem(running.client.post("/v1/search", content=chunks, headers=headers), 413, "body")
    full = json.dumps({"query": "shoes"}).encode().ljust(MAX_BODY_BYTES)
    assert running.client.post("/v1/search", content=full, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({}, "q"),
        ({"q": " "}, "q"),
        ({"q": "x", "limit": "many"}, "limit"),
        ({"q": "x", "limit": "0"}, "limit"),
        ({"q": "x", "price_min": "2", "price_max": "1"}, "price_max"),
        ({"q": "x", "page": "2"}, "page"),
    ],
)
def test_a_bad_query_string_is_refused_by_the_name_of_its_field(
    refusing: Running, params: dict[str, str], field: str
) -> None:
    assert_problem(refusing.client.get("/v1/search", params=params), 422, field)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"type": "view"}, "type"),
        ({"item_id": 1}, "item_id"),
        ({"item_id": "100"}, "item_id"),
        ({"user_id": None}, "user_id"),
        ({"price": -1}, "price"),
        ({"quantity": 0}, "quantity"),
        ({"event_id": ""}, "event_id"),
        ({"colour": 3}, "colour"),
    ],
)
def test_a_bad_event_is_refused_by_the_name_of_its_field(
    refusing: Running, change: dict[str, Any], field: str
) -> None:
    body = {"type": "click", "item_id": FIRST_ID, "user_id": "ann"}
    assert refusing.client.post("/v1/events", json=body).status_code == 202
    assert_problem(refusing.client.post("/v1/events", json=body | change), 422, field)


def test_events_come_alone_or_in_batches_and_count_once(running: Running) -> None:
    events = [{"type": "click", "item_id": FIRST_ID, "user_id": "ann", "event_id": f"e{i}"} for i in range(1000)]
    post = running.client.post
    for body, accepted, repeated in ((events, 1000, 0), ({"events": events[:3]}, 3, 3), (events[0], 1, 1)):
        answer = post("/v1/events", json=body)
        assert answer.status_code == 202, answer.text
        assert (answer.json()["accepted"], answer.json()["repeated"]) == (accepted, repeated)
    text = running.client.get("/metrics").text
    assert 'onesearch_events_total{type="click"} 1004.0' in text
    assert "onesearch_events_repeated_total 4.0" in text


def test_a_bad_batch_is_refused_whole_and_names_the_event(refusing: Running) -> None:
    good = {"type": "click", "item_id": FIRST_ID, "user_id": "ann"}
    post = refusing.client.post
    assert_problem(post("/v1/events", json=[good, good | {"type": "view"}]), 422, "1.type")
    assert_problem(post("/v1/events", json={"events": [good, good | {"item_id": 1}]}), 422, "events.1.item_id")
    assert_problem(post("/v1/events", json={"events": [good] * 1001}), 422, "events")
    assert_problem(post("/v1/events", json=[]), 422, "body")
    assert_problem(post("/v1/events", json={"events": [], "more": 1}), 422, "more")
    assert_problem(post("/v1/events", json=5), 422)


def test_a_profile_reaches_the_context_until_the_user_is_forgotten(running: Running) -> None:
    put = running.client.put("/v1/users/ann", json={"gender": "F", "age_bucket": "24-30"})
    assert (put.status_code, put.content) == (204, b"")
    running.event("click", FIRST_ID, "ann")
    assert running.search("shoes", user_id="ann")["degraded"] == []
    context = running.runner.seen[-1][0]
    assert (context.profile, context.recent_items) == ("24-30 F", (FIRST_ID,))
    assert running.client.put("/v1/users/ann", json={"age_bucket": "50+"}).status_code == 204
    running.search("shoes", user_id="ann")
    assert running.runner.seen[-1][0].profile == "50+"
    assert running.client.delete("/v1/users/ann").status_code == 204
    assert running.search("shoes", user_id="ann")["degraded"] == ["unknown_user"]
    assert_problem(running.client.put("/v1/users/ann", json={"age_bucket": "25"}), 422, "age_bucket")
    assert_problem(running.client.put("/v1/users/%20", json={}), 422, "user_id")


def test_every_search_is_logged_as_one_exposure(tmp_path: Path) -> None:
    started = Running(tmp_path)
    with started.client:
        first = started.search("running shoes", {"X-Request-Id": "r-1"}, user_id="ann", limit=2)
        started.search("socks", {"X-OneSearch-Bucket-Key": "k"})
    rows = sqlite3.connect(tmp_path / "state.sqlite3").execute("SELECT kind, body FROM log ORDER BY id").fetchall()
    assert [kind for kind, _ in rows] == ["exposure", "exposure"]
    one, two = (json.loads(body) for _, body in rows)
    assert (one["request_id"], one["user_id"], one["query"]) == ("r-1", "ann", "running shoes")
    assert (one["variant"], one["items"]) == (first["variant"], [FIRST_ID, FIRST_ID + 1])
    assert one["latency_ms"] == first["timings_ms"]["total"]
    assert (two["user_id"], len(two["bucket"])) == (None, 16)
    assert one["bucket"] != two["bucket"]


def test_unknown_paths_and_methods_are_problems(running: Running) -> None:
    assert_problem(running.client.get("/v2/search"), 404)
    assert_problem(running.client.delete("/v1/search"), 405)


def test_an_item_is_read_by_its_id(running: Running) -> None:
    body = running.client.get(f"/v1/items/{FIRST_ID + 5}").json()
    assert (body["title"], body["sid"]) == ("Espresso machine", [2, 0, 2, 1, 0])
    assert_problem(running.client.get("/v1/items/7"), 404)
    assert_problem(running.client.get("/v1/items/seven"), 422, "item_id")
    assert_problem(running.client.get(f"/v1/items/{2**64}"), 422, "item_id")


def test_variants_and_catalog_describe_what_is_served(running: Running) -> None:
    variants = running.client.get("/v1/variants").json()["variants"]
    assert [(v["name"], v["share"], v["keywords"]) for v in variants] == [
        ("control", 0.5, False),
        ("keywords", 0.5, True),
    ]
    catalog = running.client.get("/v1/catalog").json()
    assert catalog["items"] == 6
    assert {"shoes", "home"} <= set(catalog["categories"])
    assert catalog["examples"] == ["running shoes", "wool socks"]


def test_an_internal_error_says_only_the_request_id(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answer = running.client.post("/v1/search", json={"query": "boom"})
    problem = assert_problem(answer, 500)
    assert problem["detail"] == "internal error"
    assert "errors" not in problem
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name == "onesearch.request"]
    assert any('"exception":"RuntimeError"' in line and problem["instance"] in line for line in lines)
    assert not any("boom" in line for line in lines)


def test_log_lines_are_json_without_what_the_user_typed(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        running.search("secret wish", {"X-Request-Id": "r-7"}, user_id="ann-smith")
        running.client.get("/v1/search?q=secret+wish&user_id=ann-smith")
    text = "\n".join(JsonFormatter().format(r) for r in caplog.records if r.name.startswith("onesearch"))
    line = next(line for line in map(json.loads, text.splitlines()) if line["logger"] == "onesearch.request")
    assert (line["request_id"], line["route"], line["status"]) == ("r-7", "/v1/search", 200)
    assert "secret" not in text
    assert "ann-smith" not in text


def test_readiness_replays_the_golden_examples(running: Running) -> None:
    for _ in range(100):
        answer = running.client.get("/readyz")
        if answer.json()["variants"]["control"]["state"] != "starting":
            break
    assert answer.status_code == 200
    assert answer.json()["status"] == "ready"
    assert running.client.get("/healthz").status_code == 200
    for path in ("/", "/healthz", "/readyz"):  # what `curl -I` and some load balancers send
        head = running.client.head(path)
        assert (head.status_code, head.content) == (200, b"")


def test_a_service_with_wrong_golden_examples_is_alive_but_not_ready(tmp_path: Path) -> None:
    started = Running(tmp_path, faults=tuple(f"example {i}: scores differ" for i in range(9)))
    with started.client as client:
        for _ in range(100):
            answer = client.get("/readyz")
            if answer.json()["variants"]["control"]["state"] != "starting":
                break
        assert answer.status_code == 503
        reasons = answer.json()["variants"]["keywords"]["reasons"]
        assert reasons[0] == "example 0: scores differ"
        assert reasons[-1] == "and 4 more"
        assert client.get("/healthz").status_code == 200


def test_metrics_count_requests_stages_and_what_was_missing(running: Running) -> None:
    running.search("shoes", {"X-OneSearch-Variant": "control"}, user_id="ann")
    running.client.get("/nowhere")
    running.event("click", FIRST_ID, "ann")
    text = running.client.get("/metrics").text
    assert 'onesearch_requests_total{route="/v1/search",status="200",variant="control"} 1.0' in text
    assert 'onesearch_requests_total{route="unmatched",status="404",variant=""} 1.0' in text
    assert 'onesearch_stage_seconds_count{stage="decode",variant="control"} 1.0' in text
    assert 'onesearch_degraded_total{reason="unknown_user"} 1.0' in text
    assert 'onesearch_events_total{type="click"} 1.0' in text
    assert 'onesearch_variant_info{catalog="c1",model="m1",variant="keywords"} 1.0' in text


def test_the_openapi_document_describes_searches_and_problems(running: Running) -> None:
    document = running.client.get("/openapi.json").json()
    post = document["paths"]["/v1/search"]["post"]
    assert MEDIA_TYPE in post["responses"]["422"]["content"]
    assert "SearchAnswer" in json.dumps(post["responses"]["200"])
    assert "HTTPValidationError" not in json.dumps(document)


def test_the_runner_and_the_store_are_closed_with_the_app(tmp_path: Path) -> None:
    started = Running(tmp_path)
    with started.client:
        pass
    assert started.runner.closed
