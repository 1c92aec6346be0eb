"""`onesearch-export BUNDLE`: `--target onnx` adds graphs/ to a bundle, once parity is proven; `--target triton --out
REPOSITORY` writes a Triton model repository from a bundle that has them."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer

import decoder
from onesearch.bundle import GRAPHS, STAMP, Bundle, open_bundle, sha256
from onesearch.errors import ExportError, OneSearchError
from onesearch.runtime import PREFILL_FILE, STEP_FILE, Precision, open_decoder

Target = Literal["onnx", "triton"]


def export_onnx(path: Path, precision: Precision, say: Callable[[str], None]) -> dict[str, Any]:
    """Write BUNDLE/graphs and return its stamp; `int8` adds the int8 step to the fp32 graphs.

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
    summary = {row.precision: row.summary() for row in rows}
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


def _stamp(bundle: Bundle, graphs: Path, opset: int, parity: dict[Precision, dict[str, Any]]) -> dict[str, Any]:
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
    bundle: Annotated[Path, typer.Argument(help="the bundle folder")],
    target: Annotated[Target, typer.Option(help="what to export to")] = "onnx",
    precision: Annotated[Precision, typer.Option(help="int8 adds, or serves, the quantised step graph")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="triton: the model repository to write")] = None,
    graphs: Annotated[
        str, typer.Option(help="triton: in-process (CPU), onnxruntime or tensorrt (GPU)")
    ] = "in-process",
    instances: Annotated[int, typer.Option(help="triton: processes of the search model")] = 2,
) -> None:
    """Export the graphs of a bundle and prove that they agree with the model."""
    try:
        if target == "triton":
            _triton(bundle, out, graphs, precision, instances)
            return
        stamp = export_onnx(bundle, precision, typer.echo)
    except OneSearchError as error:
        typer.echo(f"onesearch-export: {error}", err=True)
        raise typer.Exit(2) from error
    for name, row in stamp["parity"].items():
        typer.echo(f"{name}: {', '.join(f'{key} {_text(value)}' for key, value in row.items())}")


def _text(value: Any) -> str:
    return f"[{value[0]:.3g}, {value[1]:.3g}]" if isinstance(value, list) else f"{value:.3g}"


def _triton(bundle: Path, out: Path | None, graphs: Any, precision: Precision, instances: int) -> None:
    from model_export.to_triton import Serving, export_triton

    if out is None:
        raise ExportError("triton", ["--out: is missing, expected the model repository to write"])
    export_triton(bundle, out, Serving(graphs, precision, instances), typer.echo)
    typer.echo(f"{out}: complete; load onesearch_search with tritonserver --model-control-mode=explicit")


def main() -> None:
    """Console entry point."""
    typer.run(_main)


if __name__ == "__main__":
    main()
