"""The bundle: a directory that holds everything a trained model needs to serve, immutable once written.

`seal` closes a folder of parts and moves it into place; `open_bundle` verifies and opens it. Faults are listed
all at once and nothing is ever unpickled. Besides the checksum of every file the manifest carries a contract
digest, which the loader recomputes with the running code: template version, limits, tokenizer, SID grammar,
quantiser, embedder, behaviours of histories and a rendered probe. A bundle rendered by other rules does not open.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from onesearch.catalog import Catalog
from onesearch.context import ContextEncoder, SearchContext
from onesearch.embedder import open_embedder
from onesearch.errors import BundleError, ConfigError, OneSearchError
from onesearch.keywords import KeywordRules, load_keywords
from onesearch.quantizer import Codebooks
from onesearch.sequence import BEHAVIOURS, TEMPLATE_VERSION, Fields, Renderer, sequence_config
from onesearch.sid import SidSpec
from trie import SidTrie

SCHEMA_VERSION = 3
MANIFEST, GRAPHS, STAMP, HELD_OUT = "manifest.json", "graphs", "stamp.json", "held_out.jsonl"
DEFAULTS = "defaults.json"  # items for users without history, by query; only in bundles whose recipe asks for it
_MUST = ("sid_spec.json", "tokenizer.json", "sequence.json", "codebooks.npz", "embedder")
CONTRACT = (*_MUST, DEFAULTS)  # what the contract digest covers: how text becomes ids and ids become items
_PARTS = (*_MUST, "items", "trie.bin", "keywords.json", "model.json", "weights.safetensors", "examples.jsonl")


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself; files maps each relative path to its sha256."""

    schema_version: int
    digest: str
    model_version: str
    catalog_version: str
    created: str
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    files: dict[str, str]


@dataclass(frozen=True)
class GoldenExample:
    """A request with the ids it must render to and the SIDs (best first) the model must find for it."""

    context: SearchContext
    ids: tuple[int, ...]
    codes: tuple[tuple[int, ...], ...]
    scores: tuple[float, ...]

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))


@dataclass(frozen=True)
class HeldOut:
    """A request outside training (where the shop has such) and the items clicked after it, to judge int8 on."""

    context: SearchContext
    clicked: tuple[int, ...]

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))


@dataclass(frozen=True)
class Bundle:
    """An open bundle. graphs is the verified graph folder, None until the bundle has been exported."""

    path: Path
    manifest: Manifest
    renderer: Renderer
    encoder: ContextEncoder
    catalog: Catalog
    trie: SidTrie
    keywords: KeywordRules
    examples: tuple[GoldenExample, ...]
    graphs: Path | None = None
    graph_stamp: dict[str, Any] = field(default_factory=dict)


def seal(
    parts: Path,
    target: Path,
    *,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
    created: str,
) -> Manifest:
    """Write the manifest of a folder that holds every part, then rename the folder to `target`.

    Raises BundleError when a part is missing or `target` exists.
    """
    faults = [f"{name}: is missing" for name in _PARTS if not (parts / name).exists()]
    if target.exists():
        faults.append(f"{target}: exists already; bundles are immutable, remove it or choose another name")
    if faults:
        raise BundleError(f"bundle {parts}", faults)
    files = {name: sha256(parts / name) for name in _files(parts)}
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        digest=contract_digest(parts),
        model_version=files["weights.safetensors"][:12],
        catalog_version=_combined({n: h for n, h in files.items() if n.startswith(("items/", "trie"))})[:12],
        created=created,
        recipe=dict(recipe),
        metrics=dict(metrics),
        files=files,
    )
    (parts / MANIFEST).write_bytes(orjson.dumps(asdict(manifest), option=orjson.OPT_INDENT_2))
    parts.rename(target)
    return manifest


def open_bundle(path: Path | str, graphs: bool = True) -> Bundle:
    """Verify and open a bundle, without its graphs if graphs is False. Raises BundleError listing every fault found."""
    folder = Path(path)
    manifest = _read_manifest(folder)
    faults = _file_faults(folder, manifest.files, ignore=GRAPHS)
    if faults:
        raise BundleError(f"bundle {folder}", faults)
    digest = contract_digest(folder)
    if digest != manifest.digest:
        fault = (
            f"contract digest is {digest[:12]}, the manifest says {manifest.digest[:12]}: the bundle was made by"
        )
        raise BundleError(f"bundle {folder}", [f"{fault} another version of the prompt or identifier code"])
    examples = tuple(_example(line) for line in (folder / "examples.jsonl").read_bytes().splitlines())
    exported, stamp = _open_graphs(folder, manifest) if graphs else (None, {})
    return open_parts(folder, manifest, examples, exported, stamp)


def read_held_out(folder: Path) -> tuple[HeldOut, ...]:
    """Held-out searches of a bundle folder; none when it was written without any. Raises ConfigError."""
    path = folder / HELD_OUT
    if not path.exists():
        return ()
    rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    try:
        return tuple(HeldOut(_context(row["context"]), tuple(row["clicked"])) for row in rows)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{HELD_OUT}: {error}") from error


def open_parts(
    folder: Path,
    manifest: Manifest,
    examples: tuple[GoldenExample, ...] = (),
    graphs: Path | None = None,
    stamp: dict[str, Any] | None = None,
) -> Bundle:
    """Open the parts of a folder without verifying checksums; packaging uses it before the manifest exists."""
    catalog = Catalog(folder / "items")
    renderer, defaults = open_renderer(folder), _read_defaults(folder / DEFAULTS)
    embedder, codebooks = open_embedder(folder / "embedder"), Codebooks.load(folder / "codebooks.npz")
    encoder = ContextEncoder(embedder, codebooks, catalog, renderer.config.uid, defaults)
    try:
        trie = SidTrie.open(folder / "trie.bin")
    except (OSError, ValueError) as error:
        raise BundleError(f"bundle {folder}", [f"trie.bin: {error}"]) from error
    if trie.num_sids != catalog.num_sids:
        fault = f"trie.bin: holds {trie.num_sids} SIDs, the items have {catalog.num_sids}"
        raise BundleError(f"bundle {folder}", [fault])
    return Bundle(
        path=folder,
        manifest=manifest,
        renderer=renderer,
        encoder=encoder,
        catalog=catalog,
        trie=trie,
        keywords=load_keywords(folder / "keywords.json"),
        examples=examples,
        graphs=graphs,
        graph_stamp=stamp or {},
    )


def open_renderer(folder: Path) -> Renderer:
    """The prompt renderer of a bundle folder."""
    spec = SidSpec(tuple(orjson.loads((folder / "sid_spec.json").read_bytes())["sizes"]))
    config = sequence_config(orjson.loads((folder / "sequence.json").read_bytes()))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Renderer(tokenizer, spec, config, Codebooks.load(folder / "codebooks.npz").dim)


def contract_digest(folder: Path) -> str:
    """sha256 over everything that decides how text becomes ids and ids become items."""
    names = [name for name in _files(folder) if name.split("/")[0] in CONTRACT]
    parts = {name: sha256(folder / name) for name in names}
    try:
        renderer = open_renderer(folder)
    except (OneSearchError, ValueError, KeyError, OSError) as error:
        raise BundleError(f"bundle {folder}", [f"the prompt rules do not open: {error}"]) from error
    probe = renderer.prompt("search", _probe(renderer)).ids.tolist()
    parts["probe"] = f"{TEMPLATE_VERSION}:{','.join(BEHAVIOURS)}:{probe}"
    return _combined(parts)


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _probe(renderer: Renderer) -> Fields:
    levels = len(renderer.sids.spec.sizes)
    return Fields(
        query="Red  Shoes №42 <a_0> 红色跑鞋",
        query_sid=np.zeros(levels, dtype=np.uint16),
        profile="24-30 F",
        recent_queries=("running shoes", "socks"),
        uid=np.zeros((2, levels), dtype=np.uint16),
        recent_sids=np.zeros((2, levels), dtype=np.uint16),
        history=np.zeros(renderer.history_shape, dtype=np.float32),
        keywords=("shoes", "red"),
    )


def _read_defaults(path: Path) -> dict[str, tuple[int, ...]]:
    """Default histories by query; none when the bundle has no such file."""
    if not path.exists():
        return {}
    try:
        return {str(query): tuple(map(int, items)) for query, items in orjson.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise BundleError(str(path), [f"not a table of default histories ({error!r})"]) from error


def _combined(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(orjson.dumps(dict(parts), option=orjson.OPT_SORT_KEYS)).hexdigest()


def _files(folder: Path) -> list[str]:
    """Relative paths of all files except the manifest and the graphs, sorted."""
    paths = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(p.as_posix() for p in paths if p.parts[0] not in (MANIFEST, GRAPHS))


def _read_manifest(folder: Path) -> Manifest:
    try:
        raw = orjson.loads((folder / MANIFEST).read_bytes())
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION:
            fault = f"{MANIFEST}: schema_version is {version!r}, this software reads {SCHEMA_VERSION}"
            raise BundleError(f"bundle {folder}", [f"{fault}; make the bundle again"])
        return Manifest(**raw)
    except (OSError, orjson.JSONDecodeError, AttributeError, TypeError) as error:
        raise BundleError(f"bundle {folder}", [f"{MANIFEST}: is missing or not a manifest ({error})"]) from error


def _file_faults(folder: Path, files: Mapping[str, str], ignore: str = "") -> list[str]:
    faults: list[str] = []
    for name, expected in files.items():
        try:
            found = sha256(folder / name)
        except OSError:
            faults.append(f"{name}: is missing")
            continue
        if found != expected:
            faults.append(
                f"{name}: sha256 is {found[:12]}…, the manifest says {expected[:12]}…; damaged or edited"
            )
    known = set(files) | {MANIFEST, STAMP}
    here = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    foreign = sorted(p.as_posix() for p in here if p.as_posix() not in known and p.parts[0] != ignore)
    return faults + [f"{name}: is not listed in the manifest" for name in foreign]


def _open_graphs(folder: Path, manifest: Manifest) -> tuple[Path | None, dict[str, Any]]:
    graphs = folder / GRAPHS
    if not graphs.exists():
        return None, {}
    try:
        stamp: dict[str, Any] = orjson.loads((graphs / STAMP).read_bytes())
        faults = _file_faults(graphs, stamp["files"])
        made_from = (stamp["digest"], stamp["model_version"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"graphs {graphs}", [f"{STAMP}: is missing or not a stamp ({error!r})"]) from error
    if made_from != (manifest.digest, manifest.model_version):
        faults.append(f"{STAMP}: was exported from {made_from}, not from model {manifest.model_version}")
    if faults:
        raise BundleError(f"graphs {graphs}", faults)
    return graphs, stamp


def _example(line: bytes) -> GoldenExample:
    raw = orjson.loads(line)
    try:
        return GoldenExample(
            context=_context(raw["context"]),
            ids=tuple(raw["ids"]),
            codes=tuple(tuple(c) for c in raw["codes"]),
            scores=tuple(raw["scores"]),
        )
    except TypeError as error:
        raise ConfigError(f"examples.jsonl: {error}") from error


def _context(raw: Mapping[str, Any]) -> SearchContext:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return SearchContext(**values)
