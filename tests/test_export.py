import json
import shutil
from dataclasses import replace
from itertools import combinations
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from command_line import invoke
from onnxruntime import InferenceSession
from tiny import SHAPES, tiny_model, tiny_prompt, tiny_renderer
from tiny_bundle import write_tiny_bundle

from model_export import cli, gate, parity, quantise, to_onnx, to_triton
from model_export.cli import export_onnx
from model_export.parity import Comparison, Parity
from onesearch.bundle import open_bundle
from onesearch.context import SearchContext
from onesearch.decode import BeamResult
from onesearch.errors import BundleError, ExportError
from onesearch.model import Prefill, TorchDecoder
from onesearch.model_config import HistoryMode
from onesearch.runtime import OnnxDecoder, open_decoder
from onesearch.search import Searcher, SearchOptions, replay, score_gap


@pytest.fixture
def bundle_path(exported, tmp_path):
    """A private copy of the exported bundle."""
    return shutil.copytree(exported[0], tmp_path / "bundle")


@pytest.fixture
def quick_export(exported, monkeypatch):
    """Tracing takes seconds: take the graphs that were written before."""
    reuse_graphs(monkeypatch, exported[0] / "graphs")


def reuse_graphs(monkeypatch, graphs):
    for name in ("prefill", "step"):
        graph = graphs / f"{name}.onnx"
        monkeypatch.setattr(to_onnx, f"export_{name}", lambda model, path, graph=graph: shutil.copy(graph, path))


def scramble(monkeypatch, name):
    """From here on the int8 graph of that name is exported with its weights in another order."""
    quantised = quantise.quantise

    def scrambled(model, graphs):
        quantised(model, graphs)
        proto = onnx.load(graphs / name)
        for tensor in proto.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and (weight := onnx.numpy_helper.to_array(tensor)).ndim:
                other = np.random.default_rng(0).permutation(weight.ravel()).reshape(weight.shape)
                tensor.CopyFrom(onnx.numpy_helper.from_array(other, tensor.name))
        onnx.save(proto, graphs / name)

    monkeypatch.setattr(quantise, "quantise", scrambled)
    monkeypatch.setitem(parity.LIMITS, "int8", parity.Limits())


def command(*arguments):
    return invoke(cli.main, *arguments)


def test_an_exported_bundle_opens_and_its_graphs_replay_the_golden_examples(exported):
    path, stamp, steps = exported
    bundle = open_bundle(path)
    assert bundle.graph_stamp == stamp and len(steps) == 4
    decoder = OnnxDecoder(bundle.graphs, bundle.renderer.sids, bundle.renderer.bos, 1)
    assert replay(Searcher(bundle, decoder), bundle.examples) == []


@pytest.mark.parametrize(("backbone", "history"), [("gpt2", "gates"), ("qwen3", "qformer")])
def test_decoder_only_bundles_export_and_search_like_their_torch_model(tmp_path, backbone, history, monkeypatch):
    path, model = write_tiny_bundle(tmp_path, backbone, history)
    stamp = export_onnx(path, "int8", lambda step: None)
    fp32, int8 = stamp["parity"]["fp32"], stamp["parity"]["int8"]
    assert fp32["logits"] <= 1e-4 and fp32["logits"] < int8["logits"] < 0.5
    assert sorted(stamp["files"]) == ["prefill.int8.onnx", "prefill.onnx", "step.int8.onnx", "step.onnx"]
    assert int8["searches"] == 2 and int8["overlap_top_10"] >= 0.95
    bundle = open_bundle(path)
    rough = open_decoder(bundle.graphs, bundle.renderer.sids, bundle.renderer.bos, 1, "int8")
    assert replay(Searcher(bundle, rough), bundle.examples, "int8") == []
    decoder = OnnxDecoder(bundle.graphs, bundle.renderer.sids, bundle.renderer.bos, 1)
    assert replay(Searcher(bundle, decoder), bundle.examples) == []
    answer = Searcher(bundle, decoder).search(SearchContext("blue bag"), SearchOptions(limit=5))
    expected = Searcher(bundle, TorchDecoder(model, bundle.renderer)).search(
        SearchContext("blue bag"), SearchOptions(limit=5)
    )
    assert answer.rows.tolist() == expected.rows.tolist() and len(answer.rows) == 5
    reuse_graphs(monkeypatch, path / "graphs")
    scramble(monkeypatch, "step.int8.onnx")
    with pytest.raises(ExportError, match=r"int8: top 10 overlaps fp32 by 0\.\d+ on 2 held-out searches"):
        export_onnx(path, "int8", lambda step: None)
    assert open_bundle(path).graph_stamp == stamp


def presences(model):
    """Histories [1, R, 3, E] of users with clicks, with orders, with both and with none."""
    history = torch.randn(model.config.history_shape)
    known = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    return (history * known[..., None, None])[:, None].numpy()


@pytest.mark.parametrize("backbone", SHAPES)
@pytest.mark.parametrize("history", get_args(HistoryMode))
def test_the_prefill_graph_reads_whatever_behaviours_a_user_has(tmp_path, backbone, history):
    renderer = tiny_renderer()
    model, ids = tiny_model(renderer, 0, backbone, history), tiny_prompt(renderer).ids[None]
    to_onnx.export_prefill(model, tmp_path / "prefill.onnx")
    quantise.quantise_graph(tmp_path / "prefill.onnx", tmp_path / "prefill.int8.onnx")
    plain, int8 = (InferenceSession(tmp_path / f"prefill{kind}.onnx") for kind in ("", ".int8"))
    answers = []
    for vectors in presences(model):
        feeds = {"ids": ids, "mask": np.ones_like(ids), "history": vectors}
        with torch.no_grad():
            expected = Prefill(model)(*(torch.from_numpy(array) for array in feeds.values()))
        found, rough = plain.run(None, feeds), int8.run(None, feeds)
        for context, near, expected_context in zip(found, rough, expected, strict=True):
            np.testing.assert_allclose(context, expected_context.numpy(), atol=1e-4)
            np.testing.assert_allclose(near, context, atol=0.2 * np.abs(context).max() + 1e-6)
        answers.append(found[-1])
    assert all(np.abs(a - b).max() > 1e-3 for a, b in combinations(answers, 2))


def test_the_stamp_says_what_was_made_and_how_close_it_is(exported):
    path, stamp, _ = exported
    assert stamp["digest"] == open_bundle(path).manifest.digest
    assert sorted(stamp["files"]) == ["prefill.int8.onnx", "prefill.onnx", "step.int8.npz", "step.onnx"]
    fp32, int8 = stamp["parity"]["fp32"], stamp["parity"]["int8"]
    assert fp32["examples"] == 3 and fp32["overlap_top_10"] == 1
    assert 0 < fp32["logits"] <= 1e-4 and fp32["scores"] <= 1e-4
    assert fp32["logits"] < int8["logits"] < 0.5 and int8["overlap_top_10"] > 0.5


def test_int8_is_stamped_with_its_held_out_searches(exported):
    int8 = exported[1]["parity"]["int8"]
    assert int8["searches"] == 2 and int8["overlap_top_10"] >= 0.95
    assert int8["hr_10_change"][0] <= int8["hr_10_int8"] - int8["hr_10_fp32"] <= int8["hr_10_change"][1]


def test_int8_needs_held_out_searches(bundle_path, quick_export):
    manifest = json.loads((bundle_path / "manifest.json").read_bytes())
    del manifest["files"]["held_out.jsonl"]
    (bundle_path / "manifest.json").write_text(json.dumps(manifest))
    (bundle_path / "held_out.jsonl").unlink()
    result = command(bundle_path, "--precision", "int8")
    assert result.exit_code == 2 and "held_out.jsonl: holds nothing" in result.output
    assert command(bundle_path).exit_code == 0


def test_int8_that_loses_results_is_not_stamped(bundle_path, quick_export, monkeypatch):
    pack = quantise.quantise

    def blurred(model, graphs):
        with torch.no_grad():
            for layer in model.bart.decoder.layers:
                layer.fc2.weight.add_(torch.randn_like(layer.fc2.weight))
        pack(model, graphs)

    shutil.rmtree(bundle_path / "graphs")
    monkeypatch.setattr(quantise, "quantise", blurred)
    monkeypatch.setitem(parity.LIMITS, "int8", parity.Limits())
    with pytest.raises(ExportError, match=r"int8: top 10 overlaps fp32 by 0\.\d+ on 2 held-out searches"):
        export_onnx(bundle_path, "int8", lambda step: None)
    assert open_bundle(bundle_path).graphs is None


def test_the_gate_judges_the_int8_prefill_too(bundle_path, quick_export, monkeypatch):
    scramble(monkeypatch, "prefill.int8.onnx")
    with pytest.raises(ExportError, match=r"int8: top 10 overlaps fp32 by 0\.\d+ on 2 held-out searches"):
        export_onnx(bundle_path, "int8", lambda step: None)


def test_the_gate_refuses_a_loss_that_its_interval_can_see():
    fine = gate.Gate(500, 0.97, 0.30, 0.29, -0.01, 0.012)
    assert fine.faults() == []
    (fault,) = replace(fine, half_width=0.008).faults()
    assert fault.startswith(
        "int8: HR@10 is 0.290, fp32 has 0.300 on 500 held-out searches: a loss of 0.010 ± 0.008"
    )
    assert len(replace(fine, overlap=float("nan"), change=float("nan")).faults()) == 2


def test_graphs_have_named_axes_and_no_traces_of_the_machine(exported):
    path, *_ = exported
    for name in ("prefill", "step"):
        graph = onnx.load(path / "graphs" / f"{name}.onnx").graph
        assert not any(node.doc_string or node.metadata_props for node in graph.node)
        assert str(cli.__file__).rsplit("/", 2)[0].encode() not in (path / "graphs" / f"{name}.onnx").read_bytes()
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert shapes["tokens"] == shapes["parents"] == ["beams"] and shapes["head"] == ["codes"]
    assert shapes["context_keys_0"] == [2, 16, "prompt"]
    assert shapes["state_values_1"] == ["steps", "previous", 32]


def test_nothing_is_left_beside_the_bundle_and_a_second_export_replaces_the_first(bundle_path, quick_export):
    assert command(bundle_path).exit_code == 0
    assert [p.name for p in bundle_path.parent.iterdir()] == ["bundle"]
    assert sorted(open_bundle(bundle_path).graph_stamp["parity"]) == ["fp32"]


def test_graphs_that_miss_the_gate_are_not_stamped(bundle_path, quick_export, monkeypatch):
    shutil.rmtree(bundle_path / "graphs")
    monkeypatch.setitem(parity.LIMITS, "fp32", parity.Limits(logits=0, scores=1))
    with pytest.raises(ExportError, match=r"fp32: logits differ by .* on example \d \('.*'\), allowed 0"):
        export_onnx(bundle_path, "fp32", lambda step: None)
    assert open_bundle(bundle_path).graphs is None


def test_a_damaged_bundle_or_graph_is_reported_by_the_command(bundle_path):
    with (bundle_path / "weights.safetensors").open("ab") as file:
        file.write(b"x")
    result = command(bundle_path)
    assert result.exit_code == 2 and "weights.safetensors: sha256" in result.output
    with (bundle_path / "graphs" / "step.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError):
        open_bundle(bundle_path)


def test_an_unknown_target_or_precision_is_a_clear_error(bundle_path):
    for option, value in (("--target", "abacus"), ("--precision", "int3")):
        result = command(bundle_path, option, value)
        assert result.exit_code == 2 and value in result.output


def result_of(codes, scores):
    codes = np.array([[code] * 5 for code in codes], np.uint16)
    return BeamResult(codes, np.array(scores, np.float32), np.zeros(len(codes), np.int64), ())


def test_score_gap_forgives_near_ties_only():
    expected = result_of([1, 2, 3], [-1.0, -2.0, -2.00001])
    assert score_gap(expected, expected) == 0
    assert score_gap(expected, result_of([1, 3, 4], [-1.0, -2.0, -2.00001])) < 1e-4
    assert score_gap(expected, result_of([2, 1, 3], [-1.0, -2.0, -2.00001])) == 1
    assert score_gap(expected, result_of([1, 2], [-1.0, -2.0])) == float("inf")


def test_faults_name_the_worst_example():
    good = Comparison("shoes", 1e-6, 1e-6, 1.0)
    assert Parity("fp32", (good, good)).faults() == []
    (fault,) = Parity("fp32", (good, replace(good, query="bag", logits=0.5))).faults()
    assert fault == "fp32: logits differ by 0.5 on example 1 ('bag'), allowed 0.0001"


def test_a_graph_whose_weights_lie_beside_it_is_copied_whole_to_triton(exported, tmp_path):
    step, source, version = exported[0] / "graphs" / "step.onnx", tmp_path / "step.onnx", tmp_path / "1"
    onnx.save(onnx.load(step), source, save_as_external_data=True, location="step.onnx.data", size_threshold=0)
    version.mkdir()
    to_triton.copy_graph(source, version)
    source.with_name("step.onnx.data").unlink()
    assert sorted(path.name for path in version.iterdir()) == ["model.onnx", "step.onnx.data"]
    weights = [onnx.load(path).graph.initializer for path in (version / "model.onnx", step)]
    assert [t.raw_data for t in weights[0]] == [t.raw_data for t in weights[1]]
