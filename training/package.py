"""Writes a bundle from what the stages made: every part, the golden examples, then the sealed directory."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import polars as pl
from tokenizers import Tokenizer

from onesearch.arrays import write_atomically
from onesearch.bundle import (
    CONTRACT,
    DEFAULTS,
    HELD_OUT,
    SCHEMA_VERSION,
    Bundle,
    HeldOut,
    Manifest,
    open_parts,
    seal,
)
from onesearch.catalog import Item, write_catalog
from onesearch.context import SearchContext
from onesearch.embedder import TextEmbedder
from onesearch.keywords import KeywordRules
from onesearch.model import OneSearchModel, TorchDecoder
from onesearch.progress import track
from onesearch.quantizer import Codebooks
from onesearch.search import Searcher, golden_example
from onesearch.sequence import SequenceConfig
from onesearch.sid import Codes
from training.columns import UNKNOWN
from trie import SidTrie


@dataclass(frozen=True)
class Identifiers:
    """Everything but the model: what turns text into ids. item_sids: uint16 [N, L] in the order of `items`.

    defaults: query → items for users without history.
    """

    items: pl.DataFrame
    item_sids: Codes
    popularity: Mapping[int, float]
    embedder: TextEmbedder
    codebooks: Codebooks
    tokenizer: Tokenizer
    sequence: SequenceConfig
    keywords: KeywordRules
    defaults: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def write_identifiers(folder: Path, parts: Identifiers) -> None:
    """Write the parts that training itself needs open: grammar, tokenizer, quantiser, embedder, items, trie."""
    folder.mkdir(parents=True)
    write_atomically(folder / "sid_spec.json", json.dumps({"sizes": parts.codebooks.sizes}).encode())
    write_atomically(folder / "sequence.json", parts.sequence.to_json())
    parts.tokenizer.save(str(folder / "tokenizer.json"))
    parts.codebooks.save(folder / "codebooks.npz")
    parts.embedder.save(folder / "embedder")
    parts.keywords.save(folder / "keywords.json")
    if parts.defaults:
        defaults = orjson.dumps(dict(parts.defaults), option=orjson.OPT_SORT_KEYS)
        write_atomically(folder / DEFAULTS, defaults)
    _write_items(folder, catalog_items(parts.items), parts.item_sids, parts.popularity, parts.codebooks.sizes)


def update_identifiers(
    folder: Path,
    bundle: Bundle,
    items: pl.DataFrame,
    popularity: Mapping[int, float],
    keywords: KeywordRules,
) -> None:
    """Write the identifiers of a bundle with other items and keyword rules into a new folder.

    What the contract digest covers is copied as it is, so texts get the same ids and SIDs as before. An item whose text
    is that of the bundle keeps its SID, which balancing may have moved away from the nearest code.
    """
    folder.mkdir(parents=True)
    for part in (bundle.path / name for name in CONTRACT):
        if part.is_dir():
            shutil.copytree(part, folder / part.name)
        elif part.exists():
            shutil.copyfile(part, folder / part.name)
    keywords.save(folder / "keywords.json")
    listed = catalog_items(items)
    _write_items(folder, listed, _sids(bundle, listed), popularity, bundle.trie.sizes)


def _sids(bundle: Bundle, items: Sequence[Item]) -> Codes:
    """uint16 [N, L]"""
    places = bundle.catalog.index(item.item_id for item in items)
    same = [
        at >= 0 and bundle.catalog.item(at).text() == item.text()
        for item, at in zip(items, places.tolist(), strict=True)
    ]
    sids = bundle.catalog.sids[places]
    fresh = [i for i, kept in enumerate(same) if not kept]
    if fresh:
        sids[fresh] = bundle.encoder.query_sids([items[i].text() for i in fresh])
    return sids


def _write_items(
    folder: Path, items: Sequence[Item], sids: Codes, popularity: Mapping[int, float], sizes: Sequence[int]
) -> None:
    """Items and the trie of their SIDs."""
    rates = np.asarray([popularity.get(item.item_id, 0.0) for item in items], dtype=np.float32)
    (folder / "items").mkdir()
    write_catalog(folder / "items", items, sids, rates)
    SidTrie.build(sids, list(sizes)).save(folder / "trie.bin")


def write_bundle(
    identifiers: Path,
    model: OneSearchModel,
    contexts: Sequence[SearchContext],
    held_out: Sequence[HeldOut],
    target: Path,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Manifest:
    """Copy the identifier parts, add the model, golden examples recorded through the torch decoder, and held-out
    searches, and seal.

    Raises BundleError when `target` exists. `target` appears whole or not at all.
    """
    parts = target.with_name(f".{target.name}.partial")
    shutil.rmtree(parts, ignore_errors=True)
    shutil.copytree(identifiers, parts)
    (parts / "model.json").write_bytes(model.config.to_json())
    model.save_weights(parts / "weights.safetensors")
    unsealed = Manifest(SCHEMA_VERSION, "", "", "", "", {}, {}, {})
    bundle = open_parts(parts, unsealed)
    searcher = Searcher(bundle, TorchDecoder(model, bundle.renderer))
    golden = [golden_example(searcher, context) for context in track(contexts, "golden examples")]
    (parts / "examples.jsonl").write_bytes(b"\n".join(example.to_json() for example in golden))
    (parts / HELD_OUT).write_bytes(b"\n".join(search.to_json() for search in held_out))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return seal(parts, target, recipe=recipe, metrics=metrics, created=created)


def catalog_items(items: pl.DataFrame) -> list[Item]:
    """Rows of the items table as catalog items, in order."""
    return [_item(row) for row in items.iter_rows(named=True)]


def _item(row: dict[str, Any]) -> Item:
    levels = (row[f"category_level{level}_name"] for level in (1, 2, 3))
    return Item(
        item_id=row["item_id"],
        title=row["item_title"],
        brand="" if row["brand_name"] == UNKNOWN else row["brand_name"],
        category=tuple(name for name in levels if name != UNKNOWN),
        price=row["price"],
        image_url=row["image_url"] or None,
        in_stock=row["in_stock"],
        attributes=tuple(orjson.loads(row["attributes"]).items()),
        published_at=row["published_at"] or 0,
    )


def recipe_json(recipe: Any) -> dict[str, Any]:
    """A recipe as plain JSON values, for the manifest."""
    plain: dict[str, Any] = orjson.loads(orjson.dumps(asdict(recipe)))
    return plain
