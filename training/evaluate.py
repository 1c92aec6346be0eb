"""`onesearch-eval BUNDLE --data DIR`: measures a bundle beside baselines, on held-out logs or on human ratings.

Owns the command and how a report is shown; what is asked is `logged` and `judgements`, the measures are `metrics`.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from onesearch.arrays import write_atomically
from onesearch.bundle import Bundle, open_bundle
from onesearch.command import run
from onesearch.context import SearchContext
from onesearch.decode import Score, StepFn
from onesearch.hardware import hardware
from onesearch.runtime import Decoder, OnnxDecoder
from onesearch.search import Searcher, SearchOptions
from training.bootstrap import PER_ITEM, with_queries
from training.grades import read_grades
from training.judgements import evaluate_judgements, read_judgements
from training.logged import evaluate_logs
from training.metrics import Estimate, Measured
from training.negation import read_negations
from training.overlap import read_keywords
from training.sessions import page_views
from training.subject import DEPTH, MODEL, Report, Subject
from training.tables import load_tables

_TABLE_WIDTH = 130  # columns of a table that is not shown on a terminal


def open_decoder(bundle: Bundle, threads: int) -> Decoder:
    """The exported graphs under ONNX Runtime, else the weights under torch (slower, needs the train extra)."""
    if bundle.graphs is not None:
        return OnnxDecoder(bundle.graphs, bundle.renderer.sids, bundle.renderer.bos, threads)
    from onesearch.model import TorchDecoder, open_model

    return TorchDecoder(open_model(bundle.path), bundle.renderer)


def bundle_subject(bundle: Bundle, decoder: Decoder, options: SearchOptions) -> Subject:
    """A bundle as the system under test; beams without the trie read the same prompts as its searches."""
    searcher = Searcher(bundle, decoder)

    def free(context: SearchContext) -> StepFn:
        if options.keywords:
            context = replace(context, keywords=bundle.keywords.match(context.query))
        return decoder.start(searcher.render(context)[0])

    return Subject(searcher, free, bundle.catalog, bundle.trie, options)


def records(report: Report) -> Iterator[dict[str, Any]]:
    """The report as JSON objects: one of kind `run`, then one of kind `measure` per measure and slice."""
    yield {"kind": "run", **report.facts}
    for row in report.measured:
        yield {"kind": "measure", **asdict(row)}


def show(report: Report, console: Console) -> None:
    """One table for people: the model and its paired differences with 95 % intervals, baselines as means."""
    baselines = list(dict.fromkeys(s for row in report.measured for s in row.systems if s != MODEL))
    table = Table("", box=SIMPLE)
    for name in ("n", MODEL, *baselines, *(f"{MODEL} - {name}" for name in baselines)):
        table.add_column(name, justify="right")
    for i, row in enumerate(report.measured):
        if i == 0 or report.measured[i - 1].slice != row.slice:
            table.add_section()
            table.add_row(row.slice, style="bold")
        table.add_row(*_cells(row, baselines))
    console.print(table)
    console.print("[…] 95 % bootstrap interval; differences are paired by request", markup=False)
    for name, value in report.facts.items():
        console.print(f"{name}: {value}", markup=False, highlight=False)


def _cells(row: Measured, baselines: list[str]) -> list[str]:
    others = [f"{row.systems[name].value:.3f}" if name in row.systems else "" for name in baselines]
    gaps = [_interval(row.differences[name], "+") if name in row.differences else "" for name in baselines]
    return [f"  {row.measure}", str(row.count), _interval(row.systems[MODEL]), *others, *gaps]


def _interval(estimate: Estimate, sign: str = "") -> str:
    bounds = "" if estimate.low is None else f" \\[{estimate.low:{sign}.3f}, {estimate.high:{sign}.3f}]"
    return f"{estimate.value:{sign}.3f}{bounds}"


def main() -> None:
    """Console entry point."""
    run(_main)


def _main(
    bundle: Annotated[Path, typer.Argument(help="the bundle to measure")],
    data: Annotated[Path, typer.Option(help="folder with the tables")],
    split: Annotated[Literal["test", "valid"], typer.Option(help="which page views of the logs")] = "test",
    max_requests: Annotated[int | None, typer.Option(min=1, help="ask at most so many, drawn by seed")] = None,
    width: Annotated[int, typer.Option(min=1, help="beams")] = 512,
    score: Annotated[Score, typer.Option(help="how beams are scored")] = "level",
    keywords: Annotated[bool, typer.Option("--keywords", help="match keywords into the prompt")] = False,
    match: Annotated[bool, typer.Option("--match", help="items with the query's words first")] = False,
    judgements: Annotated[
        Path | None, typer.Option(help="JSONL of query, item_id, rating; instead of logs")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per line instead of a table")] = False,
    seed: Annotated[int, typer.Option(min=0, help="of the sample and the bootstrap")] = 1,
    out: Annotated[Path | None, typer.Option(help="write the report here as JSON")] = None,
) -> None:
    """Measure a bundle beside baselines on held-out logs, or on human ratings."""
    options = SearchOptions(limit=max(width, DEPTH), width=width, score=score, keywords=keywords, match=match)
    report = _evaluate(bundle, data, judgements, split, max_requests, options, seed)
    if out is not None:
        run, *measures = records(report)
        document = {"run": run, "measures": measures, "units": report.units}
        write_atomically(out, orjson.dumps(document, option=orjson.OPT_INDENT_2))
    if as_json:
        for record in records(report):
            typer.echo(orjson.dumps(record).decode())
        return
    console = Console()
    show(report, console if console.is_terminal else Console(width=_TABLE_WIDTH))


def _evaluate(
    path: Path,
    data: Path,
    judgements: Path | None,
    split: str,
    max_requests: int | None,
    options: SearchOptions,
    seed: int,
) -> Report:
    tables, rated = load_tables(data), None if judgements is None else read_judgements(judgements)
    bundle = open_bundle(path)
    threads = os.cpu_count() or 1
    subject = bundle_subject(bundle, open_decoder(bundle, threads), options)
    if rated is None:
        recipe = bundle.manifest.recipe
        made = recipe.get("data", {})
        per_item = made.get("pseudo_queries", PER_ITEM)
        views = page_views(with_queries(tables, made.get("bootstrap", False), recipe.get("seed", 0), per_item))
        grader = read_grades(data, tables.relevance, bundle.catalog)
        who, keywords = read_keywords(data, bundle.keywords)
        report = evaluate_logs(subject, views, split, max_requests, seed, read_negations(data), grader, keywords)
        report.facts["query_keywords_from"] = who
    else:
        report = evaluate_judgements(subject, rated, max_requests, seed)
    items, live = set(tables.items["item_id"]), set(bundle.catalog.item_ids.tolist())
    facts = {
        "bundle": path.name,
        "recipe": bundle.manifest.recipe.get("name", ""),
        "recipe_seed": bundle.manifest.recipe.get("seed", 0),
        "model_version": bundle.manifest.model_version,
        "catalog_version": bundle.manifest.catalog_version,
        "decoder": "torch" if bundle.graphs is None else "onnxruntime",
        "threads": threads,
        "beam": {name: getattr(options, name) for name in ("width", "score", "keywords", "match")},
        "seed": seed,
        "hardware": hardware(),
        "items": len(live),
        "items_only_in_data": len(items - live),
        "items_only_in_bundle": len(live - items),
    }
    return Report(report.measured, facts | report.facts, report.units)


if __name__ == "__main__":
    main()
