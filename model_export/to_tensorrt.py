"""The TensorRT kit of a bundle: graphs, optimisation profiles, an operator check and the script that builds engines.

    OUT/prefill.onnx, step.onnx         the two decoder graphs in one type, built strongly typed
    OUT/search_b<batch>_w<width>.onnx   the whole search, one per batch size and beam width, with its .json shape
    OUT/profiles.json                   the ranges of every input, which `build.sh` repeats as trtexec options
    OUT/operators.json                  every operator the graphs use and whether TensorRT supports it
    OUT/build.sh                        exactly what builds the engines, on the machine with the GPU

Building needs a GPU and TensorRT, so nothing here runs an engine: parity is measured on the graphs themselves.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import orjson

from onesearch.bundle import Bundle, open_bundle
from onesearch.errors import ConfigError, ExportError
from onesearch.model_config import ModelConfig
from onesearch.runtime import OnnxDecoder
from onesearch.sequence import SequenceConfig
from onesearch.sid import LEVELS

TENSORRT = "10.1"
PROFILES = "profiles.json"
OPERATORS = Path(__file__).with_name("tensorrt_operators.txt")
MAX_TOP_K = 3839  # TopK's K must be less than 3840
Type = Literal["fp32", "fp16", "bf16"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorRtConfig:
    """What engines are built for: beam widths, batch sizes of the search graph, results, and the type of weights."""

    widths: tuple[int, ...] = (512,)
    batches: tuple[int, ...] = (1,)
    top_n: int = 50
    type: Type = "fp16"

    def faults(self) -> list[str]:
        """Everything wrong with it."""
        faults = [f"width {width}: expected 1..{MAX_TOP_K}" for width in self.widths if not 0 < width <= MAX_TOP_K]
        faults += [f"batch {batch}: expected 1 or more" for batch in self.batches if batch < 1]
        if not self.widths or not self.batches:
            faults.append("expected at least one width and one batch size")
        elif not 1 <= self.top_n <= min(self.widths):
            faults.append(f"top_n {self.top_n}: expected 1..{min(self.widths)}, the narrowest beam")
        if self.type not in get_args(Type):
            faults.append(f"type {self.type!r}: expected one of {', '.join(get_args(Type))}")
        return faults


@dataclass(frozen=True)
class Range:
    """One input of an engine: the smallest, the most common and the largest shape."""

    least: Shape
    usual: Shape
    most: Shape


def profiles(
    config: ModelConfig, sequence: SequenceConfig, engines: TensorRtConfig
) -> dict[str, dict[str, Range]]:
    """Per dynamic graph (`prefill`, `step`) and input, what it is built for. The search graphs are static."""
    prompt, width = sequence.max_ids, max(engines.widths)
    codes = max(config.sid_sizes)
    heads = config.kv_heads or config.heads
    head = config.state_width // heads
    ids = Range((1, 1), (1, prompt), (1, prompt))
    history = (1, *config.history_shape)
    step = {
        "tokens": Range((1,), (width,), (width,)),
        "parents": Range((1,), (width,), (width,)),
        "head": Range((1,), (codes,), (codes,)),
        "context_mask": Range((1,), (prompt,), (prompt,)),
    }
    for layer in range(config.decoder_layers):
        step[f"context_keys_{layer}"] = Range((heads, head, 1), *[(heads, head, prompt)] * 2)
        step[f"context_values_{layer}"] = Range((heads, 1, head), *[(heads, prompt, head)] * 2)
    for layer in range(config.decoder_layers):
        for part in ("keys", "values"):
            most = (LEVELS - 1, width, config.state_width)
            step[f"state_{part}_{layer}"] = Range((0, 1, config.state_width), most, most)
    return {"prefill": {"ids": ids, "mask": ids, "history": Range(history, history, history)}, "step": step}


def check_width(width: int, ranges: Mapping[str, Mapping[str, Range]]) -> None:
    """Raises ConfigError when a beam is wider than the step engine's profile."""
    widest = ranges["step"]["tokens"].most[0]
    if width > widest:
        raise ConfigError(f"beam width {width} is wider than the TensorRT profile's {widest}")


def operator_faults(graphs: Iterable[Path]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Uses of every operator per graph, and a fault for each that TensorRT lacks, as such or for the type it gets."""
    lines = OPERATORS.read_text(encoding="utf-8").splitlines()
    supported = {name: types for name, *types in (line.split() for line in lines if not line.startswith("#"))}
    uses: dict[str, dict[str, int]] = {}
    faults = []
    for path in graphs:
        model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
        types = _value_types(model.graph)
        names = [f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node]
        uses[path.name] = dict(sorted(Counter(names).items()))
        missing = {f"has no {name}" for name in names if name not in supported}
        for node in model.graph.node:
            data = types.get(node.input[_DATA_INPUT.get(node.op_type, 0)] if node.input else "")
            if data and node.op_type not in _UNTYPED and data not in supported.get(node.op_type, [data]):
                missing.add(f"has no {node.op_type} of {data}")
        faults += [f"{path.name}: TensorRT {TENSORRT} {fault}" for fault in sorted(missing)]
    return uses, faults


_DATA_INPUT = {"Where": 1}
_UNTYPED = {"ConstantOfShape"}  # its only input is a shape


def _value_types(graph: Any) -> dict[str, str]:
    """TensorRT's name of every value's type; absent where inference did not find it."""
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {value.name: value.data_type for value in graph.initializer}
    return {name: _TYPE_NAMES[kind] for name, kind in types.items() if kind in _TYPE_NAMES}


_TYPE_NAMES = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.DOUBLE: "DOUBLE",
}


def build_script(ranges: Mapping[str, Mapping[str, Range]], searches: Iterable[str]) -> str:
    """The shell script that builds every engine of the kit beside its graph."""
    lines = [
        "#!/bin/sh",
        f"# Builds the engines of this folder with trtexec of TensorRT {TENSORRT} or later. Needs a GPU; engines run",
        "# only on the GPU model and TensorRT version that built them. Not run by the exporter.",
        "set -eu",
        'cd "$(dirname "$0")"',
    ]
    for graph, inputs in ranges.items():
        options = [
            f"--{name}Shapes={','.join(f'{i}:{_times(getattr(r, part))}' for i, r in inputs.items())}"
            for name, part in (("min", "least"), ("opt", "usual"), ("max", "most"))
        ]
        lines.append(_trtexec(graph, options))
    lines += [_trtexec(name, []) for name in searches]
    return "\n".join(lines) + "\n"


def _trtexec(graph: str, options: list[str]) -> str:
    parts = [f"trtexec --onnx={graph}.onnx --saveEngine={graph}.plan --stronglyTyped --skipInference", *options]
    return " \\\n  ".join(parts)


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))


def export_tensorrt(path: Path, out: Path, engines: TensorRtConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the kit to `out`, whole or not at all; returns its parity report.

    Raises ExportError listing every fault: of the configuration, a variant wider than the profile, an operator
    TensorRT lacks, a graph that misses its parity limits; BundleError when the bundle does not open.
    """
    from model_export import parity, to_onnx
    from model_export.search_graph import export_search
    from model_export.search_inputs import SearchShape
    from onesearch.model import TorchDecoder, open_model

    say("[1/5] open the bundle")
    bundle, model = open_bundle(path, graphs=False), open_model(path)
    ranges = profiles(model.config, bundle.renderer.config, engines) if engines.widths else {}
    faults = engines.faults() or _variant_faults(bundle, ranges)
    if out.exists():
        faults.append(f"{out}: exists already, remove it or choose another name")
    if not bundle.examples:
        faults.append("examples.jsonl: is empty, nothing to prove parity with")
    if faults:
        raise ExportError(f"tensorrt {path}", faults)
    partial = out.resolve().with_name(f".{out.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        say("[2/5] write the decoder graphs")
        typed = to_onnx.typed(model, engines.type)
        to_onnx.export_prefill(typed, partial / "prefill.onnx")
        to_onnx.export_step(typed, partial / "step.onnx")
        searches = []
        for batch in engines.batches:
            for width in engines.widths:
                searches.append(f"search_b{batch}_w{width}")
                say(f"[3/5] write {searches[-1]}.onnx")
                shape = SearchShape.fit(bundle.trie, batch, width, engines.top_n, bundle.renderer.config.max_ids)
                export_search(typed, shape, partial / f"{searches[-1]}.onnx")

        say(f"[4/5] check operators and compare with torch on {len(bundle.examples)} golden examples")
        uses, faults = operator_faults(sorted(partial.glob("*.onnx")))
        reference = TorchDecoder(model, bundle.renderer)
        if engines.type == "bf16":  # neither ONNX Runtime on a CPU nor NumPy has it: torch computes in it instead
            rows = [parity.measure(bundle, reference, TorchDecoder(typed, bundle.renderer), engines.type)]
        else:
            sids, bos = bundle.renderer.sids, bundle.renderer.bos
            candidate = OnnxDecoder(partial, sids, bos, threads=1)
            rows = [parity.measure(bundle, reference, candidate, engines.type)]
            rows += [
                parity.measure_search(bundle, reference, partial / f"{name}.onnx", engines.type)
                for name in searches
            ]
        faults += [fault for row in rows for fault in row.faults()]
        if faults:
            raise ExportError(f"tensorrt {path}", faults)

        say("[5/5] profiles and build script")
        report = {row.graph or row.precision: row.summary() for row in rows}
        about = {
            "tensorrt": TENSORRT,
            "built": False,
            "model_version": bundle.manifest.model_version,
            "digest": bundle.manifest.digest,
            **asdict(engines),
            "profiles": {graph: {i: asdict(r) for i, r in inputs.items()} for graph, inputs in ranges.items()},
            "parity": report,
        }
        (partial / PROFILES).write_bytes(orjson.dumps(about, option=orjson.OPT_INDENT_2))
        (partial / "operators.json").write_bytes(orjson.dumps(uses, option=orjson.OPT_INDENT_2))
        script = partial / "build.sh"
        script.write_text(build_script(ranges, searches), encoding="utf-8")
        script.chmod(0o755)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def built_engines(kit: Path, bundle: Bundle, width: int) -> Type:
    """The type of the engines that a kit's build.sh has built for the model of a bundle.

    Raises ExportError listing every fault: no kit, one of another model, without its engines, too narrow for a beam of
    `width`, or of bf16, which NumPy and so Triton's Python backend do not have.
    """
    try:
        about = orjson.loads((kit / PROFILES).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        fault = f"{PROFILES}: {error}; run: onesearch-export {bundle.path} --target tensorrt --out {kit}"
        raise ExportError(f"engines {kit}", [fault]) from error
    of_bundle = {"model_version": bundle.manifest.model_version, "digest": bundle.manifest.digest}
    faults = [f"{k} is {about[k]}, the bundle's is {v}" for k, v in of_bundle.items() if about[k] != v]
    if (widest := about["profiles"]["step"]["tokens"]["most"][0]) < width:
        faults.append(f"widest beam is {widest}, expected {width} or more")
    if about["type"] == "bf16":
        faults.append("type is bf16, expected fp32 or fp16")
    faults += [
        f"{name}.plan: is missing, run build.sh on the machine with the GPU"
        for name in ("prefill", "step")
        if not (kit / f"{name}.plan").is_file()
    ]
    if faults:
        raise ExportError(f"engines {kit}", faults)
    kind: Type = about["type"]
    return kind


def _variant_faults(bundle: Bundle, ranges: Mapping[str, Mapping[str, Range]]) -> list[str]:
    faults = []
    for name, variant in bundle.manifest.recipe.get("variants", {}).items():
        try:
            check_width(int(variant["width"]), ranges)
        except ConfigError as error:
            faults.append(f"variant {name}: {error}")
    return faults
