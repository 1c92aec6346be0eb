"""`onesearch-train RECIPE --data DIR --out BUNDLE`: runs the stages in order and writes a bundle.

The work folder keeps what each stage made under a name that holds the fingerprint of everything that went into
it, so a second run skips what is done and a run that was killed continues where it stopped.
"""

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import torch
import typer
from rich.console import Console

from onesearch import __version__
from onesearch.arrays import write_atomically
from onesearch.bundle import SCHEMA_VERSION, Bundle, HeldOut, Manifest, open_bundle, open_parts, sha256
from onesearch.command import run
from onesearch.context import SearchContext
from onesearch.embedder import KeywordEmbedder, TextEmbedder
from onesearch.errors import BundleError, ConfigError
from onesearch.progress import StageMeters
from training.bootstrap import with_queries
from training.codebooks import fit_codebooks
from training.cold_start import default_table, with_defaults
from training.embedder import ClickPairs, fit_embedder
from training.keywords import mine_keywords
from training.oracle import oracle_keywords
from training.package import Identifiers, catalog_items, recipe_json, write_bundle, write_identifiers
from training.page_keywords import KeywordProvider, file_keywords, rule_keywords
from training.parallel import processes, rank, wait
from training.recipe import Recipe, load_recipe
from training.samples import Sources
from training.sentence_encoder import export_sentence_encoder
from training.sessions import PageView, click_rates, page_views
from training.sid_metrics import sid_report
from training.tables import Tables, load_tables
from training.tokenizer import train_tokenizer
from training.train import train

UNTIL = "until"  # among the metrics of a bundle: the time of the last page view that it has learned from
_HELD_OUT_SEARCHES = 500
_FOREIGN_QUERY = "蓝色 башмаки ζ 42"  # a golden example in scripts the shop never saw
_console = Console(stderr=True)


@dataclass(frozen=True)
class Work:
    """Stage results by fingerprint. Identifiers exist whole or not at all; a training stage's folder resumes."""

    root: Path

    def folder(self, stage: str, inputs: Mapping[str, Any]) -> Path:
        """Where the result of a stage with these inputs belongs."""
        named = {"version": __version__, "schema": SCHEMA_VERSION, **inputs}
        text = orjson.dumps(named, option=orjson.OPT_SORT_KEYS)
        return self.root / f"{stage}-{hashlib.sha256(text).hexdigest()[:16]}"


def train_bundle(recipe: Recipe, data: Path, out: Path, work: Work) -> Manifest:
    """Run every stage that is not done yet and write the bundle. Raises OneSearchError; `out` must not exist."""
    if out.exists():
        raise BundleError(
            f"bundle {out}", ["exists already; bundles are immutable, remove it or choose another name"]
        )
    torch.set_num_threads(recipe.threads)
    tables = with_queries(load_tables(data), recipe.data.bootstrap, recipe.seed, recipe.data.pseudo_queries)
    views = page_views(tables)
    training = [view for view in views if view.split == "train"]
    if recipe.data.cold_default:
        training = with_defaults(training)
    plain = recipe_json(recipe)
    inputs = {"tables": fingerprint(data), **{k: plain[k] for k in _IDENTIFIER_KEYS}}
    identifiers = work.folder("identifiers", inputs)
    if identifiers.exists():
        _console.print(f"identifiers: done before, in {identifiers.name}")
    elif rank() == 0:
        _fit_identifiers(recipe, tables, training, identifiers)
    wait()
    bundle = open_parts(identifiers, Manifest(SCHEMA_VERSION, "", "", "", "", {}, {}, {}))
    before = {"identifiers": identifiers.name, **{k: plain[k] for k in _TRAIN_KEYS}}
    if recipe.data.keyword_file:
        before["keyword_file"] = _file_digest(Path(recipe.data.keyword_file))
    model, losses = train(recipe, _sources(recipe, bundle, tables, training, data), work.folder, before)
    if rank() > 0:
        wait()
        return open_bundle(out).manifest
    report = orjson.loads((identifiers / "sid_report.json").read_bytes())
    held_out = [view for view in views if view.split != "train"] or training
    golden, searches = _golden_contexts(recipe, bundle, held_out), _held_out_searches(held_out)
    metrics = {"sid": report, "loss": losses, UNTIL: max((view.time for view in training), default=0)}
    manifest = write_bundle(identifiers, model, golden, searches, out, plain, metrics)
    wait()
    return manifest


_IDENTIFIER_KEYS = ("seed", "threads", "data", "tokenizer", "embedder", "codebooks", "sequence")
_TRAIN_KEYS = ("seed", "data", "threads", "precision", "model")


def _fit_identifiers(recipe: Recipe, tables: Tables, views: Sequence[PageView], folder: Path) -> None:
    items = catalog_items(tables.items)
    queries = list(dict.fromkeys(view.context.query for view in views))
    texts = [*(item.text() for item in items), *queries]
    pairs = click_pairs([item.item_id for item in items], queries, views, recipe.seed)
    progress = StageMeters()
    exported = folder.with_name(f".{folder.name}.encoder")
    if recipe.data.sentence_encoder:
        embedder: TextEmbedder = export_sentence_encoder(Path(recipe.data.sentence_encoder), exported)
    else:
        embedder = fit_embedder(texts, pairs, recipe.embedder, progress)
    keywords = mine_keywords(tables.items, views, recipe.data.min_keyword_items)
    if recipe.data.khqe:
        embedder = KeywordEmbedder(embedder, keywords)
    vectors = embedder.embed(texts)
    item_vectors, query_vectors = vectors[: len(items)], vectors[len(items) :]
    codebooks, item_sids = fit_codebooks(item_vectors, query_vectors, recipe.codebooks, progress)
    progress.close()
    profiles = sorted({view.context.profile for view in views})
    corpus = [
        *tables.items["item_title"],
        *queries,
        *profiles,
        *tables.items["category_level2_name"].unique().sort(),
    ]
    control = recipe.sequence.control_tokens()
    tokenizer = train_tokenizer(corpus, recipe.tokenizer.vocab_size, codebooks.spec, control)
    query_sids = codebooks.encode(query_vectors)
    report = sid_report(
        item_sids,
        codebooks.sizes,
        pairs=(query_sids[pairs.query - len(items)], item_sids[pairs.item]),
        categories=_categories(tables),
    )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    rates, defaults = click_rates(views), default_table(views) if recipe.data.cold_default else {}
    parts = Identifiers(
        tables.items, item_sids, rates, embedder, codebooks, tokenizer, recipe.sequence, keywords, defaults
    )
    write_identifiers(partial, parts)
    write_atomically(partial / "sid_report.json", orjson.dumps(report, option=orjson.OPT_INDENT_2))
    partial.rename(folder)
    shutil.rmtree(exported, ignore_errors=True)
    _console.print(f"identifiers: {len(items)} items, {len(queries)} queries; {orjson.dumps(report).decode()}")


def click_pairs(
    item_ids: Sequence[int], queries: Sequence[str], views: Sequence[PageView], seed: int
) -> ClickPairs:
    """One row per (page view, clicked item), with an item of the same page one step down the funnel if any."""
    row = {item: i for i, item in enumerate(item_ids)}
    text = {query: len(item_ids) + i for i, query in enumerate(queries)}
    rng = np.random.default_rng([seed, 1])
    rows: list[tuple[int, int, int]] = []
    for view in views:
        shown = [row[i] for i in view.impressed if i in row and i not in view.clicked]
        clicked = [row[i] for i in view.clicked if i in row and i not in view.ordered]
        for item in view.clicked:
            if item in row:
                below = (clicked or shown) if item in view.ordered else shown
                lower = below[rng.integers(len(below))] if below else -1
                rows.append((text[view.context.query], row[item], lower))
    columns = np.asarray(rows, dtype=np.int64).reshape(-1, 3)
    return ClickPairs(columns[:, 0], columns[:, 1], columns[:, 2])


def keyword_provider(recipe: Recipe, bundle: Bundle, tables: Tables, data: Path) -> KeywordProvider:
    """Who makes the keywords of page views, as the recipe says.

    Raises DataError for an oracle without its truth and for a file that is none or belongs to other tables.
    """
    if recipe.data.keywords == "rules":
        return rule_keywords(bundle.keywords)
    if recipe.data.keywords == "file":
        return file_keywords(Path(recipe.data.keyword_file))
    return oracle_keywords(data, tables.items, recipe.data.keyword_recall, recipe.data.keyword_noise, recipe.seed)


def _sources(recipe: Recipe, bundle: Bundle, tables: Tables, views: Sequence[PageView], data: Path) -> Sources:
    queries = list(dict.fromkeys(view.context.query for view in views))
    catalog = bundle.catalog
    return Sources(
        renderer=bundle.renderer,
        encoder=bundle.encoder,
        items=tables.items,
        views=views,
        keywords=keyword_provider(recipe, bundle, tables, data)(views),
        item_sids=dict(zip(catalog.item_ids.tolist(), catalog.sids, strict=True)),
        query_sids=dict(zip(queries, bundle.encoder.query_sids(queries), strict=True)),
        popularity=click_rates(views),
        trie=bundle.trie,
        judged=tables.relevance,
        anonymous_share=recipe.data.anonymous_share,
        seed=recipe.seed,
    )


def _golden_contexts(recipe: Recipe, bundle: Bundle, views: Sequence[PageView]) -> list[SearchContext]:
    """Held-out requests spread over time: every third with keywords, one in scripts the shop never saw."""
    every = max(1, len(views) // max(1, recipe.golden_examples - 1))
    contexts = [view.context for view in views[::every]][: recipe.golden_examples - 1]
    for i in range(0, len(contexts), 3):
        contexts[i] = replace(contexts[i], keywords=bundle.keywords.match(contexts[i].query))
    return [*contexts, SearchContext(_FOREIGN_QUERY)]


def _held_out_searches(views: Sequence[PageView]) -> list[HeldOut]:
    """Searches with clicks, spread over time, on which the exporter compares int8 with fp32."""
    clicked = [view for view in views if view.clicked]
    every = max(1, len(clicked) // _HELD_OUT_SEARCHES)
    return [HeldOut(view.context, view.clicked) for view in clicked[::every][:_HELD_OUT_SEARCHES]]


def _categories(tables: Tables) -> list[str]:
    return [f"{a}/{b}" for a, b in tables.items.select("category_level1_name", "category_level2_name").iter_rows()]


def fingerprint(data: Path) -> dict[str, str]:
    """sha256 of every file of a folder by name."""
    return {path.name: sha256(path) for path in sorted(data.iterdir()) if path.is_file()}


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"data.keyword_file: {path} is no file; `python -m training.taqu` makes one")
    return sha256(path)


def main() -> None:
    """Console entry point."""
    run(_main)


def _main(
    recipe: Annotated[Path, typer.Argument(help="the recipe, a TOML file")],
    data: Annotated[Path, typer.Option(help="folder with the tables")],
    out: Annotated[
        Path | None, typer.Option(help="the bundle to write, must not exist; default WORK/NAME")
    ] = None,
    work: Annotated[Path, typer.Option(help="folder for stage results and checkpoints")] = Path("runs"),
) -> None:
    """Train a bundle from tables as a recipe says."""
    started = time.monotonic()
    try:
        plan = load_recipe(recipe)
        target = out or work / plan.name
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with processes():
            manifest = train_bundle(plan, data, target, Work(work))
    except KeyboardInterrupt as error:
        _console.print("onesearch-train: interrupted; run the same command again to continue")
        raise typer.Exit(130) from error
    seconds = time.monotonic() - started
    _console.print(
        f"bundle {target}: model {manifest.model_version}, catalog {manifest.catalog_version}, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
