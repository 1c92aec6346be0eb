"""Versions of the model on a running Triton server, and a gateway that lives through what happens to the server."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from command_line import invoke
from service_fakes import fake_settings
from starlette.testclient import TestClient
from test_triton import assert_same, local, model_on, options, started
from tiny_bundle import random_contexts

from benchmarks.triton_server import TritonServer
from model_export import triton_rollout
from model_export.to_triton import Graphs, Serving, active_version, export_triton, versions
from onesearch import remote
from onesearch.bundle import Bundle, open_bundle
from onesearch.errors import ExportError
from onesearch.search import Searcher, SearchOptions
from service.app import create_app
from service.deployment import open_deployment
from service.inference_triton import FALLBACK, TritonSearcher
from service.store import open_store

pytestmark = pytest.mark.triton
QUERY: dict[str, Any] = {
    "url": "/v1/search",
    "json": {"query": "red shoes", "limit": 10},
    "headers": {"X-OneSearch-Variant": "control"},
}


@pytest.fixture(scope="module")
def bundle(exported) -> Bundle:
    return open_bundle(exported[0])


@pytest.fixture(scope="module")
def repository(exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rollout") / "repository"
    export_triton(exported[0], path, Serving(instances=1), lambda step: None)
    return path


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    server = started(repository.parent, repository, remote.MODEL)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def newer(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the same identifiers and graphs and another model version and catalog version."""
    path = shutil.copytree(bundle.path, tmp_path_factory.mktemp("newer") / "bundle")
    for file, key in (
        (path / "manifest.json", "model_version"),
        (path / "graphs" / "stamp.json", "model_version"),
    ):
        file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | {key: "newer"}))
    manifest = path / "manifest.json"
    manifest.write_bytes(orjson.dumps(orjson.loads(manifest.read_bytes()) | {"catalog_version": "newer"}))
    return path


def command(*arguments: object) -> str:
    result = invoke(triton_rollout.main, *arguments)
    return f"{result.exit_code} {result.output}"


@contextmanager
def traffic(search: Callable[[], str]) -> Iterator[list[str]]:
    """Searches without a pause on two threads; their answers, and their failures, are collected."""
    answers: list[str] = []
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            try:
                answers.append(search())
            except Exception as error:
                answers.append(f"failed: {error!r}")

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_versions_are_switched_and_rolled_back_under_traffic_without_a_failed_search(
    server: TritonServer, repository: Path, bundle: Bundle, newer: Path
) -> None:
    searcher = TritonSearcher(bundle, model_on(server, bundle))
    context, how = random_contexts(1)[0], SearchOptions(limit=5, width=32)
    with traffic(lambda: str(searcher.search(context, how).model_version)) as answers:
        said = command("deploy", newer, repository, "--server", server.address)
        assert said.startswith("0 ") and "serves version 2, model newer" in said
        assert active_version(repository) == 2
        assert searcher.search(context, how).model_version == "newer"
        assert "serves version 1" in command("rollback", repository, "--server", server.address)
        assert searcher.search(context, how).model_version == bundle.manifest.model_version
    assert set(answers) == {"newer", bundle.manifest.model_version}
    told = command("status", repository, "--server", server.address)
    assert "version 1" in told and "active, ready" in told and "not loaded" in told


def test_a_version_that_gives_other_answers_is_not_served(
    server: TritonServer, repository: Path, bundle: Bundle, newer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_damaged(path: Path, target: Path, number: int, *rest: object) -> None:
        write(path, target, number, *rest)
        file = target / remote.MODEL / str(number) / "recorded.npz"
        call, answer = remote.read_recorded(file)[0]
        answer.found.scores[0] += 0.5
        remote.write_recorded(file, [(call, answer)])

    write = triton_rollout.write_version
    monkeypatch.setattr(triton_rollout, "write_version", write_damaged)
    before = active_version(repository), versions(repository)
    said = command("deploy", newer, repository, "--server", server.address)
    assert said.startswith("2 ") and "scores differ by 0.5" in said
    assert (active_version(repository), versions(repository)) == before
    result = TritonSearcher(bundle, model_on(server, bundle)).search(random_contexts(1)[0], SearchOptions())
    assert result.model_version == bundle.manifest.model_version


def test_a_catalog_published_later_is_searched_without_a_restart(
    server: TritonServer, repository: Path, newer: Path
) -> None:
    assert "published catalog newer" in command("catalog", newer, repository)
    later = open_bundle(newer)
    found = TritonSearcher(later, model_on(server, later)).search(random_contexts(1)[0], SearchOptions())
    assert_same(found, Searcher(later, local(later)).search(random_contexts(1)[0], SearchOptions()))


def test_nothing_is_left_of_a_repository_that_could_not_be_written(bundle: Bundle, tmp_path: Path) -> None:
    unfinished = shutil.copytree(bundle.path, tmp_path / "bundle", ignore=shutil.ignore_patterns("graphs"))
    with pytest.raises(ExportError, match="has no graphs"):
        export_triton(unfinished, tmp_path / "repository", Serving(), lambda step: None)
    with pytest.raises(ExportError, match=r"2 fault(.|\n)*graphs: 'abacus'(.|\n)*instances: 0"):
        Serving(graphs="abacus", instances=0)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    export_triton(bundle.path, tmp_path / "repository", Serving(), lambda step: None)
    with pytest.raises(ExportError, match="exists already"):
        export_triton(bundle.path, tmp_path / "repository", Serving(), lambda step: None)


@pytest.fixture
def engines(kit, tmp_path: Path) -> Path:
    """A TensorRT kit after its build.sh. No GPU is here: the graphs themselves stand in the place of their engines."""
    path = shutil.copytree(kit[0], tmp_path / "kit")
    for graph in ("prefill", "step"):
        shutil.copyfile(path / f"{graph}.onnx", path / f"{graph}.plan")
    return path


@pytest.mark.parametrize(
    ("graphs", "platform"), [("onnxruntime", "onnxruntime_onnx"), ("tensorrt", "tensorrt_plan")]
)
def test_the_graphs_can_run_as_models_of_their_own(
    graphs: Graphs, platform: str, engines: Path, tmp_path: Path, bundle: Bundle
) -> None:
    """The wheel has neither backend: stand-ins run the graphs as Python models behind the same names."""
    other, built = tmp_path / "served", graphs == "tensorrt"
    export_triton(bundle.path, other, Serving(graphs, instances=1), lambda step: None, engines if built else None)
    for model in (remote.PREFILL, remote.STEP):
        config = other / model / "config.pbtxt"
        text = config.read_text("utf-8")
        assert "KIND_GPU" in text and f'platform: "{platform}"' in text
        text = text.replace(f'platform: "{platform}"', 'backend: "python"').replace("KIND_GPU", "KIND_CPU")
        config.write_text(text, "utf-8")
        shutil.copy(Path(__file__).with_name("triton_graph.py"), other / model / "1" / "model.py")
    standing = started(tmp_path / "standing", other, remote.PREFILL, remote.STEP, remote.MODEL)
    try:
        model = model_on(standing, bundle)
        assert model.served()[1] == ("fp16" if built else "fp32")
        searcher, embedded = TritonSearcher(bundle, model), Searcher(bundle, local(bundle))
        for number, context in enumerate(random_contexts(6)):
            found, wanted = (each.search(context, options(number)) for each in (searcher, embedded))
            if not built:
                assert_same(found, wanted)
            else:
                np.testing.assert_allclose(found.scores, wanted.scores, atol=0.05)  # fp16, by rank
    finally:
        standing.kill()


def test_engines_that_do_not_fit_the_repository_are_refused(engines: Path, bundle: Bundle, tmp_path: Path) -> None:
    def refused(message: str, graphs: Graphs = "tensorrt", folder: Path | None = None) -> None:
        with pytest.raises(ExportError, match=message):
            export_triton(bundle.path, tmp_path / "r", Serving(graphs), lambda step: None, folder)
        assert not (tmp_path / "r").exists()

    refused("engines: are needed by tensorrt")
    refused("engines: are of no use to in-process", "in-process", engines)
    refused(r"profiles\.json: .*No such file", folder=tmp_path)
    (engines / "step.plan").unlink()
    about = orjson.loads((engines / "profiles.json").read_bytes())
    about |= {"model_version": "other", "type": "bf16"}
    about["profiles"]["step"]["tokens"]["most"] = [8]
    (engines / "profiles.json").write_bytes(orjson.dumps(about))
    wrong = (
        "4 fault",
        "model_version is other",
        "widest beam is 8",
        "type is bf16",
        "step.plan: is missing, run build.sh",
    )
    refused(r"(.|\n)*".join(wrong), folder=engines)


@contextmanager
def gateway(server: TritonServer, bundle: Path, state: Path, **settings: str) -> Iterator[TestClient]:
    changed = fake_settings(state).model_copy(update={"inference": f"triton://{server.address}", **settings})
    with TestClient(create_app(changed, open_deployment([bundle], changed), open_store(changed))) as client:
        yield client


def eventually(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.05)


def test_gateways_live_through_the_death_of_the_server(
    server: TritonServer, bundle: Bundle, tmp_path: Path
) -> None:
    bare = shutil.copytree(bundle.path, tmp_path / "bundle", ignore=shutil.ignore_patterns("graphs"))
    alone = gateway(server, bare, tmp_path)
    backed = gateway(server, bundle.path, tmp_path, inference_fallback="embedded")
    with alone as strict, backed as lenient:
        eventually(lambda: strict.get("/readyz").status_code == 200)
        expected = strict.post(**QUERY).json()
        assert expected["degraded"] == []
        assert {"inference", "prefill", "decode"} <= set(expected["timings_ms"])

        with traffic(lambda: str(strict.post(**QUERY).status_code)) as answers:
            eventually(lambda: "200" in answers)
            server.kill()
            eventually(lambda: "503" in answers)
        assert set(answers) == {"200", "503"}
        refused = strict.post(**QUERY)
        assert refused.headers["content-type"] == "application/problem+json" and server.address not in refused.text
        eventually(lambda: strict.get("/readyz").status_code == 503)
        assert server.address in strict.get("/readyz").text

        fallen = lenient.post(**QUERY).json()
        assert fallen["degraded"] == [FALLBACK]
        assert [i["item_id"] for i in fallen["items"]] == [i["item_id"] for i in expected["items"]]
        assert lenient.get("/readyz").status_code == 200

        server.start()
        eventually(lambda: strict.post(**QUERY).status_code == 200)
        eventually(lambda: strict.get("/readyz").status_code == 200)
        eventually(lambda: lenient.post(**QUERY).json()["degraded"] == [])
