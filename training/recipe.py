"""A recipe: one TOML file that says how a bundle is made; an unknown key or wrong type is an error naming the key."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from onesearch.errors import ConfigError
from onesearch.model_config import BackboneName, HistoryMode
from onesearch.sequence import SequenceConfig
from training.codebooks import CodebookConfig
from training.embedder import EmbedderConfig
from training.stages import Stage

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class DataConfig:
    """bootstrap: make pseudo-queries when the tables hold no logs, `pseudo_queries` for each item.
    min_keyword_items: a dictionary phrase needs that many items. anonymous_share: share of page views whose prompt
    hides the user, as for visitors who are not known. sentence_encoder: a local sentence-transformers folder (BGE,
    say) to embed texts with, instead of [embedder].
    khqe: mix the keywords of a text into its vector before it gets a SID (spec §3.2).
    keywords: who makes the keywords of page views: the mined rules, the file `keyword_file` that `training.taqu` made,
    or for a simulated marketplace the oracle that knows its truth, which keeps a keyword with chance keyword_recall
    and swaps it with chance keyword_noise.
    cold_default: users without history get that of their query, the items clicked most for it (spec §3.6).
    """

    bootstrap: bool = False
    pseudo_queries: int = 2
    min_keyword_items: int = 3
    anonymous_share: float = 0.0
    sentence_encoder: str = ""
    khqe: bool = False
    keywords: Literal["rules", "oracle", "file"] = "rules"
    keyword_file: str = ""
    keyword_recall: float = 0.9
    keyword_noise: float = 0.1
    cold_default: bool = False

    def __post_init__(self) -> None:
        if (self.keywords == "file") != bool(self.keyword_file):
            raise ConfigError(
                f"data.keyword_file: {self.keyword_file!r}, expected a file exactly when keywords is 'file'"
            )


@dataclass(frozen=True)
class TokenizerConfig:
    """Byte-level BPE trained on the shop's own queries, titles, categories and profiles."""

    vocab_size: int = 4000


@dataclass(frozen=True)
class ModelShape:
    """Which network, and its size; the vocabulary and SID grammar come from the data.

    encoder_layers is BART's alone; kv_heads and head_dim are Qwen3's alone, 0 for as many, and as wide, as heads imply.
    history: how a long history enters (`onesearch.history`), by a mean with learned behaviour gates or a Q-Former.
    """

    backbone: BackboneName = "bart"
    d_model: int = 128
    encoder_layers: int = 2
    decoder_layers: int = 2
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 512
    dropout: float = 0.1
    history: HistoryMode = "gates"


@dataclass(frozen=True)
class VariantConfig:
    """A serving variant that the bundle proposes: decode settings and its share of traffic."""

    keywords: bool = False
    match: bool = False
    width: int = 512
    score: Literal["level", "legal"] = "level"
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out, besides the data."""

    name: str
    seed: int = 1
    threads: int = 2
    precision: Precision = "auto"
    checkpoint_every: int = 100
    golden_examples: int = 32
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    codebooks: CodebookConfig = field(default_factory=CodebookConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    model: ModelShape = field(default_factory=ModelShape)
    stages: tuple[Stage, ...] = ()
    variants: dict[str, VariantConfig] = field(default_factory=lambda: {"default": VariantConfig()})

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("threads", 1), ("checkpoint_every", 1), ("golden_examples", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)}, expected at least {least}")
        if not self.stages:
            raise ConfigError("stages: the recipe has none, expected at least one [[stages]] table")
        if not self.variants:
            raise ConfigError("variants: the recipe has none, expected at least one [variants.NAME] table")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(f"stages: names {', '.join(names)}, expected each once")


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe file. Raises ConfigError naming the file, the key, the value and what was expected."""
    recipe: Recipe = read_toml(Recipe, path)
    return recipe


def read_toml(kind: Any, path: Path | str) -> Any:
    """A file as the dataclass `kind`. Raises ConfigError naming the file, the key, the value and what was expected."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    try:
        return build(kind, raw)
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error


def build(kind: Any, raw: Any, where: str = "") -> Any:
    """Convert parsed TOML to `kind`: a dataclass, a tuple, a dict, a Literal or a scalar type.

    In a union of dataclasses the table's `kind` key chooses one, by the default of that field; the first is default.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _build_dataclass(kind, raw, where)
    if origin is tuple:
        if not isinstance(raw, list):
            raise ConfigError(f"{where}: {raw!r}, expected a list")
        return tuple(build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if origin is dict:
        return {key: build(arguments[1], value, f"{where}.{key}") for key, value in _table(raw, where).items()}
    if origin is Literal:
        if raw not in arguments:
            raise ConfigError(f"{where}: {raw!r}, expected one of {', '.join(map(repr, arguments))}")
        return raw
    if origin is UnionType and is_dataclass(arguments[0]):
        return _build_dataclass(_chosen(arguments, _table(raw, where), where), raw, where)
    if origin is UnionType:
        return raw if raw is None else build(next(a for a in arguments if a is not type(None)), raw, where)
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind:
        raise ConfigError(f"{where}: {raw!r}, expected a value of type {kind.__name__}")
    return raw


def _build_dataclass(kind: Any, raw: Any, where: str) -> Any:
    table = _table(raw, where)
    hints = get_type_hints(kind)
    prefix = f"{where}." if where else ""
    unknown = sorted(set(table) - set(hints))
    if unknown:
        known = ", ".join(f.name for f in fields(kind))
        raise ConfigError(f"{prefix}{unknown[0]}: unknown key, expected one of {known}")
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    missing = sorted(required - set(table))
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: is missing")
    return kind(**{key: build(hints[key], value, f"{prefix}{key}") for key, value in table.items()})


def _chosen(kinds: Sequence[Any], table: Mapping[str, Any], where: str) -> Any:
    by_name = {kind.kind: kind for kind in kinds}
    name = table.get("kind", kinds[0].kind)
    if name not in by_name:
        raise ConfigError(f"{where}.kind: {name!r}, expected one of {', '.join(by_name)}")
    return by_name[name]


def _table(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: {raw!r}, expected a table")
    return raw
