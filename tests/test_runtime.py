import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_model import walk
from tiny import tiny_prompt
from tiny_bundle import CODEBOOKS

from model_export.quantise import quantise_graph
from onesearch.bundle import open_bundle
from onesearch.decode import BeamConfig, beam_search
from onesearch.errors import ConfigError
from onesearch.model import TorchDecoder, open_model
from onesearch.runtime import Int8Decoder, OnnxDecoder, open_decoder
from onesearch.sequence import Fields


@pytest.fixture(scope="module")
def renderer(exported):
    return open_bundle(exported[0]).renderer


@pytest.fixture(scope="module")
def graphs(exported):
    return exported[0] / "graphs"


def trace(decoder, prompt, seed, beams=9):
    """All logits of one made-up search."""
    step = decoder.start(prompt)
    return [step(codes, parents) for codes, parents in walk(np.random.default_rng(seed), CODEBOOKS.sizes, beams)]


def test_graphs_equal_the_torch_decoder_at_every_level(exported, renderer, graphs):
    torch, onnx = (
        TorchDecoder(open_model(exported[0]), renderer),
        OnnxDecoder(graphs, renderer.sids, renderer.bos, 1),
    )
    prompts = [
        tiny_prompt(renderer),
        renderer.prompt("search", Fields(query="a")),
        tiny_prompt(renderer, "bag " * 30),
    ]
    for seed, prompt in enumerate(prompts):
        for beams in (1, 9, 64):
            expected, found = trace(torch, prompt, seed, beams), trace(onnx, prompt, seed, beams)
            for a, b in zip(expected, found, strict=True):
                assert b.dtype == np.float32 and b.flags.c_contiguous and b.shape == a.shape
                np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max())


def test_an_early_stop_of_the_real_graphs_changes_nothing(exported, renderer, graphs):
    decoder, trie = OnnxDecoder(graphs, renderer.sids, renderer.bos, 1), open_bundle(exported[0]).trie
    prompt = tiny_prompt(renderer)
    expected = beam_search(decoder.start(prompt), trie, BeamConfig(32, 5))
    found = beam_search(decoder.start(prompt), trie, BeamConfig(32, 5, early_stop=4))
    assert found.codes.tolist() == expected.codes.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_int8_is_close_but_not_the_same(renderer, graphs):
    exact, rough = (open_decoder(graphs, renderer.sids, renderer.bos, 1, p) for p in ("fp32", "int8"))
    assert isinstance(rough, Int8Decoder)
    prompt = tiny_prompt(renderer)
    for beams in (1, 9, 64):
        for a, b in zip(trace(exact, prompt, 0, beams), trace(rough, prompt, 0, beams), strict=True):
            assert b.dtype == np.float32 and b.flags.c_contiguous and b.shape == a.shape
            assert 1e-6 < np.abs(a - b).max() / np.abs(a).max() < 0.1


def test_a_quantised_graph_serves_where_there_are_no_native_arrays(renderer, graphs, tmp_path):
    for name in ("prefill.onnx", "step.onnx"):
        shutil.copy(graphs / name, tmp_path)
    for name in ("prefill", "step"):
        quantise_graph(tmp_path / f"{name}.onnx", tmp_path / f"{name}.int8.onnx")
    exact, rough = (open_decoder(tmp_path, renderer.sids, renderer.bos, 1, p) for p in ("fp32", "int8"))
    assert isinstance(rough, OnnxDecoder)
    prompt = tiny_prompt(renderer)
    gaps = [
        np.abs(a - b).max() / np.abs(a).max()
        for a, b in zip(trace(exact, prompt, 0), trace(rough, prompt, 0), strict=True)
    ]
    assert 1e-6 < max(gaps) < 0.3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_requests_on_threads_do_not_disturb_each_other(renderer, graphs, precision):
    decoder = open_decoder(graphs, renderer.sids, renderer.bos, 1, precision)
    prompts = [tiny_prompt(renderer, f"query {i}", seed=i) for i in range(8)]
    alone = [trace(decoder, prompt, i) for i, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: trace(decoder, prompts[i % 8], i % 8), range(32)))
    for i, found in enumerate(together):
        assert all(np.array_equal(a, b) for a, b in zip(alone[i % 8], found, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_two_requests_can_be_interleaved(renderer, graphs, precision):
    decoder = open_decoder(graphs, renderer.sids, renderer.bos, 1, precision)
    a, b = tiny_prompt(renderer), tiny_prompt(renderer, "bag", seed=5)
    steps = decoder.start(a), decoder.start(b)
    expected = trace(decoder, a, 3), trace(decoder, b, 3)
    for level, (codes, parents) in enumerate(walk(np.random.default_rng(3), CODEBOOKS.sizes)):
        for step, logits in zip(steps, expected, strict=True):
            np.testing.assert_array_equal(step(codes, parents), logits[level])


def test_missing_broken_or_unknown_graphs_are_config_errors(renderer, graphs, tmp_path):
    with pytest.raises(ConfigError, match=r"prefill\.onnx"):
        OnnxDecoder(tmp_path, renderer.sids, renderer.bos, 1)
    (tmp_path / "prefill.onnx").write_bytes((graphs / "prefill.onnx").read_bytes())
    (tmp_path / "step.onnx").write_bytes(b"not a graph")
    with pytest.raises(ConfigError, match=r"step\.onnx"):
        OnnxDecoder(tmp_path, renderer.sids, renderer.bos, 1)
    with pytest.raises(ConfigError, match="'fp8' is unknown, expected one of fp32, int8"):
        open_decoder(graphs, renderer.sids, renderer.bos, 1, "fp8")
    with pytest.raises(ConfigError, match=r"prefill\.int8\.onnx: is missing; export the bundle again"):
        open_decoder(tmp_path, renderer.sids, renderer.bos, 1, "int8")
    shutil.copy(graphs / "prefill.int8.onnx", tmp_path)
    content = (graphs / "step.int8.npz").read_bytes()
    for damaged in (b"PK", content[:-500], content.replace(b"own_q_scale", b"own_q_scald")):
        (tmp_path / "step.int8.npz").write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"step\.int8\.npz"):
            open_decoder(tmp_path, renderer.sids, renderer.bos, 1, "int8")
