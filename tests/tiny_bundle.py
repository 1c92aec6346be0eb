"""A whole bundle in a second: real parts fitted on thirty items, with an untrained model."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import polars as pl
from tiny import PROMPTS, tiny_model

from onesearch.bundle import HeldOut, open_renderer
from onesearch.context import SearchContext
from onesearch.model import OneSearchModel
from onesearch.sequence import SequenceConfig
from training.codebooks import CodebookConfig, fit_codebooks
from training.columns import SCHEMAS, frame_schema
from training.embedder import EmbedderConfig, fit_embedder
from training.keywords import mine_keywords
from training.package import Identifiers, catalog_items, write_bundle, write_identifiers
from training.tokenizer import train_tokenizer

COLOURS, THINGS = ("red", "blue", "green", "black", "white"), ("shoes", "bag", "lamp", "towel", "mug", "rug")
EMBEDDER = EmbedderConfig(buckets=512, svd_dim=16, dim=8)
CODEBOOKS = CodebookConfig(sizes=(4, 3, 3, 2, 2), iterations=5)
GOLDEN = (
    SearchContext("red shoes"),
    SearchContext("blue bag", "24-30 F", ("lamp",), (3, 4), (3, 4), (5,)),
    SearchContext("тапочки 拖鞋"),
)
HELD_OUT = (HeldOut(GOLDEN[0], (1, 2)), HeldOut(GOLDEN[1], (17,)))
VARIANTS = {
    "control": {"keywords": False, "width": 512, "score": "level", "weight": 50.0},
    "keywords": {"keywords": True, "width": 512, "score": "level", "weight": 50.0},
}


def tiny_items() -> pl.DataFrame:
    """Thirty items `1…30`: each colour of each thing, in a category of its own, priced by its number."""
    defaults = {c.name: c.default for c in SCHEMAS["items"]}
    rows = [
        {
            **defaults,
            "item_id": 1 + number,
            "item_title": f"{colour} {thing}",
            "brand_name": "acme" if number % 2 else "umbra",
            "category_level1_name": "goods",
            "category_level2_name": thing,
            "price": float(1 + number),
            "in_stock": number % 5 != 0,
        }
        for number, (thing, colour) in enumerate((t, c) for t in THINGS for c in COLOURS)
    ]
    return pl.DataFrame(rows, schema=frame_schema("items"))


def write_tiny_identifiers(
    folder: Path,
    sequence: SequenceConfig = PROMPTS,
    defaults: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> None:
    items = tiny_items()
    texts = [item.text() for item in catalog_items(items)]
    embedder = fit_embedder(texts, None, EMBEDDER)
    vectors = embedder.embed(texts)
    codebooks, sids = fit_codebooks(vectors, vectors, CODEBOOKS)
    tokenizer = train_tokenizer(texts, 600, codebooks.spec, sequence.control_tokens())
    popularity = {int(i): float(i % 7) for i in items["item_id"]}
    keywords = mine_keywords(items, [], min_items=2)
    parts = Identifiers(items, sids, popularity, embedder, codebooks, tokenizer, sequence, keywords, defaults)
    write_identifiers(folder, parts)


def write_tiny_bundle(folder: Path, backbone: str = "bart", history: str = "gates") -> tuple[Path, OneSearchModel]:
    """Writes `folder/bundle` (not exported) and returns its path and model."""
    write_tiny_identifiers(folder / "identifiers")
    model = tiny_model(open_renderer(folder / "identifiers"), backbone=backbone, history=history)
    target = folder / "bundle"
    write_bundle(
        folder / "identifiers", model, GOLDEN, HELD_OUT, target, {"name": "tiny", "variants": VARIANTS}, {}
    )
    return target, model


def random_contexts(count: int, seed: int = 0) -> list[SearchContext]:
    """Requests over the tiny catalog with and without history."""
    rng = np.random.default_rng(seed)
    return [
        SearchContext(
            f"{COLOURS[rng.integers(5)]} {THINGS[rng.integers(6)]}",
            recent_items=tuple(int(i) for i in rng.integers(1, 31, rng.integers(0, 5))),
        )
        for _ in range(count)
    ]
