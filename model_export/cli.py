"""`onesearch-export BUNDLE`: `--target onnx` adds graphs/ to a bundle, once parity is proven; `--target triton --out
REPOSITORY` writes a Triton model repository from a bundle that has them; `--target tensorrt --out FOLDER` writes
what builds TensorRT engines."""

import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer

import decoder
from onesearch.bundle import GRAPHS, STAMP, Bundle, open_bundle, sha256
from onesearch.command import run
from onesearch.errors import ExportError
from onesearch.runtime import PREFILL_FILE, STEP_FILE, Precision, open_decoder

Target = Literal["onnx", "triton", "tensorrt"]


def export_onnx(path: Path, precision: Precision, say: Callable[[str], None]) -> dict[str, Any]:
    """Write BUNDLE/graphs and return its stamp; `int8` adds the int8 forms to the fp32 graphs.

    An earlier export is replaced, and only when the new one has passed. Raises ExportError when the graphs miss
    their parity limits, BundleError when the bundle does not open.
    """
    from model_export import gate, parity, quantise, to_onnx
    from onesearch.model import TorchDecoder, open_model

    say("[1/4] open the bundle")
    bundle, model = open_bundle(path, graphs=False), open_model(path)
    if not bundle.examples:
        raise ExportError(f"bundle {path}", ["examples.jsonl: is empty, nothing to prove parity with"])
    graphs = _beside(path, "partial")
    graphs.mkdir()

    say("[2/4] write the graphs")
    precisions: list[Precision] = ["fp32"]
    to_onnx.export_prefill(model, graphs / PREFILL_FILE)
    to_onnx.export_step(model, graphs / STEP_FILE)
    if precision == "int8":
        quantise.quantise(model, graphs)
        precisions.append("int8")

    say(f"[3/4] compare with torch on {len(bundle.examples)} golden examples")
    sids, bos = bundle.renderer.sids, bundle.renderer.bos
    reference = TorchDecoder(model, bundle.renderer)
    decoders = {p: open_decoder(graphs, sids, bos, 1, p) for p in precisions}
    rows = [parity.measure(bundle, reference, tried, p) for p, tried in decoders.items()]
    faults = [fault for row in rows for fault in row.faults()]
    summary: dict[str, dict[str, Any]] = {row.precision: row.summary() for row in rows}
    if precision == "int8":
        gated = gate.measure(bundle, decoders["fp32"], decoders["int8"])
        summary["int8"] |= gated.summary()
        faults += gated.faults()
    if faults:
        raise ExportError(f"bundle {path}", faults)

    say("[4/4] stamp")
    stamp = _stamp(bundle, graphs, to_onnx.OPSET, summary)
    (graphs / STAMP).write_bytes(orjson.dumps(stamp, option=orjson.OPT_INDENT_2))
    _install(graphs, path)
    return stamp


def _stamp(bundle: Bundle, graphs: Path, opset: int, parity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "digest": bundle.manifest.digest,
        "model_version": bundle.manifest.model_version,
        "files": {file.name: sha256(file) for file in sorted(graphs.iterdir())},
        "opset": opset,
        "versions": {name: version(name) for name in ("onnx", "onnxruntime", "torch")},
        "kernels": decoder.kernels()[0],
        "parity": parity,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _beside(path: Path, role: str) -> Path:
    """A path next to the bundle that does not exist: a bundle holds no file its manifest does not list."""
    folder = path.resolve().with_name(f".{path.resolve().name}.graphs.{role}")
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _install(new: Path, path: Path) -> None:
    old, target = _beside(path, "old"), path / GRAPHS
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _main(
    bundle: Annotated[Path, typer.Argument(help="the bundle folder; with --from-hf the one to write")],
    target: Annotated[Target, typer.Option(help="what to export to")] = "onnx",
    precision: Annotated[Precision, typer.Option(help="int8 adds, or serves, the quantised graphs")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="triton: the repository, tensorrt: the folder to write")] = None,
    graphs: Annotated[
        str, typer.Option(help="triton: in-process (CPU), onnxruntime or tensorrt (GPU)")
    ] = "in-process",
    engines: Annotated[
        Path | None, typer.Option(help="triton with tensorrt: the kit of --target tensorrt, its engines built")
    ] = None,
    instances: Annotated[int, typer.Option(help="triton: processes of the search model")] = 2,
    width: Annotated[
        list[int] | None, typer.Option(help="tensorrt: a beam width, repeatable [default: 512]")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="tensorrt: searches at a time, repeatable [1]")] = None,
    top_n: Annotated[int, typer.Option(help="tensorrt: results of a search")] = 50,
    weights: Annotated[str, typer.Option(help="tensorrt: fp32, fp16 or bf16")] = "fp16",
    from_hf: Annotated[
        Path | None, typer.Option(help="first wrap this local transformers folder into the bundle")
    ] = None,
    sid_spec: Annotated[
        Path | None,
        typer.Option(help="from-hf: sid_spec.json of a bundle or identifiers folder, whose catalog is taken too"),
    ] = None,
) -> None:
    """Export the graphs of a bundle and prove that they agree with the model."""
    if from_hf is not None:
        _wrap(from_hf, sid_spec, bundle)
    if target == "triton":
        _triton(bundle, out, graphs, precision, instances, engines)
    elif target == "tensorrt":
        _tensorrt(bundle, out, (tuple(width or [512]), tuple(batch or [1]), top_n, weights))
    else:
        _report(export_onnx(bundle, precision, typer.echo)["parity"])


def _report(parity: Mapping[str, Any]) -> None:
    for name, row in parity.items():
        typer.echo(f"{name}: {', '.join(f'{key} {_text(value)}' for key, value in row.items())}")


def _text(value: Any) -> str:
    return f"[{value[0]:.3g}, {value[1]:.3g}]" if isinstance(value, list) else f"{value:.3g}"


def _triton(
    bundle: Path, out: Path | None, graphs: Any, precision: Precision, instances: int, engines: Path | None
) -> None:
    from model_export.to_triton import Serving, export_triton

    if out is None:
        raise ExportError("triton", ["--out: is missing, expected the model repository to write"])
    export_triton(bundle, out, Serving(graphs, precision, instances), typer.echo, engines)
    typer.echo(f"{out}: complete; load onesearch_search with tritonserver --model-control-mode=explicit")


def _wrap(checkpoint: Path, sid_spec: Path | None, bundle: Path) -> None:
    from model_export.from_hf import wrap

    if sid_spec is None:
        raise ExportError(
            "from-hf", ["--sid-spec: is missing, expected the sid_spec.json of an identifiers folder"]
        )
    manifest = wrap(checkpoint, sid_spec, bundle)
    typer.echo(f"{bundle}: model {manifest.model_version}; rows of tokens the checkpoint lacks are untrained")


def _tensorrt(bundle: Path, out: Path | None, engines: tuple[Any, ...]) -> None:
    from model_export.to_tensorrt import TensorRtConfig, export_tensorrt

    if out is None:
        raise ExportError("tensorrt", ["--out: is missing, expected the folder to write"])
    _report(export_tensorrt(bundle, out, TensorRtConfig(*engines), typer.echo))
    typer.echo(f"{out}: complete. No engine was built: run build.sh where the GPU and TensorRT are")


def main() -> None:
    """Console entry point."""
    run(_main)


if __name__ == "__main__":
    main()
