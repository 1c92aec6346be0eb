"""Text to unit vectors, for queries and items alike. Applies embedders; fitting them is training's.

`HashedEmbedder` needs no pretrained weights: hashed character n-grams, each with a learned row of one matrix
(spec §3.1). `OnnxEmbedder` runs an exported sentence encoder such as BGE. `KeywordEmbedder` mixes the keywords of a
text into what either says of it (spec §3.2). A folder's `config.json` says which.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from onesearch.arrays import load_arrays, save_arrays, write_atomically
from onesearch.errors import BundleError
from onesearch.keywords import KeywordRules, load_keywords
from onesearch.text import normalise

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

FORMAT_VERSION = 1
KHQE_EXCLUDED = ("Marketing", "Price", "Anchor")  # say nothing of what the item is
_CHUNK = 128  # texts at once: the gathered feature rows stay in the processor's cache

_SPACE = 32
_NGRAMS = (3, 4, 5)
_TAIL = " " * (_NGRAMS[-1] - 1)  # lets every span length start at every character
_CJK_NGRAMS = (1, 2)  # scripts without spaces: one character is already a word
_CJK_RANGES = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, hence invertible modulo 2^64
_BASE_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_SALT = np.uint64(0xD6E8FEB86659FD93)
_MIX = np.uint64(0xFF51AFD7ED558CCD)


class TextEmbedder(Protocol):
    """Embeds texts of any script. Equal texts give equal bits, alone or in a batch (see each class)."""

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        ...

    def embed(self, texts: Sequence[str]) -> Float32:
        """n texts → float32 [n, dim], rows of length 1, always finite."""
        ...

    def save(self, directory: Path) -> None:
        """Write everything `open_embedder` needs to `directory`."""
        ...


@dataclass(frozen=True)
class Features:
    """Feature counts of texts in coordinate form, sorted by row, then column; three arrays of one length."""

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    counts: Float32

    @property
    def weights(self) -> Float32:
        """Sublinear term frequency, 1 + ln(count)."""
        return np.float32(1.0) + np.log(self.counts)


def hash_features(texts: Sequence[str], buckets: int) -> Features:
    """Hashed features of normalised texts: padded character n-grams inside words, and whole words.

    Every feature is a span of the concatenated code points; its hash is a difference of prefix sums of a
    polynomial modulo 2^64, so one text and a hundred thousand run the same few array operations.
    """
    padded = [f" {normalise(text)} " for text in texts]
    points = np.frombuffer(("".join(padded) + _TAIL).encode("utf-32-le"), dtype=np.uint32)
    row_of = np.repeat(np.arange(len(padded)), np.array([len(text) for text in padded], dtype=np.int64))
    starts, hashes = _hash_spans(points)
    columns = ((hashes >> 32) * buckets) >> 32
    keys = row_of[starts] * buckets + columns.astype(np.int64)
    keys.sort()
    first = _run_starts(keys)
    rows, unique_columns = np.divmod(keys[first], buckets)
    counts = np.concatenate([first[1:], [len(keys)]]) - first if keys.size else first
    return Features(rows, unique_columns, counts.astype(np.float32))


def _run_starts(values: Int64) -> Int64:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.concatenate([values[:1] == values[:1], values[1:] != values[:-1]]))


def _hash_spans(points: npt.NDArray[np.uint32]) -> tuple[Int64, npt.NDArray[np.uint64]]:
    """Start and 64-bit hash of every feature of padded, concatenated texts."""
    starts, ends, num_words = _spans(points)
    powers = np.cumprod(np.full(len(points), _BASE, dtype=np.uint64))
    inverses = np.cumprod(np.full(len(points), _BASE_INVERSE, dtype=np.uint64))
    prefix = np.zeros(len(points) + 1, dtype=np.uint64)
    np.cumsum((points.astype(np.uint64) + 1) * powers, out=prefix[1:])
    hashes = np.multiply(prefix[ends] - prefix[starts], inverses[starts], dtype=np.uint64)
    hashes[len(hashes) - num_words :] += _SALT  # a whole word is not the same feature as the n-gram it looks like
    hashes ^= hashes >> np.uint64(32)  # the polynomial's low bits are weak; two rounds spread them upwards
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(29)
    hashes *= _SALT
    return starts, hashes


def _spans(points: npt.NDArray[np.uint32]) -> tuple[Int64, Int64, int]:
    """Starts and ends of all features, the whole words last, and how many words there are."""
    size = len(points) - len(_TAIL)
    space = points == _SPACE
    before = np.concatenate([[0], np.cumsum(space)])
    starts, ends = [], []
    for n in _NGRAMS:
        # Padding may be a span's first or last character; a space inside would cross words or texts.
        starts.append(np.flatnonzero(before[n - 1 : size + n - 1] == before[1 : size + 1]))
        ends.append(starts[-1] + n)
    if points.max() >= _CJK_RANGES[0][0]:
        cjk = np.logical_or.reduce([(points >= low) & (points <= high) for low, high in _CJK_RANGES])
        before = np.concatenate([[0], np.cumsum(cjk)])
        for n in _CJK_NGRAMS:
            starts.append(np.flatnonzero(before[n:] - before[:-n] == n))
            ends.append(starts[-1] + n)
    edges = np.flatnonzero(space[1:] != space[:-1]) + 1  # word starts and ends alternate: texts are padded
    starts.append(edges[0::2])
    ends.append(edges[1::2])
    return np.concatenate(starts), np.concatenate(ends), len(edges) // 2


class HashedEmbedder:
    """Sum of (1 + ln tf) · row over a text's hashed features, L2-normalised.

    `matrix` [buckets, dim] holds idf · SVD · projection in one; it is rounded to float16, as it is stored, so
    that a loaded embedder gives the very vectors the identifiers were made from. Results do not depend on the
    batch. A text without a known feature gets the mean direction of all rows.
    """

    def __init__(self, matrix: npt.NDArray[np.floating[Any]]) -> None:
        if matrix.ndim != 2 or 0 in matrix.shape or not np.isfinite(matrix).all():
            raise ValueError(f"matrix: shape {matrix.shape}, expected finite [buckets, dim]")
        peak = float(np.abs(matrix).max()) or 1.0
        scale = 2.0 ** (15 - np.ceil(np.log2(peak)))  # only directions matter; a power of two keeps every bit
        self._stored = (matrix.astype(np.float64) * scale).astype(np.float16)
        self._matrix = self._stored.astype(np.float32)
        self._fallback = _unit_rows(self._matrix.sum(axis=0, dtype=np.float64)[None], np.eye(1, matrix.shape[1]))[
            0
        ]

    @property
    def dim(self) -> int:
        return int(self._matrix.shape[1])

    @property
    def buckets(self) -> int:
        """Number of hash buckets."""
        return int(self._matrix.shape[0])

    def embed(self, texts: Sequence[str]) -> Float32:
        sums = np.zeros((len(texts), self.dim), dtype=np.float32)
        for first in range(0, len(texts), _CHUNK):
            features = hash_features(texts[first : first + _CHUNK], self.buckets)
            if features.rows.size:
                starts = _run_starts(features.rows)
                weighted = self._matrix[features.columns] * features.weights[:, None]
                sums[first + features.rows[starts]] = np.add.reduceat(weighted, starts, axis=0)
        return _unit_rows(sums, self._fallback)

    def save(self, directory: Path) -> None:
        save_arrays(directory / "weights.npz", {"matrix": self._stored})
        config = {"kind": "hashed", "version": FORMAT_VERSION, "buckets": self.buckets, "dim": self.dim}
        write_atomically(directory / "config.json", json.dumps(config, indent=2).encode())

    @classmethod
    def load(cls, directory: Path, config: Mapping[str, Any]) -> Self:
        """Read what `save` wrote. Raises BundleError listing every fault."""
        faults = _config_faults(config, {"buckets": int, "dim": int})
        if faults:
            raise BundleError(str(directory / "config.json"), faults)
        matrix = load_arrays(directory / "weights.npz", {"matrix": ("float16", 2)})["matrix"]
        if matrix.shape != (config["buckets"], config["dim"]):
            fault = f"matrix: shape {matrix.shape}, expected {(config['buckets'], config['dim'])} by config.json"
            raise BundleError(str(directory / "weights.npz"), [fault])
        return cls(matrix)


class OnnxEmbedder:
    """A sentence encoder exported to `embedder.onnx` with its `tokenizer.json`, run by ONNX Runtime.

    `config.json` holds dim, pooling (`cls` or `mean`), max_length (tokens) and a prefix put before every text.
    A text's vector can differ in the last bits with the batch it is padded in.
    """

    _BATCH = 32
    _FILES = ("embedder.onnx", "tokenizer.json")

    def __init__(self, directory: Path, config: Mapping[str, Any], threads: int = 1) -> None:
        import onnxruntime

        faults = _config_faults(config, {"dim": int, "pooling": str, "max_length": int, "prefix": str})
        if config.get("pooling") not in ("cls", "mean"):
            faults.append(f"pooling: {config.get('pooling')!r}, expected 'cls' or 'mean'")
        faults += [f"{name}: missing" for name in self._FILES if not (directory / name).is_file()]
        if faults:
            raise BundleError(str(directory), faults)
        self._directory, self._config = directory, dict(config)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
            self._session = onnxruntime.InferenceSession(str(directory / "embedder.onnx"), options)
        except Exception as error:  # both libraries raise bare Exception subclasses for damaged files
            raise BundleError(str(directory), [f"tokenizer.json or embedder.onnx is damaged: {error}"]) from error
        self._tokenizer.enable_truncation(config["max_length"])
        self._tokenizer.enable_padding()
        self._inputs = {node.name for node in self._session.get_inputs()}

    @property
    def dim(self) -> int:
        return int(self._config["dim"])

    def embed(self, texts: Sequence[str]) -> Float32:
        pooled = np.zeros((len(texts), self.dim), dtype=np.float32)
        for first in range(0, len(texts), self._BATCH):
            batch = [self._config["prefix"] + normalise(text) for text in texts[first : first + self._BATCH]]
            pooled[first : first + len(batch)] = self._pool(batch)
        return _unit_rows(pooled, np.eye(1, self.dim, dtype=np.float32)[0])

    def _pool(self, batch: list[str]) -> Float32:
        encodings = self._tokenizer.encode_batch(batch)
        mask = np.array([encoding.attention_mask for encoding in encodings], dtype=np.int64)
        feeds = {
            "input_ids": np.array([encoding.ids for encoding in encodings], dtype=np.int64),
            "attention_mask": mask,
            "token_type_ids": np.zeros_like(mask),
        }
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        hidden: Float32 = self._session.run(["last_hidden_state"], feeds)[0]
        if self._config["pooling"] == "cls":
            return hidden[:, 0]
        kept = mask[:, :, None].astype(np.float32)
        mean: Float32 = (hidden * kept).sum(axis=1) / np.maximum(kept.sum(axis=1), 1.0)
        return mean

    def save(self, directory: Path) -> None:
        for name in self._FILES:
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._directory / name, directory / name)
        write_atomically(directory / "config.json", json.dumps(self._config, indent=2).encode())


class KeywordEmbedder:
    """KHQE: half the text's vector, half the mean of its keywords' vectors, L2-normalised (V1 Eq. 2, spec §3.2).

    Keywords are the dictionary phrases found in the text, each once, of every type but `excluded`. A text without
    keywords keeps its own vector, which has length 1 as well. Keyword vectors are the base embedder's.
    """

    def __init__(self, base: TextEmbedder, rules: KeywordRules, excluded: Sequence[str] = KHQE_EXCLUDED) -> None:
        self._base, self._excluded = base, tuple(excluded)
        self._rules = KeywordRules({p: t for p, t in rules.types.items() if t not in self._excluded})
        self._row = {phrase: row for row, phrase in enumerate(sorted(self._rules.types))}
        self._vectors = base.embed(list(self._row))

    @property
    def dim(self) -> int:
        return self._base.dim

    def embed(self, texts: Sequence[str]) -> Float32:
        vectors = self._base.embed(texts)
        for row, text in enumerate(texts):
            found = dict.fromkeys(phrase for phrase, _ in self._rules.spans(normalise(text)))
            if found:
                vectors[row] = (vectors[row] + self._vectors[[self._row[p] for p in found]].mean(axis=0)) / 2
        return _unit_rows(vectors, np.eye(1, self.dim, dtype=np.float32)[0])

    def save(self, directory: Path) -> None:
        base = directory / "base"
        base.mkdir(parents=True, exist_ok=True)
        self._base.save(base)
        self._rules.save(directory / "keywords.json")
        config = {"kind": "keyword", "version": FORMAT_VERSION, "excluded": list(self._excluded)}
        write_atomically(directory / "config.json", json.dumps(config, indent=2).encode())

    @classmethod
    def load(cls, directory: Path, config: Mapping[str, Any]) -> Self:
        """Read what `save` wrote. Raises BundleError listing every fault."""
        faults = _config_faults(config, {"excluded": list})
        if faults:
            raise BundleError(str(directory / "config.json"), faults)
        return cls(
            open_embedder(directory / "base"), load_keywords(directory / "keywords.json"), config["excluded"]
        )


def open_embedder(directory: Path) -> TextEmbedder:
    """Open the embedder saved in `directory`. Raises BundleError listing every fault."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BundleError(str(path), [f"cannot be read as JSON: {error}"]) from error
    kind = config.get("kind") if isinstance(config, dict) else config
    if kind == "hashed":
        return HashedEmbedder.load(directory, config)
    if kind == "onnx":
        return OnnxEmbedder(directory, config)
    if kind == "keyword":
        return KeywordEmbedder.load(directory, config)
    raise BundleError(str(path), [f"kind: {kind!r}, expected 'hashed', 'onnx' or 'keyword'"])


def _config_faults(config: Mapping[str, Any], fields: Mapping[str, type]) -> list[str]:
    faults = []
    if config.get("version") != FORMAT_VERSION:
        faults.append(f"version: {config.get('version')!r}, expected {FORMAT_VERSION}")
    for name, kind in fields.items():
        value = config.get(name)
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            faults.append(f"{name}: {value!r}, expected a {'positive ' if kind is int else ''}{kind.__name__}")
    return faults


def _unit_rows(rows: npt.NDArray[np.floating[Any]], fallback: npt.NDArray[np.floating[Any]]) -> Float32:
    norms = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    unit = np.where(norms > 1e-18, rows / np.maximum(norms, 1e-18), fallback)
    return unit.astype(np.float32, copy=False)
