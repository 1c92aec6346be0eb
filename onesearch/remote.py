"""What a gateway and the search model of an inference server say to each other: one search, as named tensors.

The gateway renders the prompt and turns filters into a mask; the server holds the graphs and the tries and runs the
decode loop. A call names the contract and the catalog it was made for, so neither side can misread the other.

Legend: S prompt tokens, R behaviours, E history width, A SIDs added since the catalog was built, L levels, M leaves
(the catalog's, then the added ones), n results.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from onesearch.decode import BeamConfig, BeamResult, Score
from onesearch.errors import ConfigError
from onesearch.sequence import BEHAVIOURS, Prompt
from onesearch.sid import LEVELS, RQ_LEVELS, Codes

MODEL, PREFILL, STEP = "onesearch_search", "onesearch_prefill", "onesearch_step"
BROKEN = "the model answered with what cannot be searched: "
"""How the message begins when the model is at fault, and not the server or the way to it"""
CATALOGS = "catalogs"
"""Folder of the search model that holds the tries of the catalogs, as VERSION.trie"""
DIGEST, MODEL_VERSION, CATALOG_VERSION, PRECISION = (
    "contract_digest",
    "model_version",
    "catalog_version",
    "precision",
)
"""Parameters of the model's configuration, which a gateway compares with its bundle before it sends a search."""

Tensors = dict[str, npt.NDArray[Any]]
_SCORES: tuple[Score, ...] = get_args(Score)
_PAIR = ("call", "answer")
_VERSION = re.compile(r"[A-Za-z0-9_-]{1,64}")  # it names a file


@dataclass(frozen=True)
class Tensor:
    """One named tensor: its type as inference servers name it, and its shape without the batch axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def inputs(history_dim: int) -> tuple[Tensor, ...]:
    """The tensors of a call, in order; -1 is an axis of any length."""
    return (
        Tensor("ids", "INT64", (-1,)),
        Tensor("history", "FP32", (len(BEHAVIOURS), RQ_LEVELS, history_dim)),
        Tensor("legal", "UINT8", (-1,)),
        Tensor("added", "UINT16", (-1,)),
        Tensor("options", "INT32", (3,)),
        Tensor("versions", "UINT8", (-1,)),
    )


OUTPUTS = (
    Tensor("codes", "UINT16", (-1, LEVELS)),
    Tensor("scores", "FP32", (-1,)),
    Tensor("leaves", "INT64", (-1,)),
    Tensor("beams", "INT32", (-1,)),
    Tensor("timings", "FP32", (2,)),
    Tensor("model", "UINT8", (-1,)),
)


@dataclass(frozen=True)
class Call:
    """One search.

    digest: contract digest of the gateway's bundle. catalog: version of the trie to search. added: uint16 [A, L],
    SIDs that trie does not hold, in order. legal: uint8, one bit per leaf of the trie, padded to whole bytes, then
    one per added SID; None when all are legal.
    """

    prompt: Prompt
    config: BeamConfig
    digest: str
    catalog: str
    added: Codes
    legal: npt.NDArray[np.uint8] | None = None

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        config: BeamConfig,
        digest: str,
        catalog: str,
        legal: npt.NDArray[np.bool_] | None = None,
        added: Codes | None = None,
        legal_added: npt.NDArray[np.bool_] | None = None,
    ) -> "Call":
        """A call with its masks, bool [leaves of the trie] and bool [A], packed; None for both: all are legal."""
        added = np.empty((0, LEVELS), dtype=np.uint16) if added is None else added
        packed = None
        if legal is not None:
            more = np.ones(len(added), dtype=np.bool_) if legal_added is None else legal_added
            packed = np.concatenate([np.packbits(legal), np.packbits(more)])
        return cls(prompt, config, digest, catalog, added, packed)

    def tensors(self) -> Tensors:
        """The call as tensors, without the batch axis."""
        options = [self.config.width, self.config.top_n, _SCORES.index(self.config.score)]
        return {
            "ids": self.prompt.ids,
            "history": self.prompt.history,
            "legal": np.empty(0, dtype=np.uint8) if self.legal is None else self.legal,
            "added": self.added.reshape(-1),
            "options": np.asarray(options, dtype=np.int32),
            "versions": _bytes(f"{self.digest} {self.catalog}"),
        }

    @classmethod
    def parse(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> "Call":
        """A call from its tensors. Raises ConfigError for options or lengths that no gateway sends."""
        width, top_n, score = (int(value) for value in tensors["options"])
        if not 0 <= score < len(_SCORES):
            raise ConfigError(f"options: score {score} is unknown, expected 0..{len(_SCORES) - 1}")
        if len(tensors["added"]) % LEVELS or not len(tensors["ids"]):
            lengths = f"{len(tensors['added'])} added codes and {len(tensors['ids'])} ids"
            raise ConfigError(f"call: has {lengths}, expected a multiple of {LEVELS} and at least one")
        digest, _, catalog = _text(tensors["versions"]).partition(" ")
        if not _VERSION.fullmatch(catalog):
            raise ConfigError(f"catalog {catalog!r}: is not a version")
        return cls(
            prompt=Prompt(tensors["ids"], tensors["history"]),
            config=BeamConfig(width, top_n, _SCORES[score]),
            digest=digest,
            catalog=catalog,
            added=tensors["added"].reshape(-1, LEVELS),
            legal=tensors["legal"] if len(tensors["legal"]) else None,
        )

    def mask(self, leaves: int) -> npt.NDArray[np.bool_] | None:
        """bool [leaves + A]: the legal leaves of a trie and of the added SIDs; None when all are.

        Raises ConfigError for a mask of another length.
        """
        if self.legal is None:
            return None
        split = -(-leaves // 8)
        expected = split - (-len(self.added) // 8)
        if len(self.legal) != expected:
            raise ConfigError(f"legal: has {len(self.legal)} bytes, expected {expected} for {leaves} SIDs")
        parts = (self.legal[:split], leaves), (self.legal[split:], len(self.added))
        return np.concatenate([np.unpackbits(bits, count=count) for bits, count in parts]).view(np.bool_)


@dataclass(frozen=True)
class Answer:
    """What the server found. model_version: the model that answered; timings_ms: prefill and decode on the server."""

    found: BeamResult
    model_version: str
    timings_ms: tuple[float, float]

    def tensors(self) -> Tensors:
        """The answer as tensors, without the batch axis."""
        return {
            "codes": self.found.codes,
            "scores": self.found.scores,
            "leaves": self.found.leaves,
            "beams": np.asarray(self.found.beams, dtype=np.int32),
            "timings": np.asarray(self.timings_ms, dtype=np.float32),
            "model": _bytes(self.model_version),
        }

    @classmethod
    def parse(cls, tensors: Mapping[str, npt.NDArray[Any]]) -> "Answer":
        """An answer from its tensors."""
        beams = tuple(tensors["beams"].tolist())
        prefill, decode = (round(float(spent), 3) for spent in tensors["timings"])
        return cls(
            BeamResult(tensors["codes"], tensors["scores"], tensors["leaves"], beams),
            _text(tensors["model"]),
            (prefill, decode),
        )


def write_recorded(path: Path, recorded: Sequence[tuple[Call, Answer]]) -> None:
    """Write calls with their answers, for `read_recorded`."""
    arrays: Tensors = {"count": np.asarray(len(recorded))}
    for number, (call, answer) in enumerate(recorded):
        for kind, tensors in zip(_PAIR, (call.tensors(), answer.tensors()), strict=True):
            arrays |= {f"{number}/{kind}/{name}": array for name, array in tensors.items()}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_recorded(path: Path) -> list[tuple[Call, Answer]]:
    """The calls that were recorded when a model was exported, each with its answer."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}

    def part(number: int, kind: str) -> Tensors:
        prefix = f"{number}/{kind}/"
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    call, answer = _PAIR
    numbers = range(int(arrays["count"]))
    return [(Call.parse(part(n, call)), Answer.parse(part(n, answer))) for n in numbers]


def _bytes(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _text(array: npt.NDArray[Any]) -> str:
    return array.tobytes().decode()
