"""The TensorRT kit: complete or absent, its profiles cover what is served, its graphs agree with torch."""

import shutil
import subprocess
from pathlib import Path

import onnx
import orjson
import pytest
from onnx import TensorProto, helper
from test_export import command

from model_export import parity, search_graph, to_onnx
from model_export.to_tensorrt import TensorRtConfig, build_script, check_width, export_tensorrt, operator_faults
from onesearch.errors import ConfigError, ExportError


def test_the_kit_is_complete_and_says_that_nothing_was_built(kit):
    out, report = kit
    graphs = ["prefill.onnx", "search_b2_w512.json", "search_b2_w512.onnx", "step.onnx"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*graphs, "build.sh", "operators.json", "profiles.json"]
    )
    about = orjson.loads((out / "profiles.json").read_bytes())
    assert about["built"] is False and about["parity"] == report
    assert report["fp16"]["logits"] < 1e-2 and report["search_b2_w512"]["overlap_top_10"] >= 0.95
    types = {i.name: i.type.tensor_type.elem_type for i in onnx.load(out / "step.onnx").graph.input}
    assert types["state_keys_0"] == types["context_values_1"] == TensorProto.FLOAT16


def test_the_script_builds_every_graph_within_its_profile(kit):
    out, _ = kit
    script = (out / "build.sh").read_text()
    assert subprocess.run(["sh", "-n", out / "build.sh"], check=False).returncode == 0
    assert script.count("trtexec --onnx=") == 3 and script.count("--stronglyTyped") == 3
    step = onnx.load(out / "step.onnx", load_external_data=False).graph
    widest = dict(
        part.split(":")
        for part in script.split("--onnx=step.onnx")[1].split("--maxShapes=")[1].split()[0].split(",")
    )
    assert set(widest) == {i.name for i in step.input}
    assert widest["tokens"] == "512" and widest["state_keys_1"].startswith("4x512x")


def test_a_beam_wider_than_the_profile_is_an_error_naming_both(exported, tmp_path):
    with pytest.raises(
        ExportError, match="variant control: beam width 512 is wider than the TensorRT profile's 64"
    ):
        export_tensorrt(exported[0], tmp_path / "kit", TensorRtConfig((16, 64), (1,), 10), lambda step: None)
    assert list(tmp_path.iterdir()) == []


def test_every_fault_of_a_command_is_listed_and_nothing_is_written(exported, tmp_path):
    (tmp_path / "kit").mkdir()
    options = ("--target", "tensorrt", "--out", tmp_path / "kit", "--weights", "fp8")
    result = command(exported[0], *options, "--width", 4000, "--batch", 0, "--top-n", 5000)
    assert result.exit_code == 2
    for fault in ("width 4000", "batch 0", "top_n 5000", "'fp8'", "exists already"):
        assert fault in result.output
    assert list((tmp_path / "kit").iterdir()) == []
    assert "--out: is missing" in command(exported[0], "--target", "tensorrt").output


def test_graphs_that_miss_the_gate_leave_nothing(kit, exported, tmp_path, monkeypatch):
    for name in ("prefill", "step"):
        graph = kit[0] / f"{name}.onnx"
        monkeypatch.setattr(to_onnx, f"export_{name}", lambda model, path, graph=graph: shutil.copy(graph, path))

    def copied(model, shape, path):
        shutil.copy(kit[0] / "search_b2_w512.onnx", path)
        shape.save(path.with_suffix(".json"))

    monkeypatch.setattr(search_graph, "export_search", copied)
    monkeypatch.setitem(parity.LIMITS, "fp16", parity.Limits(logits=0, scores=0))
    with pytest.raises(ExportError, match=r"fp16: logits differ .*\n.*fp16: scores .*\n.*search_b2_w512: scores"):
        export_tensorrt(exported[0], tmp_path / "kit", TensorRtConfig((512,), (2,), 20), lambda step: None)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_or_type_that_tensorrt_lacks_is_named(tmp_path: Path):
    ints = [helper.make_tensor_value_info(name, TensorProto.INT64, [3]) for name in ("x", "y")]
    nodes = [
        helper.make_node("Clip", ["x"], ["z"]),
        helper.make_node("BitShift", ["z", "x"], ["y"], direction="LEFT"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", ints[:1], ints[1:]))
    onnx.save(model, tmp_path / "g.onnx")
    uses, faults = operator_faults([tmp_path / "g.onnx"])
    assert uses == {"g.onnx": {"BitShift": 1, "Clip": 1}}
    assert faults == ["g.onnx: TensorRT 10.1 has no BitShift", "g.onnx: TensorRT 10.1 has no Clip of INT64"]


def test_check_width_accepts_what_fits():
    from model_export.to_tensorrt import Range

    ranges = {"step": {"tokens": Range((1,), (8,), (8,))}}
    check_width(8, ranges)
    with pytest.raises(ConfigError, match="width 9 is wider than the TensorRT profile's 8"):
        check_width(9, ranges)
    assert "--minShapes=tokens:1 \\\n  --optShapes=tokens:8" in build_script(ranges, [])
