"""Real bundles behind the service: what is served, what is refused, and the command as a process."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from command_line import invoke
from service_fakes import fake_deployment, fake_engine, fake_settings
from starlette.testclient import TestClient
from tiny_bundle import write_tiny_bundle

from model_export.cli import export_onnx
from onesearch.command import REFUSED
from service import workers
from service.app import create_app
from service.cli import main
from service.deployment import open_deployment
from service.store import open_store


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, _ = write_tiny_bundle(tmp_path_factory.mktemp("served"))
    export_onnx(path, "fp32", lambda step: None)
    return path


@pytest.fixture(scope="module")
def client(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = fake_settings(tmp_path_factory.mktemp("state"))
    app = create_app(settings, open_deployment([bundle], settings), open_store(settings))
    with TestClient(app) as started:
        yield started


def refusal(*paths: Path) -> str:
    result = invoke(main, *paths)
    assert result.exit_code == REFUSED, result.output
    return result.output


def test_a_trained_bundle_answers_and_is_ready(client: TestClient) -> None:
    body = client.post("/v1/search", json={"query": "red shoes", "limit": 10, "explain": True}).json()
    assert len(body["items"]) == 10
    assert len({item["item_id"] for item in body["items"]}) == 10
    scores = [item["score"] for item in body["items"]]
    assert scores == sorted(scores, reverse=True)
    assert len(body["explain"]["beams"]) == 5
    for _ in range(500):
        ready = client.get("/readyz")
        if "starting" not in ready.text:
            break
    assert ready.json() == {
        "status": "ready",
        "variants": {name: {"state": "ready", "reasons": []} for name in ("control", "keywords")},
    }


def test_variants_of_the_recipe_differ_in_keywords(client: TestClient) -> None:
    answers = {
        name: client.post("/v1/search", json={"query": "red shoes"}, headers={"X-OneSearch-Variant": name}).json()
        for name in ("control", "keywords")
    }
    assert answers["control"]["keywords"] == []
    assert answers["keywords"]["keywords"] != []


@pytest.mark.parametrize("query", ["тапочки", "拖鞋", "qqqq zzzz", "🥾", "!!!", "x" * 256])
def test_queries_in_any_script_or_of_unseen_words_are_answered(client: TestClient, query: str) -> None:
    body = client.post("/v1/search", json={"query": query, "limit": 200})
    assert body.status_code == 200
    assert len(body.json()["items"]) == 30


def test_filters_give_full_pages_of_what_is_demanded(client: TestClient) -> None:
    filters = {"category": "Shoes", "price_max": 4, "in_stock": True}
    body = client.post("/v1/search", json={"query": "blue lamp", "filters": filters}).json()
    assert sorted(item["item_id"] for item in body["items"]) == [2, 3, 4]
    nothing = client.post("/v1/search", json={"query": "blue lamp", "filters": {"price_min": 1e9}}).json()
    assert nothing["items"] == []


def test_clicks_change_what_the_model_reads(client: TestClient) -> None:
    for item_id in (3, 4):
        event = {"type": "click", "item_id": item_id, "user_id": "ann"}
        assert client.post("/v1/events", json=event).status_code == 202
    body = client.post("/v1/search", json={"query": "bag", "user_id": "ann", "explain": True}).json()
    assert body["degraded"] == []
    assert body["explain"]["history"] == {"queries": 0, "clicks": 2, "orders": 0}


def test_damaged_foreign_and_unfinished_bundles_are_refused_in_one_message(bundle: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    trie, weights = damaged / "trie.bin", damaged / "weights.safetensors"
    image = bytearray(trie.read_bytes())
    image[len(image) // 2] ^= 1
    trie.write_bytes(image)
    weights.write_bytes(weights.read_bytes()[:-10])
    (damaged / "graphs" / "step.onnx").unlink()
    unfinished = shutil.copytree(bundle, tmp_path / "unfinished", ignore=shutil.ignore_patterns("graphs"))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"schema_version": 99}')
    said = refusal(damaged, unfinished, foreign, tmp_path / "missing", bundle)
    for expected in ("trie.bin", "weights.safetensors", "onesearch-export", "schema_version is 99", "missing"):
        assert expected in said
    assert f"{bundle}:" not in said


def test_two_bundles_of_one_name_are_refused(bundle: Path, tmp_path: Path) -> None:
    assert "its name 'bundle' is taken" in refusal(bundle, shutil.copytree(bundle, tmp_path / "bundle"))


def test_a_port_in_use_is_not_said_to_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "log_config", lambda level: None)  # the tests' own logging stays
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = fake_settings(tmp_path).model_copy(update={"port": taken.getsockname()[1]})
        app = create_app(settings, fake_deployment(fake_engine(tmp_path)), open_store(settings))
        with pytest.raises(SystemExit) as stopped:
            workers.serve_app(app, settings)
    assert stopped.value.code and "serves on" not in capsys.readouterr().err


def test_the_command_serves_and_stops_when_asked(bundle: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from service.cli import main; main()", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"^onesearch serves on (http://[0-9.:]+)", line):
                    break
            assert found is not None
            answer = httpx2.get(f"{found[1]}/v1/search", params={"q": "secret mug", "limit": 3}, timeout=30)
            assert len(answer.json()["items"]) == 3
        finally:
            process.send_signal(signal.SIGTERM)
        logged = process.stderr.read()
        process.wait(timeout=30)
    assert process.returncode in (0, -signal.SIGTERM)  # uvicorn ends by the signal once it has drained
    assert "secret" not in logged
    records = [json.loads(line) for line in logged.splitlines()]
    assert "/v1/search" in [record.get("route") for record in records]
