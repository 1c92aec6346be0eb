"""`onesearch-log export`, with both stores: training accepts the tables and sees what serving saw; the loop closes."""

import asyncio
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from command_line import Ran, invoke
from pydantic import SecretStr
from redis import Redis
from service_fakes import FIRST_ID, TITLES, FakeRunner, fake_deployment, fake_engine
from starlette.testclient import TestClient
from tiny_bundle import tiny_items

from model_export.cli import export_onnx
from onesearch.bundle import MANIFEST, open_bundle
from onesearch.command import REFUSED
from service import log
from service.app import create_app
from service.deployment import Deployment, open_deployment
from service.events import Event, Exposure
from service.journal import JOURNAL
from service.settings import Settings
from service.store import open_store
from training.microbatch import StreamConfig
from training.pipeline import UNTIL
from training.probe import GateConfig
from training.sessions import PageView, page_views
from training.stages import DpoStage, TpmaStage
from training.stream import follow
from training.tables import Tables, frame, load_tables, write_tables

T = 1_700_000_000
KEY = "correct horse battery"
DAY = 86_400


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where an empty store of either kind is."""
    if request.param == "sqlite":
        return f"sqlite:{tmp_path / 'state.sqlite3'}"
    url = str(request.getfixturevalue("redis_url"))
    with Redis.from_url(url) as client:
        client.flushall()
    return url


def fill(state: str, entries: Sequence[Event | Exposure], profiles: dict[str, str]) -> None:
    async def work() -> None:
        store = open_store(Settings(state=state))
        for entry in entries:
            if isinstance(entry, Event):
                await store.events.record([entry])
            else:
                await store.events.expose([entry])
        for user, profile in profiles.items():
            await store.users.set_profile(user, profile, time.time())
        await store.close()

    asyncio.run(work())


def export(out: Path, data: Path, state: str, *more: object) -> Ran:
    return invoke(log.main, "export", out, "--data", data, "--state", state, *more, name="onesearch-log")


def exposure(request: str, user: str | None, at: float, items: tuple[int, ...], query: str) -> Exposure:
    return Exposure(request, "control", {}, "beef", user, query, T + at, items, 12.5)


def event(number: int, kind: str, item: int, user: str, at: float, request: str | None = None) -> Event:
    return Event(f"e{number}", kind, item, user, T + at, request)  # type: ignore[arg-type]


LOG = [
    event(0, "click", 3, "ann", 1, "r1"),
    exposure("r1", "ann", 0.4, (5, 3, 9), "Red  shoes"),
    exposure("r2", "42", 10.7, (7, 8), "lamp"),
    event(1, "cart", 8, "42", 12, "r2"),
    exposure("r3", None, 11, (1, 2), "mug"),
    exposure("r4", "ann", 20, (3, 4), "bag"),
    exposure("r4", "ann", 20, (3, 4), "bag"),
    event(2, "click", 4, "ann", 21),
    event(3, "order", 4, "ann", 40 * DAY, "r4"),
    event(4, "click", 30, "ann", 22),
    exposure("r5", "ann", 21 * DAY, (), "thing"),
]


def shop(folder: Path, recall: dict[str, list[Any]] | None = None) -> Path:
    users = frame("users", {"user_id": [42, 43], "gender": ["M", "F"]})
    earlier = None if recall is None else frame("recall", recall)
    write_tables(Tables(tiny_items(), users, earlier), folder / "shop", "parquet")
    return folder / "shop"


def by_query(folder: Path) -> dict[str, PageView]:
    return {view.context.query: view for view in page_views(load_tables(folder))}


def test_training_reads_the_log_as_one_would_by_hand(tmp_path: Path, state: str) -> None:
    fill(state, LOG, {"ann": "24-30 F", "43": "50+"})
    ran = export(tmp_path / "out", shop(tmp_path), state)
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.splitlines() == [
        f"{tmp_path / 'out'}: 5 of 5 searches in the log, 1 repeated; 2 clicks, 1 carts, 1 orders; "
        "1 events belong to no search that showed their item",
        "30 items, 0 of them changed while serving and 0 removed or put back; 3 users, profiles of 1 from the store; "
        "5 page views",
    ]
    tables = load_tables(tmp_path / "out")
    assert tables.items.equals(tiny_items()) and tables.users is not None and tables.recall is not None
    ann = log.numbered("user ids", ["ann"], keep_numbers=True)["ann"]
    profiles = tables.users.select("user_id", "gender", "age_bucket").rows()
    assert profiles == [(42, "M", "UNKNOWN"), (43, "F", "UNKNOWN"), (ann, "F", "24-30")]
    assert tables.recall["carted_item_ids"].to_list().count([8]) == 1
    views = by_query(tmp_path / "out")
    assert list(views) == ["red shoes", "lamp", "mug", "bag", "thing"]
    first, lamp, mug, bag, last = views.values()
    assert [view.time for view in views.values()] == [T, T + 10, T + 11, T + 20, T + 21 * DAY]
    assert [view.user_id for view in views.values()] == [ann, 42, 0, ann, ann]
    assert [view.impressed for view in views.values()] == [(5, 3, 9), (7, 8), (1, 2), (3, 4), ()]
    assert [view.clicked for view in views.values()] == [(3,), (), (), (4,), ()]
    assert [view.ordered for view in views.values()] == [(), (), (), (4,), ()]
    assert first.context.profile == last.context.profile == "24-30 F"
    assert (lamp.context.profile, mug.context.profile) == ("M", "")
    assert not first.context.recent_items and not mug.context.knows_user
    assert (bag.context.recent_queries, bag.context.recent_items) == (("red shoes",), (3,))
    assert (last.context.recent_queries, last.context.recent_items) == (("red shoes", "bag"), (3, 4))


def test_an_export_goes_on_from_an_earlier_one(tmp_path: Path, state: str) -> None:
    old = {
        "user_id": [42],
        "session_id": [1],
        "query": ["white rug"],
        "time_index": [T - 100],
        "impressed_item_ids": [[29, 30]],
        "clicked_item_ids": [[30]],
    }
    data = shop(tmp_path, old)
    fill(state, LOG[:4], {})
    assert export(tmp_path / "one", data, state).exit_code == 0
    assert list(by_query(tmp_path / "one")) == ["white rug", "red shoes", "lamp"]
    fill(state, [*LOG[4:], event(9, "order", 3, "ann", 41 * DAY, "r1")], {})
    assert export(tmp_path / "two", tmp_path / "one", state).exit_code == 0
    views = by_query(tmp_path / "two")
    assert list(views) == ["white rug", "red shoes", "lamp", "mug", "bag", "thing"]
    assert views["red shoes"].ordered == (3,)  # the late order
    assert views["lamp"].context.recent_items == (30,)  # user 42 of the tables is the service's "42"
    assert export(tmp_path / "whole", data, state).exit_code == 0
    assert (tmp_path / "whole" / "recall.jsonl").read_bytes() == (tmp_path / "two" / "recall.jsonl").read_bytes()


def test_only_searches_of_the_period_are_exported_with_all_their_events(tmp_path: Path, state: str) -> None:
    fill(state, LOG, {})
    data = shop(tmp_path)
    ran = export(tmp_path / "out", data, state, "--since", "2023-11-14T22:13:31", "--until", "2023-11-14T22:13:41")
    assert ran.exit_code == 0, ran.output
    views = by_query(tmp_path / "out")
    assert list(views) == ["mug", "bag"] and views["bag"].ordered == (4,)  # T is 22:13:20
    ran = export(tmp_path / "none", data, state, "--since", "2030-01-01")
    assert (ran.exit_code, ran.stderr.splitlines()[-1]) == (
        REFUSED,
        "onesearch-log: log: has 5 searches, none of them to export",
    )
    assert not (tmp_path / "none").exists()


def test_nothing_is_overwritten_and_what_is_missing_is_told(tmp_path: Path) -> None:
    state, data = f"sqlite:{tmp_path / 'state.sqlite3'}", shop(tmp_path)
    for arguments, fault in (
        ((data, data, state), "exists already, expected a name for a new data set"),
        ((tmp_path / "out", tmp_path, state), "has no items table"),
        ((tmp_path / "out", data, state), "is no file, expected the store of a service"),
        ((tmp_path / "out", data, state, "--catalog", tmp_path), f"{JOURNAL} is no file, expected the journal"),
    ):
        ran = export(*arguments)
        assert ran.exit_code == REFUSED and fault in ran.stderr, ran.output
    assert [path.name for path in tmp_path.iterdir()] == ["shop"]


def test_a_forgotten_user_is_gone_with_the_log(tmp_path: Path) -> None:
    """Forgetting drops the profile at once; the searches go when the log lets go of them."""
    state, data = f"sqlite:{tmp_path / 'state.sqlite3'}", shop(tmp_path)
    fill(state, LOG[:2], {"ann": "24-30 F"})

    async def forget() -> None:
        store = open_store(Settings(state=state))
        await store.users.forget("ann")
        await store.close()

    asyncio.run(forget())
    assert export(tmp_path / "one", data, state).exit_code == 0
    (view,) = page_views(load_tables(tmp_path / "one"))
    assert (view.clicked, view.context.profile) == ((3,), "")
    fill(state, [exposure("late", "42", 31 * DAY, (1,), "mug")], {})
    assert export(tmp_path / "two", data, state).exit_code == 0
    assert list(by_query(tmp_path / "two")) == ["mug"]
    users = load_tables(tmp_path / "two").users
    assert users is not None and users["user_id"].to_list() == [42, 43]


class Shoppers:
    """People at a running service, whose clock is theirs: every search takes a second, and every event."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, deployment: Deployment, settings: Settings, now: float = T
    ) -> None:
        self.now = now
        clock = SimpleNamespace(time=lambda: self.now, monotonic=time.monotonic, perf_counter=time.perf_counter)
        for module in ("service.pipeline", "service.memory"):
            monkeypatch.setattr(f"{module}.time", clock)
        self.client = TestClient(create_app(settings, deployment, open_store(settings)))

    def search(self, query: str, user: str | None = None) -> tuple[str, list[int]]:
        """The request id and the items found."""
        self.now += 1
        answer = self.client.post("/v1/search", json={"query": query, "user_id": user, "limit": 10})
        assert answer.status_code == 200, answer.text
        return answer.json()["request_id"], [item["item_id"] for item in answer.json()["items"]]

    def act(self, kind: str, item: int, user: str, request: str) -> None:
        self.now += 1
        body = {"type": kind, "item_id": item, "user_id": user, "request_id": request}
        assert self.client.post("/v1/events", json=body).status_code == 202


def test_training_sees_what_serving_saw(tmp_path: Path, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contexts that the model was shown, search by search, are those of the page views: no skew."""
    engine = fake_engine(tmp_path / "bundle")
    settings = Settings(state=state, catalog=tmp_path / "catalog", state_timeout_ms=5000, admin_key=SecretStr(KEY))
    shoppers = Shoppers(monkeypatch, fake_deployment(engine), settings, time.time() - 3600)
    with shoppers.client as client:
        for user, body in (("ann", {"gender": "F", "age_bucket": "24-30"}), ("42", {"gender": "M"})):
            assert client.put(f"/v1/users/{user}", json=body).status_code == 204
        for number, query in enumerate(
            ["running shoes", "wool socks", "boots", "shoes", "running  SOCKS", "nothing"] * 3
        ):
            user = ("ann", "42", "ann", None)[number % 4]
            request, items = shoppers.search(query, user)
            for item in items[: number % 3] if user else ():
                shoppers.act("click", item, user or "", request)
                shoppers.act("click", item, user or "", request)
            if user and items and number % 4 == 2:
                shoppers.act("order", items[0], user, request)
        added = client.put(
            "/v1/items/7", json={"title": "Running mug"}, headers={"Authorization": f"Bearer {KEY}"}
        )
        assert added.status_code == 201
        request, items = shoppers.search("running mug", "ann")
        assert items[0] == 7
    write_tables(
        Tables(
            frame(
                "items",
                {"item_id": [FIRST_ID + i for i in range(len(TITLES))], "item_title": [t for t, *_ in TITLES]},
            )
        ),
        tmp_path / "shop",
    )
    ran = export(tmp_path / "out", tmp_path / "shop", state, "--catalog", tmp_path / "catalog")
    assert ran.exit_code == 0, ran.output
    views = page_views(load_tables(tmp_path / "out"))
    assert isinstance(engine.runner, FakeRunner)
    assert [view.context for view in views] == [context for context, _ in engine.runner.seen]
    assert any(len(view.context.recent_items) > 5 for view in views) and any(view.ordered for view in views)
    assert "7 items, 1 of them changed while serving" in ran.stdout
    assert load_tables(tmp_path / "out").items["item_title"].to_list()[-1] == "Running mug"


def test_a_service_learns_from_its_own_log(
    exported: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve, log, export, learn, publish, serve again: the item that was added while serving is in the bundle."""
    bundle = tmp_path / "bundle"
    shutil.copytree(exported[0], bundle)
    manifest = orjson.loads((bundle / MANIFEST).read_bytes())
    manifest["metrics"][UNTIL] = T - 400 * DAY
    (bundle / MANIFEST).write_bytes(orjson.dumps(manifest))
    settings = Settings(
        state=f"sqlite:{tmp_path / 'state.sqlite3'}",
        catalog=tmp_path / "catalog",
        state_timeout_ms=5000,
        admin_key=SecretStr(KEY),
    )
    shoppers = Shoppers(monkeypatch, open_deployment([bundle], settings), settings)
    titles = tiny_items()["item_title"].to_list()
    with shoppers.client as client:
        added = client.put(
            "/v1/items/900", json={"title": "plum sofa"}, headers={"Authorization": f"Bearer {KEY}"}
        )
        assert added.status_code == 201
        for number in range(80):
            request, items = shoppers.search(titles[number % 30], f"user-{number % 7}")
            shoppers.act("click", items[number % len(items)], f"user-{number % 7}", request)
    ran = export(tmp_path / "data", shop(tmp_path), settings.state, "--catalog", settings.catalog)
    assert ran.exit_code == 0 and "80 of 80 searches" in ran.stdout, ran.output

    stages = (DpoStage("prefer", 2, batch=8, lr=1e-4), TpmaStage("policy", 2, batch=4, group=4, lr=1e-4))
    gate = GateConfig(hr=1.0, valid=1.0, ndcg=1.0, kl=1e9)
    config = StreamConfig(threads=1, window=70, delay=10, probe=2, stages=stages, gate=gate)
    _, first, second = follow(config, bundle, tmp_path / "data", tmp_path / "stream", windows=2)
    assert (
        T - 70 < first.start < T < first.end == second.start
    )  # more than a year without searches was passed over
    assert first.views + second.views > 40 and first.new_items == 1 and second.new_items == 0
    assert (first.fresh, first.loss) == (0, {})  # there was nothing old to replay
    assert second.fresh > 10 and second.replayed >= second.fresh and second.loss.keys() == {"prefer", "policy"}
    assert first.published and second.published

    published = tmp_path / "stream" / "current"
    assert open_bundle(published).catalog.row_of(900) is not None
    export_onnx(published.resolve(), "fp32", lambda step: None)
    again = Settings(state=settings.state, catalog=tmp_path / "catalog-2", state_timeout_ms=5000)
    with Shoppers(monkeypatch, open_deployment([published.resolve()], again), again).client as client:
        assert client.get("/v1/items/900").json()["title"] == "plum sofa"
        found = client.post("/v1/search", json={"query": "plum sofa", "limit": 31}).json()
        assert found["model_version"] == second.model_version
        assert 900 in [item["item_id"] for item in found["items"]]
