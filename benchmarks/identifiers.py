"""What each part of the identifiers is worth, and what they cost at scale (spec §3.2-3.5).

`python -m benchmarks.identifiers --data DIR [--recipe RECIPE] [--json]`: text only, + keywords, + balance, + OPQ on the
tables of DIR. Fitted on training page views; query-item figures are of held-out clicks.
`python -m benchmarks.identifiers --items 1000000 [--json]`: fitting and encoding that many synthetic items at the
production sizes, with time and peak memory.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onesearch.embedder import KeywordEmbedder, TextEmbedder
from onesearch.hardware import hardware
from onesearch.progress import StageMeters
from onesearch.quantizer import Codebooks, Float32
from onesearch.sid import RQ_LEVELS, Codes
from training.codebooks import CodebookConfig, fit_codebooks
from training.embedder import fit_embedder
from training.keywords import mine_keywords
from training.package import catalog_items
from training.pipeline import click_pairs
from training.recipe import load_recipe
from training.sessions import page_views
from training.sid_metrics import sid_report
from training.tables import load_tables

PRODUCTION = (4096, 1024, 512, 256, 256)
_DIM, _CLUSTERS = 64, 20_000
_TOP, _ASKED = 10, 2_000


def ablation(data: Path, recipe_path: Path) -> Iterator[dict[str, Any]]:
    """One row per system, each with one part more than the row before."""
    recipe, tables = load_recipe(recipe_path), load_tables(data)
    views = page_views(tables)
    train = [view for view in views if view.split == "train"]
    items = catalog_items(tables.items)
    ids = [item.item_id for item in items]
    queries = list(dict.fromkeys(view.context.query for view in train))
    texts = [*(item.text() for item in items), *queries]
    progress = StageMeters()
    base = fit_embedder(texts, click_pairs(ids, queries, train, recipe.seed), recipe.embedder, progress)
    rules = mine_keywords(tables.items, train, recipe.data.min_keyword_items)
    row_of = {item: row for row, item in enumerate(ids)}
    held_out = [(v.context.query, row_of[i]) for v in views if v.split == "test" for i in v.clicked if i in row_of]
    systems: tuple[tuple[str, TextEmbedder, CodebookConfig, int], ...] = (
        ("text only", base, replace(recipe.codebooks, third="plain"), RQ_LEVELS),
        ("+ keywords", KeywordEmbedder(base, rules), replace(recipe.codebooks, third="plain"), RQ_LEVELS),
        ("+ balance", KeywordEmbedder(base, rules), replace(recipe.codebooks, third="balanced"), RQ_LEVELS),
        ("+ OPQ", KeywordEmbedder(base, rules), replace(recipe.codebooks, third="balanced"), RQ_LEVELS + 2),
    )
    for name, embedder, config, levels in systems:
        started = time.perf_counter()
        vectors = embedder.embed(texts)
        books, codes = fit_codebooks(vectors[: len(items)], vectors[len(items) :], config, progress)
        asked = embedder.embed([query for query, _ in held_out])
        clicked = np.asarray([row for _, row in held_out])
        pairs = books.encode(asked), codes[clicked]
        report = sid_report(codes, books.sizes, pairs, [item.category[1] for item in items])
        yield {
            "system": name,
            "icr": report["icr" if levels > RQ_LEVELS else "icr_rq"],
            "cur_l1": report["cur_l1"],
            "cur_l1l2": report["cur_l1l2"],
            "cur_total": report["cur_total"],
            "prefix_agreement": report["prefix_agreement"],
            f"recall@{_TOP}": _recall(books, codes, levels, asked, clicked),
            "category_nmi": report["category_nmi"],
            "max_bucket": report["max_bucket"],
            "bucket_gini": report["bucket_gini"],
            "held_out_clicks": len(held_out),
            "seconds": round(time.perf_counter() - started, 1),
        }
    progress.close()


def _recall(books: Codebooks, codes: Codes, levels: int, asked: Float32, clicked: Any) -> float:
    """Share of held-out clicks among the items whose identifier, decoded, lies nearest to the query's vector."""
    decoded = books.decode(codes) if levels > RQ_LEVELS else books.level_vectors(codes).sum(axis=1)
    chosen = np.random.default_rng(0).permutation(len(clicked))[:_ASKED]
    scores = asked[chosen] @ decoded.T
    better = (scores > scores[np.arange(len(chosen)), clicked[chosen]][:, None]).sum(axis=1)
    return float((better < _TOP).mean())


def scale(count: int, sizes: tuple[int, ...] = PRODUCTION) -> dict[str, Any]:
    """Fit and encode `count` unit vectors around Zipf-sized clusters."""
    rng = np.random.default_rng(0)
    weights = np.arange(1, _CLUSTERS + 1) ** -0.8
    centres = rng.standard_normal((_CLUSTERS, _DIM), dtype=np.float32)
    rows = centres[rng.choice(_CLUSTERS, count, p=weights / weights.sum())]
    rows += np.float32(0.6) * rng.standard_normal(rows.shape, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    progress = StageMeters()
    started = time.perf_counter()
    books, codes = fit_codebooks(rows, rows[: count // 20], CodebookConfig(sizes=sizes), progress)
    fitted = time.perf_counter()
    books.encode(rows[:100_000])
    encoded = time.perf_counter()
    progress.close()
    report = sid_report(codes, sizes)
    return {
        "items": count,
        "sizes": list(sizes),
        "fit_seconds": round(fitted - started, 1),
        "encode_per_second": round(min(count, 100_000) / (encoded - fitted)),
        "input_mb": round(rows.nbytes / 1e6),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        **{key: report[key] for key in ("icr", "icr_rq", "cur_l1", "cur_l1l2", "max_bucket")},
    }


def main() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="tables to run the ablation on")
    what.add_argument("--items", type=int, help="synthetic items to run at scale")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.toml"))
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    arguments = parser.parse_args()
    machine = {"hardware": hardware(), "cores": os.cpu_count()}
    rows = ablation(arguments.data, arguments.recipe) if arguments.data else iter([scale(arguments.items)])
    for row in rows:
        line = row | machine
        print(
            json.dumps(line) if arguments.json else "  ".join(f"{k} {_brief(v)}" for k, v in row.items()),
            flush=True,
        )


def _brief(value: object) -> str:
    if isinstance(value, dict):
        return f"{value['rate']:.4g} of {value['of']}"
    if isinstance(value, list):
        return "/".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
