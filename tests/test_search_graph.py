"""The search graph finds what the decode loop finds: every backbone, any trie, masks, ties, short beams."""

from typing import get_args

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from tiny import SHAPES, SIZES, tiny_model, tiny_prompt, tiny_renderer

from model_export.search_graph import SearchGraph, export_search
from model_export.search_inputs import SearchShape, TrieArrays, results
from model_export.to_tensorrt import operator_faults
from onesearch.decode import BeamConfig, beam_search
from onesearch.errors import ConfigError, ExportError
from onesearch.model import TorchDecoder
from onesearch.model_config import HistoryMode
from trie import SidTrie

QUERIES = ("red shoes", "blue", "bag bag bag")


def random_trie(seed, rows=400):
    """SIDs with crowded and lonely nodes, so that degrees differ wildly."""
    rng = np.random.default_rng(seed)
    codes = np.column_stack([rng.integers(0, size, rows) for size in SIZES])
    codes[: rows // 2, :2] = 0
    return SidTrie.build(codes, SIZES)


@pytest.fixture(scope="module")
def renderer():
    return tiny_renderer()


def in_torch(model, shape, feeds):
    levels = range(len(shape.sizes))
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    trie = ([tensors[f"{part}_{level}"] for level in levels] for part in ("first", "codes"))
    with torch.no_grad():
        found = SearchGraph(model, shape)(*(tensors[n] for n in ("ids", "mask", "history", "eligible")), *trie)
    return results(*(part.numpy() for part in found))


def expect_decode_loop(found, model, renderer, trie, shape, prompts, masks):
    config, decoder = BeamConfig(shape.width, min(shape.top_n, shape.width)), TorchDecoder(model, renderer)
    for answer, prompt, mask in zip(found, prompts, masks, strict=False):
        edges = None if mask is None else trie.subset(mask)
        expected = beam_search(decoder.start(prompt), trie, config, edges)
        assert answer.codes.tolist() == expected.codes.tolist()
        assert answer.leaves.tolist() == expected.leaves.tolist()
        np.testing.assert_allclose(answer.scores, expected.scores, atol=2e-5)


@pytest.mark.parametrize(("backbone", "history"), [*((name, "gates") for name in SHAPES), ("bart", "qformer")])
@pytest.mark.parametrize("width", [1, 12, 512])
def test_it_finds_what_the_decode_loop_finds(renderer, backbone, history, width):
    model, trie, rng = tiny_model(renderer, 0, backbone, history), random_trie(width), np.random.default_rng(width)
    shape = SearchShape.fit(trie, batch=5, width=width, top_n=min(width, 50), prompt=40)
    prompts = [tiny_prompt(renderer, query, seed) for seed, query in enumerate(QUERIES)] * 2
    prompts = prompts[:5]
    for behaviour, prompt in enumerate(prompts[:2]):  # of two users one behaviour each is not known
        prompt.history[behaviour] = 0
    nothing, few = np.zeros(trie.num_sids, bool), rng.random(trie.num_sids) < 0.02
    masks = [None, few, rng.random(trie.num_sids) < 0.5, nothing, None]
    feeds = shape.request_feeds(prompts, masks, trie.num_sids) | shape.trie_feeds(trie)
    found = in_torch(model, shape, feeds)
    assert len(found[3].codes) == 0
    expect_decode_loop(found, model, renderer, trie, shape, prompts, masks)


def test_equal_scores_are_ordered_by_code(renderer):
    """A model that cannot tell anything apart: the first SIDs in code order win on every level."""
    model, trie = tiny_model(renderer), random_trie(7)
    with torch.no_grad():
        model.embedding.zero_()
        model.head_bias.zero_()
    shape = SearchShape.fit(trie, batch=1, width=9, top_n=9, prompt=40)
    prompt = tiny_prompt(renderer)
    feeds = shape.request_feeds([prompt], [None], trie.num_sids) | shape.trie_feeds(trie)
    (found,) = in_torch(model, shape, feeds)
    assert found.leaves.tolist() == list(range(9))
    expect_decode_loop([found], model, renderer, trie, shape, [prompt], [None])


@pytest.mark.parametrize("history", get_args(HistoryMode))
def test_one_onnx_graph_serves_two_catalogs(renderer, tmp_path, history):
    model, trie = tiny_model(renderer, backbone="qwen3", history=history), random_trie(1)
    rng = np.random.default_rng(1)
    shape = SearchShape.fit(trie, batch=2, width=16, top_n=10, prompt=40)
    export_search(model, shape, tmp_path / "search.onnx")
    assert SearchShape.load(tmp_path / "search.json") == shape
    session = InferenceSession(tmp_path / "search.onnx", providers=["CPUExecutionProvider"])
    prompts = [tiny_prompt(renderer, query) for query in QUERIES[:2]]
    for catalog in (trie, random_trie(2, rows=300)):
        masks = [None, rng.random(catalog.num_sids) < 0.05]
        feeds = shape.request_feeds(prompts, masks, catalog.num_sids) | shape.trie_feeds(catalog)
        found = results(*session.run(["codes", "scores", "leaves"], feeds))
        expect_decode_loop(found, model, renderer, catalog, shape, prompts, masks)
    uses, faults = operator_faults([tmp_path / "search.onnx"])
    assert faults == []
    assert uses["search.onnx"]["TopK"] == 9  # two on each level but the first, where all fit, and the final order


def test_trie_arrays_are_the_children_of_every_node():
    trie = random_trie(3)
    arrays, sids = TrieArrays.of(trie), trie.sids()
    for level in range(trie.levels):
        prefixes = np.unique(sids[:, :level], axis=0) if level else np.empty((1, 0), np.uint16)
        assert len(arrays.first[level]) == len(prefixes) + 1
        for node, prefix in enumerate(prefixes):
            start, end = arrays.first[level][node : node + 2]
            assert arrays.codes[level][start:end].tolist() == trie.children(prefix).tolist()
    assert len(arrays.codes[-1]) == trie.num_sids


def test_padding_stays_small_where_degrees_differ_wildly():
    """One node with 4000 children among 500 with one: padding every node to the largest would cost 2 M candidates."""
    codes = [(0, 0, 0, 0, c) for c in range(4000)] + [(1 + i, 0, 0, 0, 0) for i in range(500)]
    trie = SidTrie.build(np.array(codes, np.uint16), (512, 1, 1, 1, 4096))
    shape = SearchShape.fit(trie, batch=1, width=512, top_n=50, prompt=8)
    candidates = [rows * step for rows, step in zip(shape.chunks, shape.chunk, strict=True)]
    assert 4500 <= candidates[-1] <= 4 * 4500


def test_what_does_not_fit_is_named(renderer):
    trie = random_trie(4, rows=40)
    shape = SearchShape.fit(trie, batch=1, width=8, top_n=5, prompt=10)
    with pytest.raises(ExportError, match=r"level 4: \d+ edges, the graph has room for \d+"):
        shape.trie_feeds(random_trie(5, rows=2000))
    with pytest.raises(ExportError, match="made for"):
        shape.trie_feeds(SidTrie.build(np.zeros((1, 5), np.uint16), (9, 9, 9, 9, 9)))
    with pytest.raises(ConfigError, match="2 prompts of up to"):
        shape.request_feeds([tiny_prompt(renderer)] * 2, [None, None], trie.num_sids)
    with pytest.raises(ConfigError, match="no SIDs"):
        SearchShape.fit(SidTrie.build(np.empty((0, 5), np.uint16), SIZES), 1, 8, 5, 10)
    with pytest.raises(ConfigError, match="top_n 9"):
        SearchShape.fit(trie, 1, 8, 9, 10)
