"""Prompts: the only template table and the only truncation rule, from structured fields to token ids.

Training, export, evaluation and serving all call `Renderer.prompt`; a training target is rendered by
`Renderer.target` and never changes the prompt, so the inference form is the training form without its target.
Nothing is ever assembled by string replacement: user text is tokenised after `normalise`, which removes angle
brackets, so no text can spell a control or SID token (spec §4.3).

Legend: S prompt tokens, L SID levels, R behaviours, E embedding dimension of the quantiser.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

from onesearch.errors import ConfigError
from onesearch.sid import RQ_LEVELS, Codes, SidSpec, SidVocab
from onesearch.text import normalise

TEMPLATE_VERSION = 2
_CACHED_TEXTS = 65_536  # queries and keywords repeat, in logs and in traffic

# One task tag opens every prompt and one field tag opens every field. A field that is absent leaves no trace, so
# a student prompt (without keywords) is a strict prefix of its teacher prompt (spec §4.3): keywords come last.
TASKS: dict[str, tuple[str, ...]] = {
    "search": ("query", "query_sid", "profile", "uid", "history", "recent_items", "recent_queries", "keywords"),
    "query_to_sid": ("query",),
    "sid_to_query": ("query_sid",),
    "title_to_sid": ("title",),
    "sid_to_title": ("item_sid",),
    "query_to_category": ("query",),
    "title_to_category": ("title",),
    "sid_to_category": ("item_sid",),
    "query_to_title": ("query",),
    "title_to_query": ("title",),
    "query_sid_to_item_sid": ("query_sid",),
    "item_sid_to_query_sid": ("item_sid",),
    "items_to_next_item": ("profile", "recent_items"),
    "query_to_keywords": ("query",),
    "query_sid_to_keyword_sid": ("query_sid",),
    "user_to_keywords": ("query", "query_sid", "profile", "uid", "history", "recent_items", "recent_queries"),
    "user_to_keyword_sid": ("query_sid", "profile", "uid", "history", "recent_items", "recent_queries"),
}
_FIELDS = (
    "query",
    "query_sid",
    "title",
    "item_sid",
    "profile",
    "history",
    "recent_items",
    "recent_queries",
    "keywords",
)
PAD, BOS, EOS, SEP = "<pad>", "<bos>", "<eos>", "<sep>"
DISTILL = "<distill>"  # ends a student prompt in the special-token mode of self-distillation (spec §4.7)
UID_TOKEN = "<field_uid>"  # part of a vocabulary only where prompts show user ids
BEHAVIOURS = ("click", "order")  # what long histories are of, in this order (spec §3.6; its RSU is in no table)
HISTORY_TOKENS = tuple(f"<history_{level}>" for level in range(RQ_LEVELS))
CONTROL_TOKENS = (
    *(PAD, BOS, EOS, SEP, DISTILL),
    *HISTORY_TOKENS,
    *(f"<task_{name}>" for name in TASKS),
    *(f"<field_{name}>" for name in _FIELDS),
)


UidMode = Literal["off", "index_mean", "vote", "embed"]


@dataclass(frozen=True)
class SequenceConfig:
    """Limits of a prompt, in tokens unless a name says otherwise. Stored in the bundle.

    uid: whether prompts show a user id of 2 L tokens, and how it is made of the histories (`onesearch.uid`).
    history_vectors: whether prompts show the long history, at three tokens (`onesearch.history`).
    """

    max_ids: int = 96
    query_tokens: int = 32
    title_tokens: int = 32
    target_tokens: int = 24
    recent_queries: int = 5
    recent_query_tokens: int = 8
    recent_items: int = 10
    keywords: int = 8
    keyword_tokens: int = 6
    uid: UidMode = "off"
    history_vectors: bool = True

    def __post_init__(self) -> None:
        if self.uid not in get_args(UidMode):
            raise ConfigError(f"sequence.uid: {self.uid!r}, expected one of {', '.join(get_args(UidMode))}")
        if not isinstance(self.history_vectors, bool):
            raise ConfigError(f"sequence.history_vectors: {self.history_vectors!r}, expected true or false")
        for f in fields(self):
            value = getattr(self, f.name)
            least = 0 if f.name.startswith("recent") else 1
            if f.type is int and (not isinstance(value, int) or value < least):
                raise ConfigError(f"sequence.{f.name}: {value!r} is not a valid limit")
        worst = 2 + 2 + self.query_tokens + 6 + self.target_tokens + 4 + (0 if self.uid == "off" else 11)
        if self.max_ids < worst:
            raise ConfigError(
                f"sequence.max_ids: {self.max_ids} cannot hold a full query; expected at least {worst}"
            )

    def control_tokens(self) -> tuple[str, ...]:
        """The control tokens that a vocabulary needs for these prompts."""
        return CONTROL_TOKENS if self.uid == "off" else (*CONTROL_TOKENS, UID_TOKEN)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()


def _no_sids() -> Codes:
    return np.zeros((0, 0), dtype=np.uint16)


@dataclass(frozen=True)
class Fields:
    """What a prompt may say; text is raw (the renderer normalises), SIDs are codes.

    query_sid, item_sid: uint16 [L] or None. recent_sids: uint16 [n, L], oldest first. history: float32
    [R, 3, E], per behaviour one vector for each RQ level, zeros for a behaviour without items; and uid: uint16 [2, L].
    Either is None for a user without history (spec §3.6).
    """

    query: str = ""
    title: str = ""
    query_sid: Codes | None = None
    item_sid: Codes | None = None
    profile: str = ""
    uid: Codes | None = None
    recent_queries: tuple[str, ...] = ()
    recent_sids: Codes = field(default_factory=_no_sids)
    history: npt.NDArray[np.float32] | None = None
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """ids: int64 [S]. history: float32 [R, 3, E], zeros where the prompt has no history tokens."""

    ids: npt.NDArray[np.int64]
    history: npt.NDArray[np.float32]


class Renderer:
    """Renders fields to ids with one tokenizer, SID grammar and set of limits."""

    def __init__(self, tokenizer: Tokenizer, spec: SidSpec, config: SequenceConfig, history_dim: int) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.history_dim = history_dim
        self.history_shape = (len(BEHAVIOURS), RQ_LEVELS, history_dim)
        self._tokens = lru_cache(maxsize=_CACHED_TEXTS)(self._tokenise)
        self._control = {token: self._require(token) for token in config.control_tokens()}
        self.sids = SidVocab(spec, self._require(spec.token_strings()[0]))
        self.pad, self.bos, self.eos = self._control[PAD], self._control[BOS], self._control[EOS]
        self.distill = self._control[DISTILL]
        self.history_ids = tuple(self._control[token] for token in HISTORY_TOKENS)
        last = spec.token_strings()[-1]
        if self._require(last) != self.sids.first_id + spec.offsets[-1] - 1:
            raise ConfigError(f"tokenizer: SID tokens are not consecutive (wrong id for {last!r})")

    @property
    def vocab_size(self) -> int:
        """Text, control and SID tokens together."""
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def prompt(self, task: str, values: Fields) -> Prompt:
        """The model input of one task. Raises ConfigError for an unknown task."""
        if task not in TASKS:
            raise ConfigError(f"task: {task!r} is unknown, expected one of {', '.join(TASKS)}")
        blocks = {name: getattr(self, f"_{name}")(values) for name in TASKS[task]}
        self._shorten(blocks)
        ids = [self._control[f"<task_{task}>"]]
        for name, parts in blocks.items():
            if parts:
                ids.append(self._control[f"<field_{name}>"])
                ids.extend(token for part in parts for token in part)
        history = values.history if values.history is not None and blocks.get("history") else None
        empty = np.zeros(self.history_shape, dtype=np.float32)
        return Prompt(np.asarray(ids, dtype=np.int64), empty if history is None else history.astype(np.float32))

    def target(self, target: Codes | str) -> npt.NDArray[np.int64]:
        """Target ids, int64: the L tokens of a SID (no end token), or text and an end token."""
        if isinstance(target, str):
            return np.asarray([*self._text(target, self.config.target_tokens - 1), self.eos], dtype=np.int64)
        return self.sids.token_ids(target)

    def text(self, ids: Sequence[int]) -> str:
        """Readable text of generated ids up to the end token; for logs only, never parsed back."""
        kept = list(ids[: list(ids).index(self.eos)]) if self.eos in ids else list(ids)
        return str(self.tokenizer.decode(kept)).strip()

    # Each field renders to a list of parts; truncation drops whole parts, never half an item.

    def _query(self, v: Fields) -> list[list[int]]:
        return [self._text(v.query, self.config.query_tokens)] if v.query else []

    def _title(self, v: Fields) -> list[list[int]]:
        return [self._text(v.title, self.config.title_tokens)] if v.title else []

    def _query_sid(self, v: Fields) -> list[list[int]]:
        return [] if v.query_sid is None else [self.sids.token_ids(v.query_sid).tolist()]

    def _item_sid(self, v: Fields) -> list[list[int]]:
        return [] if v.item_sid is None else [self.sids.token_ids(v.item_sid).tolist()]

    def _profile(self, v: Fields) -> list[list[int]]:
        return [self._text(v.profile, self.config.keyword_tokens)] if v.profile else []

    def _uid(self, v: Fields) -> list[list[int]]:
        if v.uid is None or self.config.uid == "off":
            return []
        return [self.sids.token_ids(codes).tolist() for codes in v.uid]

    def _history(self, v: Fields) -> list[list[int]]:
        return [list(self.history_ids)] if v.history is not None and self.config.history_vectors else []

    def _recent_items(self, v: Fields) -> list[list[int]]:
        kept = v.recent_sids[max(0, len(v.recent_sids) - self.config.recent_items) :]
        return [self.sids.token_ids(codes).tolist() for codes in kept]

    def _recent_queries(self, v: Fields) -> list[list[int]]:
        kept = v.recent_queries[max(0, len(v.recent_queries) - self.config.recent_queries) :]
        return [[*self._text(q, self.config.recent_query_tokens), self._control[SEP]] for q in kept]

    def _keywords(self, v: Fields) -> list[list[int]]:
        kept = v.keywords[: self.config.keywords]
        return [[*self._text(k, self.config.keyword_tokens), self._control[SEP]] for k in kept]

    def _shorten(self, blocks: dict[str, list[list[int]]]) -> None:
        """Drop last keywords, then oldest recent queries, then oldest recent items, until the prompt fits."""
        total = 1 + sum(1 + sum(map(len, parts)) for parts in blocks.values() if parts)
        for name, position in (("keywords", -1), ("recent_queries", 0), ("recent_items", 0)):
            parts = blocks.get(name, [])
            while parts and total > self.config.max_ids:
                total -= len(parts.pop(position)) + (0 if parts else 1)

    def _text(self, text: str, limit: int) -> list[int]:
        return list(self._tokens(text)[:limit])

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(normalise(text), add_special_tokens=False).ids)

    def _require(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigError(f"tokenizer: has no token {token!r}, expected all control and SID tokens")
        return int(token_id)


def add_sid_tokens(tokenizer: Tokenizer, spec: SidSpec) -> None:
    """Append the SID tokens: never normalised, never split, never special (spec §3.7)."""
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in spec.token_strings()])


def sequence_config(raw: dict[str, Any]) -> SequenceConfig:
    """Read limits from parsed JSON or TOML; unknown keys are a ConfigError."""
    unknown = sorted(set(raw) - {f.name for f in fields(SequenceConfig)})
    if unknown:
        raise ConfigError(f"sequence: unknown key(s) {', '.join(unknown)}")
    return SequenceConfig(**raw)
