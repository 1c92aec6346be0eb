"""A Triton model repository from an exported bundle: the search model with all it needs, and the bare graphs.

    REPOSITORY/onesearch_search/config.pbtxt         inputs, batching, instances, warm-up, contract and versions
                               /N/model.py           the decode loop, run by Triton's Python backend
                               /N/search.json        SID grammar, versions, names of the graphs' tensors
                               /N/graphs/            prefill and step, to be run in process
                               /N/recorded.npz       calls with the answers that a version must give to load
                               /catalogs/V.trie      the trie of each catalog that a search may ask for
    REPOSITORY/onesearch_prefill, onesearch_step     the graphs as models of their own: ONNX, or TensorRT engines

A repository and a version of one appear whole or not at all. Which version is served is said by config.pbtxt alone.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnxruntime
import orjson

from model_export.to_tensorrt import built_engines
from model_export.triton_config import graph_config, search_config, served_version
from onesearch import remote
from onesearch.bundle import STAMP, Bundle, open_bundle
from onesearch.decode import BeamConfig, beam_search
from onesearch.errors import ExportError
from onesearch.remote import Answer, Call
from onesearch.runtime import PREFILL_FILE, STEP_FILE, Precision, open_decoder
from onesearch.search import GOLDEN_TOP, Searcher, replay

Graphs = Literal["in-process", "onnxruntime", "tensorrt"]
"""Who runs the graphs: the search model itself, on the CPU; or models of their own, on the GPU"""
ABOUT, RECORD, CONFIG = "search.json", "recorded.npz", "config.pbtxt"
MODELS = (remote.PREFILL, remote.STEP, remote.MODEL)
RECORDED = 8
RECORDED_WIDTH = 64


@dataclass(frozen=True)
class Serving:
    """How the server runs a version; instances: processes of the search model. Raises ExportError for a wrong value."""

    graphs: Graphs = "in-process"
    precision: Precision = "fp32"
    instances: int = 2

    def __post_init__(self) -> None:
        faults = []
        if self.graphs not in get_args(Graphs):
            faults.append(f"graphs: {self.graphs!r} is unknown, expected one of {', '.join(get_args(Graphs))}")
        if self.precision not in get_args(Precision):
            faults.append(
                f"precision: {self.precision!r} is unknown, expected one of {', '.join(get_args(Precision))}"
            )
        if self.graphs != "in-process" and self.precision != "fp32":
            faults.append(f"precision: {self.precision!r} runs in-process only, not by {self.graphs}")
        if not 1 <= self.instances <= 64:
            faults.append(f"instances: {self.instances} is not in 1..64")
        if faults:
            raise ExportError("triton", faults)


def export_triton(
    path: Path, repository: Path, serving: Serving, say: Callable[[str], None], engines: Path | None = None
) -> None:
    """Write a new repository that serves version 1. Raises ExportError when it exists, or as `write_version`."""
    if repository.exists():
        raise ExportError(f"repository {repository}", ["exists already; add a version: onesearch-triton deploy"])
    with _whole(repository) as (folder,):
        write_version(path, folder, 1, serving, say, engines)
        activate(folder, 1)


def write_version(
    path: Path,
    repository: Path,
    number: int,
    serving: Serving,
    say: Callable[[str], None],
    engines: Path | None = None,
) -> None:
    """Add a version to every model of a repository from an exported bundle, without serving it.

    engines: where graphs are `tensorrt`, the bundle's TensorRT kit with the engines that its build.sh has built.
    Raises BundleError for a bundle that does not open, ExportError when graphs or engines are missing, are another
    model's or do not give the answers of the bundle's golden examples (engines are not run here).
    """
    if (engines is None) == (serving.graphs == "tensorrt"):
        fault = "are needed by tensorrt" if engines is None else f"are of no use to {serving.graphs}"
        raise ExportError("triton", [f"engines: {fault}"])
    say("[1/3] open the bundle")
    bundle = open_bundle(path)
    if bundle.graphs is None:
        raise ExportError(f"bundle {path}", [f"has no graphs; run: onesearch-export {path} --target onnx"])
    kind = "fp32" if engines is None else built_engines(engines, bundle, RECORDED_WIDTH)
    say("[2/3] record the answers that a server must reproduce")
    recorded = _record(bundle, serving)

    say(f"[3/3] write version {number}")
    _publish(bundle, repository)
    with _whole(*(repository / model / str(number) for model in MODELS)) as (prefill, step, search):
        for folder, file in ((prefill, PREFILL_FILE), (step, STEP_FILE)):
            source = bundle.graphs / file if engines is None else (engines / file).with_suffix(".plan")
            copy_graph(source, folder)
        shutil.copytree(bundle.graphs, search / "graphs", ignore=shutil.ignore_patterns(STAMP))
        shutil.copyfile(Path(__file__).with_name("triton_search.py"), search / "model.py")
        remote.write_recorded(search / RECORD, recorded)
        (search / ABOUT).write_bytes(
            orjson.dumps(_about(bundle, serving, engines, kind), option=orjson.OPT_INDENT_2)
        )


def copy_graph(source: Path, folder: Path) -> None:
    """Copy a graph or engine to `model.*`, with the large weights that lie beside it under the name the graph gives."""
    shutil.copyfile(source, folder / f"model{source.suffix}")
    weights = source.with_name(f"{source.name}.data")
    if weights.exists():
        shutil.copyfile(weights, folder / weights.name)


def activate(repository: Path, number: int, beside: int | None = None) -> None:
    """Write the configurations that serve a version; a running server takes them up when it is told to load.

    beside: the version served until then, whose graphs stay loaded, so that its last searches can end.
    """
    search = repository / remote.MODEL
    about = read_about(repository, number)
    call, _ = remote.read_recorded(search / str(number) / RECORD)[0]
    (search / "warmup").mkdir(exist_ok=True)
    for name, array in call.tensors().items():
        _replace(search / "warmup" / f"{number}.{name}", array.tobytes())
    for model in MODELS[:2]:
        numbers = sorted({number, beside or number})
        _replace(repository / model / CONFIG, graph_config(model, numbers, about).encode())
    _replace(search / CONFIG, search_config(number, about, call).encode())


def versions(repository: Path) -> list[int]:
    """Versions of the search model in a repository, ascending."""
    return sorted(int(path.name) for path in (repository / remote.MODEL).glob("[0-9]*"))


def active_version(repository: Path) -> int:
    """The version that a repository serves. Raises ExportError when it is not one of ours."""
    file = repository / remote.MODEL / CONFIG
    try:
        return served_version(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"repository {repository}", [f"{remote.MODEL}/{CONFIG}: {error}"]) from error


def remove_version(repository: Path, number: int) -> None:
    """Delete one version of every model."""
    for model in MODELS:
        shutil.rmtree(repository / model / str(number), ignore_errors=True)


def read_about(repository: Path, number: int) -> dict[str, Any]:
    """What a version says of itself. Raises ExportError when it is not there."""
    file = repository / remote.MODEL / str(number) / ABOUT
    try:
        about: dict[str, Any] = orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ExportError(f"repository {repository}", [f"version {number}: {error}"]) from error
    return about


def publish_catalog(path: Path, repository: Path) -> str:
    """Put a bundle's trie where running servers find it by its version, which is returned.

    Raises ExportError for another SID grammar or contract than the repository's, BundleError as `open_bundle`.
    """
    bundle = open_bundle(path, graphs=False)
    about = read_about(repository, active_version(repository))
    if bundle.manifest.digest != about["digest"]:
        fault = f"contract digest is {bundle.manifest.digest[:12]}, the repository's is {about['digest'][:12]}"
        raise ExportError(f"bundle {path}", [fault])
    _publish(bundle, repository)
    return bundle.manifest.catalog_version


def _publish(bundle: Bundle, repository: Path) -> None:
    folder = repository / remote.MODEL / remote.CATALOGS
    folder.mkdir(parents=True, exist_ok=True)
    bundle.trie.save(folder / f"{bundle.manifest.catalog_version}.trie")


def _record(bundle: Bundle, serving: Serving) -> list[tuple[Call, Answer]]:
    """Calls of golden examples with and without a mask, answered by the graphs in this process."""
    assert bundle.graphs is not None
    decoder = open_decoder(bundle.graphs, bundle.renderer.sids, bundle.renderer.bos, 1, serving.precision)
    searcher, manifest = Searcher(bundle, decoder), bundle.manifest
    examples = bundle.examples[:RECORDED]
    if faults := replay(searcher, examples, serving.precision):
        raise ExportError(f"graphs {bundle.graphs}", faults)
    recorded = []
    config = BeamConfig(width=RECORDED_WIDTH, top_n=min(GOLDEN_TOP, RECORDED_WIDTH))
    for number, example in enumerate(examples):
        prompt, _ = searcher.render(example.context)
        legal = np.arange(bundle.trie.num_sids) % 2 == 0 if number % 2 else None
        mask = None if legal is None else bundle.trie.subset(legal)
        found = beam_search(decoder.start(prompt), bundle.trie, config, mask)
        call = Call.of(prompt, config, manifest.digest, manifest.catalog_version, legal)
        recorded.append((call, Answer(found, manifest.model_version, (0.0, 0.0))))
    if not recorded:
        raise ExportError(f"bundle {bundle.path}", ["examples.jsonl: is empty, nothing to check a server with"])
    return recorded


def _about(bundle: Bundle, serving: Serving, engines: Path | None, kind: str) -> dict[str, Any]:
    """What a version says of itself; kind: the type of the weights, where they are not quantised."""
    source = engines or bundle.graphs
    assert source is not None
    sids = bundle.renderer.sids
    graphs = {remote.PREFILL: PREFILL_FILE, remote.STEP: STEP_FILE}
    return {
        "digest": bundle.manifest.digest,
        "model_version": bundle.manifest.model_version,
        "catalog_version": bundle.manifest.catalog_version,
        "sizes": sids.spec.sizes,
        "first_id": sids.first_id,
        "bos": bundle.renderer.bos,
        "history_dim": bundle.renderer.history_dim,
        "serving": asdict(serving),
        "precision": serving.precision if engines is None else kind,
        "tensors": {model: _tensors(source / file) for model, file in graphs.items()},
    }


def _tensors(graph: Path) -> dict[str, list[dict[str, Any]]]:
    """Inputs and outputs of a graph with names, ONNX types and shapes; -1 is an axis of any length."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return {
        kind: [
            {"name": t.name, "type": t.type, "shape": [d if isinstance(d, int) else -1 for d in t.shape]}
            for t in tensors
        ]
        for kind, tensors in (("inputs", session.get_inputs()), ("outputs", session.get_outputs()))
    }


@contextmanager
def _whole(*targets: Path) -> Iterator[list[Path]]:
    """Folders to fill, moved to their targets at the end; on any failure nothing of them is left."""
    partial = [target.with_name(f".{target.name}.partial") for target in targets]
    try:
        for folder in partial:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield partial
        for folder, target in zip(partial, targets, strict=True):
            folder.rename(target)
    except BaseException:
        for folder in (*partial, *targets):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)
