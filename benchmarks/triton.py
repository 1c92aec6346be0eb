"""What a Triton server adds to a search: the same searches over gRPC and in this process, in turn, in one run.

    python -m benchmarks.triton [demo/bundle] [--searches 200] [--json]

Starts the CPU server of the nvidia-pytriton wheel on a repository it exports, checks that every answer is the same,
then times the searches of the bundle's golden examples one at a time. One JSON line per path with --json.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import typer

from benchmarks.triton_server import TritonServer
from model_export.to_triton import Serving, export_triton
from onesearch import remote
from onesearch.bundle import open_bundle
from onesearch.catalog import Filters
from onesearch.command import run
from onesearch.context import SearchContext
from onesearch.runtime import open_decoder
from onesearch.search import Searcher, SearchOptions, SearchResult
from service.inference_triton import TritonModel, TritonSearcher

LIMIT = 50
FILTERS = (None, Filters(in_stock=True))
TOLERANCE = 1e-4
Search = Callable[[SearchContext, SearchOptions], SearchResult]


def main(
    bundle: Annotated[Path, typer.Argument(help="an exported bundle")] = Path("demo/bundle"),
    searches: Annotated[int, typer.Option(help="searches timed on each path")] = 200,
    width: Annotated[int, typer.Option(help="beams")] = 512,
    json: Annotated[bool, typer.Option("--json", help="one JSON object per line")] = False,
) -> None:
    """Time embedded and Triton searches at equal work."""
    opened = open_bundle(bundle)
    assert opened.graphs is not None
    embedded = Searcher(opened, open_decoder(opened.graphs, opened.renderer.sids, opened.renderer.bos, 1))
    asked = [
        (example.context, SearchOptions(limit=LIMIT, width=width, filters=filters))
        for example in opened.examples
        for filters in FILTERS
    ]
    with tempfile.TemporaryDirectory() as folder:
        export_triton(bundle, Path(folder) / "repository", Serving(instances=1), lambda step: None)
        server = TritonServer(Path(folder), Path(folder) / "repository", (remote.MODEL,))
        try:
            model = TritonModel(f"triton://{server.address}", "", opened.manifest.digest, timeout=60.0)
            triton = TritonSearcher(opened, model)
            _check(embedded.search, triton.search, asked)
            rows = _measure({"embedded": embedded.search, "triton": triton.search}, asked, searches)
        finally:
            server.kill()
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "width": width}
    for row in rows:
        typer.echo(orjson.dumps(row | about).decode() if json else _line(row))


def _check(one: Search, other: Search, asked: list[tuple[SearchContext, SearchOptions]]) -> None:
    for context, options in asked:
        expected, found = one(context, options), other(context, options)
        same = len(found.rows) == len(expected.rows) and np.allclose(found.scores, expected.scores, atol=TOLERANCE)
        if not same:
            raise typer.Exit(_told(f"the answers to {context.query!r} differ"))


def _measure(
    paths: dict[str, Search], asked: list[tuple[SearchContext, SearchOptions]], searches: int
) -> list[dict[str, Any]]:
    """Both paths answer each search one after the other, so that whatever else the machine does meets both."""
    spent: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(searches):
        for name, search in paths.items():
            start = time.perf_counter()
            search(*asked[number % len(asked)])
            spent[name].append((time.perf_counter() - start) * 1e3)
    rows = [{"path": name, "searches": searches, **_percentiles(times)} for name, times in spent.items()]
    added = np.subtract(spent["triton"], spent["embedded"])
    return [*rows, {"path": "added by triton", "searches": searches, **_percentiles(added)}]


def _percentiles(times: Any) -> dict[str, float]:
    return {f"p{p}_ms": round(float(np.percentile(times, p)), 3) for p in (50, 90, 99)}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['path']:16} p50 {row['p50_ms']:8.2f} ms   p90 {row['p90_ms']:8.2f} ms   p99 {row['p99_ms']:8.2f} ms"
    )


def _told(message: str) -> int:
    typer.echo(f"benchmarks.triton: {message}", err=True)
    return 1


if __name__ == "__main__":
    run(main)
