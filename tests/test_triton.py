"""The exported repository in a real Triton server, and the gateway in front of it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import random_contexts

from benchmarks.triton_server import NoTriton, TritonServer
from model_export.to_triton import Serving, export_triton
from onesearch import remote
from onesearch.bundle import Bundle, open_bundle
from onesearch.catalog import Filters, Item
from onesearch.decode import BeamConfig
from onesearch.errors import DeadlineError
from onesearch.live import Change
from onesearch.remote import Call
from onesearch.runtime import OnnxDecoder
from onesearch.search import Searcher, SearchOptions, SearchResult
from service.inference_triton import InferenceUnavailable, Probe, TritonModel, TritonSearcher

pytestmark = pytest.mark.triton

FILTERS = (
    None,
    Filters(category="Shoes"),
    Filters(brand="acme", price_max=20.0, in_stock=True),
    Filters(exclude_items=tuple(range(1, 29))),
    Filters(category="nothing of the kind"),
)


@pytest.fixture(scope="module")
def bundle(exported) -> Bundle:
    return open_bundle(exported[0])


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("triton")
    export_triton(exported[0], folder / "repository", Serving(), lambda step: None)
    server = started(folder, folder / "repository", remote.MODEL)
    yield server
    server.kill()


def started(folder: Path, repository: Path, *models: str) -> TritonServer:
    try:
        return TritonServer(folder, repository, models)
    except NoTriton as missing:
        pytest.skip(str(missing))


def local(bundle: Bundle) -> OnnxDecoder:
    assert bundle.graphs is not None
    return OnnxDecoder(bundle.graphs, bundle.renderer.sids, bundle.renderer.bos, 1)


def model_on(server: TritonServer, bundle: Bundle, timeout: float = 10.0, name: str = "") -> TritonModel:
    return TritonModel(f"triton://{server.address}{name}", "bundle", bundle.manifest.digest, timeout)


@pytest.fixture
def searcher(server: TritonServer, bundle: Bundle) -> TritonSearcher:
    return TritonSearcher(bundle, model_on(server, bundle))


def assert_same(found: SearchResult, expected: SearchResult) -> None:
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    assert found.rows.tolist() == expected.rows.tolist()
    assert (found.beams, found.eligible, found.keywords) == (expected.beams, expected.eligible, expected.keywords)


def options(number: int) -> SearchOptions:
    """Search options of every kind, in turn."""
    return SearchOptions(
        limit=50,
        width=(512, 50, 64)[number % 3],
        score=("level", "legal")[number // 3 % 2],
        keywords=number % 2 == 0,
        filters=FILTERS[number % len(FILTERS)],
    )


def test_two_hundred_searches_with_filters_equal_the_embedded_ones_also_from_many_clients(
    server: TritonServer, bundle: Bundle, searcher: TritonSearcher
) -> None:
    embedded = Searcher(bundle, local(bundle))
    asked = [(context, options(number)) for number, context in enumerate(random_contexts(200))]
    counts = [server.counted(f"nv_inference_{what}", remote.MODEL) for what in ("count", "exec_count")]
    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(lambda one: searcher.search(*one), asked))
    for (context, how), result in zip(asked, found, strict=True):
        assert_same(result, embedded.search(context, how))
        assert result.model_version == bundle.manifest.model_version
    requests, executions = (
        server.counted(f"nv_inference_{what}", remote.MODEL) - before
        for what, before in zip(("count", "exec_count"), counts, strict=True)
    )
    assert requests == 200
    assert executions < requests  # the server made batches of them


def test_live_changes_of_the_catalog_reach_the_server_with_each_search(
    bundle: Bundle, searcher: TritonSearcher, tmp_path: Path
) -> None:
    embedded = Searcher(bundle, local(bundle))
    changes = [
        Change(n + 1, 100 + n, Item(100 + n, f"silver {thing}", "nova")) for n, thing in enumerate("abcdef")
    ]
    changes += [Change(7 + n, item_id, None) for n, item_id in enumerate((2, 3, 4, 5, 6, 7))]
    seen = set()
    for one in (embedded, searcher):
        (tmp_path / type(one).__name__).mkdir()
        one.live.apply(changes[:9])
    for step in (
        lambda one: None,
        lambda one: one.live.compact(tmp_path / type(one).__name__),
        lambda one: one.live.apply(changes[9:]),
    ):
        for one in (embedded, searcher):
            step(one)
        for number, context in enumerate(random_contexts(10, seed=1)):
            expected = embedded.search(context, options(number))
            assert_same(searcher.search(context, options(number)), expected)
            seen |= {embedded.live.snapshot.item(row).item_id for row in expected.rows.tolist()}
    assert {100, 105} <= seen and not {2, 3, 4} & seen


def test_a_server_without_the_model_or_of_another_contract_is_named(server: TritonServer, bundle: Bundle) -> None:
    assert Probe(TritonSearcher(bundle, model_on(server, bundle)))() == []
    missing = TritonSearcher(bundle, model_on(server, bundle, name="/other_{bundle}"))
    assert "other_bundle" in Probe(missing)()[0]
    foreign = TritonSearcher(bundle, TritonModel(f"triton://{server.address}", "", "0" * 64, 1.0))
    assert "contract digest" in Probe(foreign)()[0]
    with pytest.raises(InferenceUnavailable, match="other_bundle"):
        missing.search(random_contexts(1)[0], SearchOptions())


@pytest.mark.parametrize(
    "fault",
    [
        {"digest": "0" * 64},
        {"catalog": "unpublished"},
        {"catalog": "../1/trie"},
        {"legal": np.ones(1, np.uint8)},
        {"added": np.full((2, 5), 9999, np.uint16)},
    ],
)
def test_calls_that_do_not_fit_the_server_are_refused_and_it_lives_on(
    server: TritonServer, bundle: Bundle, fault: dict[str, Any]
) -> None:
    context = random_contexts(1)[0]
    searcher = Searcher(bundle, local(bundle))
    manifest = bundle.manifest
    call = Call.of(searcher.render(context)[0], BeamConfig(8, 8), manifest.digest, manifest.catalog_version)
    model = model_on(server, bundle)
    with pytest.raises(InferenceUnavailable):
        model.answer(replace(call, **fault), float("inf"))
    assert Probe(TritonSearcher(bundle, model))() == []


def test_a_deadline_ends_the_search_here_and_there(server: TritonServer, searcher: TritonSearcher) -> None:
    context = random_contexts(1)[0]
    with pytest.raises(DeadlineError):
        searcher.search(context, SearchOptions(deadline=0.0))
    impatient = TritonSearcher(searcher.bundle, model_on(server, searcher.bundle, timeout=0.2))
    assert Probe(impatient)() == []
    server.freeze(True)
    try:
        with pytest.raises(InferenceUnavailable, match="Deadline"):
            impatient.search(context, SearchOptions())
        with pytest.raises(DeadlineError):
            searcher.search(context, SearchOptions(deadline=time.monotonic() + 0.2))
    finally:
        server.freeze(False)
    assert searcher.search(context, SearchOptions()).rows.size
