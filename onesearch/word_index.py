"""Which rows of a catalog hold a word: an inverted index as three arrays. Immutable.

Words are those of `text.words` and go by 64 bits of their hash: that two of a million words share one has a
probability of 3e-8.

Legend: N rows, V distinct words, P pairs of a word and a row that holds it.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from onesearch.text import words as split

ARRAYS = ("words", "word_starts", "word_rows")


@dataclass(frozen=True, eq=False)
class WordIndex:
    """words: uint64 [V], hashes, ascending. word_starts: int64 [V + 1]; word_rows: uint32 [P], the rows of word v are
    word_rows[word_starts[v] : word_starts[v + 1]], ascending."""

    words: npt.NDArray[np.uint64]
    word_starts: npt.NDArray[np.int64]
    word_rows: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """Index texts; row i is the i-th."""
        places: dict[str, int] = {}
        found, lengths = array("q"), []
        for text in texts:
            held = [places.setdefault(word, len(places)) for word in set(split(text))]
            found.extend(held)
            lengths.append(len(held))
        hashes = np.asarray([_hash(word) for word in places], dtype=np.uint64)
        order = np.argsort(hashes)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        ranks = rank[np.frombuffer(found, dtype=np.int64)]
        rows = np.repeat(np.arange(len(lengths), dtype=np.uint32), lengths)
        starts = np.concatenate([[0], np.cumsum(np.bincount(ranks, minlength=len(order)))])
        return cls(hashes[order], starts, rows[np.argsort(ranks, kind="stable")])

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What `WordIndex(**arrays)` is made of."""
        return {name: getattr(self, name) for name in ARRAYS}

    def faults(self, rows: int) -> list[str]:
        """What is wrong with an index of so many rows; bounds only, the contents are the checksum's business."""
        starts = self.word_starts
        for name, kind in zip(ARRAYS, ("uint64", "int64", "uint32"), strict=True):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != kind:
                return [f"{name}.npy: is {array.dtype} {array.shape}, expected {kind} of one dimension"]
        if len(starts) != len(self.words) + 1 or int(starts[0]) != 0 or int(starts[-1]) != len(self.word_rows):
            return [f"word_starts.npy: does not divide word_rows.npy among {len(self.words)} words"]
        if (starts[1:] < starts[:-1]).any() or (self.words[1:] <= self.words[:-1]).any():
            return ["words.npy, word_starts.npy: not ascending"]
        if (self.word_rows >= rows).any():
            return [f"word_rows.npy: names rows beyond the {rows} of the catalog"]
        return []

    def rows(self, word: str) -> npt.NDArray[np.uint32]:
        """Rows that hold a word, ascending, uint32 [n]."""
        name = np.uint64(_hash(word))
        at = int(np.searchsorted(self.words, name))
        if at == len(self.words) or self.words[at] != name:
            return self.word_rows[:0]
        return self.word_rows[self.word_starts[at] : self.word_starts[at + 1]]

    def counts(self, wanted: Sequence[str], rows: int) -> npt.NDArray[np.uint16]:
        """How many of some distinct words each row holds, uint16 [N]; linear in N and in the rows found."""
        counts = np.zeros(rows, dtype=np.uint16)
        for word in wanted:
            counts[self.rows(word)] += 1
        return counts


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
