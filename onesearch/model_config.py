"""The shape of a network and the token ids it must know; stored in the bundle as model.json. Knows no torch."""

import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, Self, get_args

from onesearch.errors import ConfigError
from onesearch.sequence import BEHAVIOURS, Renderer
from onesearch.sid import SidSpec, SidVocab

BackboneName = Literal["bart", "gpt2", "qwen3"]
HistoryMode = Literal["gates", "qformer"]


@dataclass(frozen=True)
class ModelConfig:
    """One network. `encoder_layers` is BART's alone; `kv_heads`, `head_dim` and `rope_theta` are Qwen3's alone.

    kv_heads 0 means as many as heads; head_dim 0 means d_model / heads. max_positions counts the prompt and, for the
    decoder-only backbones, the target behind it. history: how long histories become vectors (`onesearch.history`).
    """

    vocab_size: int
    history_dim: int
    sid_sizes: tuple[int, ...]
    sid_first_id: int
    pad: int
    bos: int
    eos: int
    history_ids: tuple[int, ...]
    backbone: BackboneName = "bart"
    d_model: int = 128
    encoder_layers: int = 2
    decoder_layers: int = 2
    heads: int = 4
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 512
    dropout: float = 0.1
    max_positions: int = 128
    rope_theta: float = 1e6
    history: HistoryMode = "gates"

    def __post_init__(self) -> None:
        if self.backbone not in get_args(BackboneName):
            known = ", ".join(map(repr, get_args(BackboneName)))
            raise ConfigError(f"model.backbone: {self.backbone!r} is unknown, expected one of {known}")
        if self.history not in get_args(HistoryMode):
            known = ", ".join(map(repr, get_args(HistoryMode)))
            raise ConfigError(f"model.history: {self.history!r} is unknown, expected one of {known}")
        if self.backbone != "qwen3" and (self.kv_heads or self.head_dim):
            raise ConfigError(f"model.kv_heads, model.head_dim: {self.backbone} has neither, expected 0")
        if not self.head_dim and self.d_model % self.heads:
            raise ConfigError(f"model.d_model: {self.d_model} is not a multiple of model.heads {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ConfigError(f"model.heads: {self.heads} is not a multiple of model.kv_heads {self.kv_heads}")
        if self.sid_first_id + sum(self.sid_sizes) > self.vocab_size:
            raise ConfigError(f"model.vocab_size: {self.vocab_size} cannot hold the SID tokens")

    @classmethod
    def for_renderer(cls, renderer: Renderer, **shape: Any) -> Self:
        """Ids and sizes of a renderer with the given shape (backbone, d_model, …). Raises ConfigError.

        Without max_positions the network gets as many as the longest prompt and target need.
        """
        unknown = sorted(set(shape) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"model: unknown key(s) {', '.join(unknown)}")
        limits = renderer.config
        needed = limits.max_ids
        if shape.get("backbone", "bart") != "bart":
            needed += max(limits.target_tokens, len(renderer.sids.spec.sizes))
        config = cls(
            vocab_size=renderer.vocab_size,
            history_dim=renderer.history_dim,
            sid_sizes=renderer.sids.spec.sizes,
            sid_first_id=renderer.sids.first_id,
            pad=renderer.pad,
            bos=renderer.bos,
            eos=renderer.eos,
            history_ids=renderer.history_ids,
            **{"max_positions": needed, **shape},
        )
        if config.max_positions < needed:
            raise ConfigError(
                f"model.max_positions: {config.max_positions} is below the {needed} that sequence.max_ids "
                f"{limits.max_ids} needs"
            )
        return config

    @cached_property
    def sids(self) -> SidVocab:
        """SID codes to token ids."""
        return SidVocab(SidSpec(self.sid_sizes), self.sid_first_id)

    @property
    def history_shape(self) -> tuple[int, int, int]:
        """Shape of the history vectors of one prompt: behaviours, RQ levels, their width."""
        return len(BEHAVIOURS), len(self.history_ids), self.history_dim

    @property
    def state_width(self) -> int:
        """Width of a beam's own keys, and of its values, in one decoder layer."""
        return (self.kv_heads or self.heads) * (self.head_dim or self.d_model // self.heads)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Reads `to_json`. Raises ConfigError for unknown or missing keys."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(raw).items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"model: {error}") from error
