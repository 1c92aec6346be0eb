"""A bundle around a local `transformers` folder: its tokenizer and weights, the identifiers of an existing catalog."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from onesearch.bundle import SCHEMA_VERSION, Manifest, open_parts, open_renderer, seal
from onesearch.context import SearchContext
from onesearch.errors import BundleError
from onesearch.model import TorchDecoder
from onesearch.pretrained import extended_tokenizer, from_pretrained
from onesearch.search import Searcher, golden_example
from onesearch.sid import SidSpec

_IDENTIFIERS = (
    "sid_spec.json",
    "sequence.json",
    "codebooks.npz",
    "embedder",
    "items",
    "trie.bin",
    "keywords.json",
)
_GOLDEN = 8
_VARIANTS: dict[str, Any] = {"default": {"keywords": False, "width": 512, "score": "level", "weight": 1.0}}


def wrap(checkpoint: Path, sid_spec: Path, out: Path) -> Manifest:
    """Write the bundle `out`, whole or not at all.

    checkpoint: a saved BART, GPT-2 or Qwen3 with a fast tokenizer. Control and SID tokens it lacks are appended; their
    rows are untrained, those it has are kept. sid_spec: `sid_spec.json` in a bundle or in the identifiers folder of a
    training run; grammar, catalog, quantiser, embedder, keyword rules and trie come from that folder. Golden examples
    are searches for some of its titles. Raises BundleError listing every fault, ConfigError for a checkpoint that
    cannot be wrapped.
    """
    source = sid_spec.parent
    faults = [f"{name}: is missing beside {sid_spec}" for name in _IDENTIFIERS if not (source / name).exists()]
    if not checkpoint.is_dir():
        faults.append(f"{checkpoint}: is not a folder")
    if out.exists():
        faults.append(f"{out}: exists already; bundles are immutable, remove it or choose another name")
    if faults:
        raise BundleError(f"bundle {out}", faults)
    parts = out.resolve().with_name(f".{out.resolve().name}.partial")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    try:
        for name in _IDENTIFIERS:
            copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
            copy(source / name, parts / name)
        _write_model(checkpoint, parts)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        recipe = {"name": out.name, "from_hf": checkpoint.name, "variants": _VARIANTS}
        return seal(parts, out, recipe=recipe, metrics={}, created=created)
    except (KeyError, TypeError, orjson.JSONDecodeError) as error:
        raise BundleError(f"bundle {out}", [f"{sid_spec}: cannot be read ({error!r})"]) from error
    finally:
        shutil.rmtree(parts, ignore_errors=True)


def _write_model(checkpoint: Path, parts: Path) -> None:
    spec = SidSpec(tuple(orjson.loads((parts / "sid_spec.json").read_bytes())["sizes"]))
    extended_tokenizer(checkpoint, spec).save(str(parts / "tokenizer.json"))
    model = from_pretrained(checkpoint, open_renderer(parts)).eval()
    (parts / "model.json").write_bytes(model.config.to_json())
    model.save_weights(parts / "weights.safetensors")
    bundle = open_parts(parts, Manifest(SCHEMA_VERSION, "", "", "", "", {}, {}, {}))
    searcher = Searcher(bundle, TorchDecoder(model, bundle.renderer))
    rows = np.unique(np.linspace(0, bundle.catalog.num_items - 1, _GOLDEN).astype(int))
    titles = [bundle.catalog.item(int(row)).title for row in rows]
    golden = [golden_example(searcher, SearchContext(title)) for title in titles]
    (parts / "examples.jsonl").write_bytes(b"\n".join(example.to_json() for example in golden))
