"""The readable NumPy version of every native kernel: the specification, and the oracle of the tests.

Slow on purpose and never a fallback. Legend: N rows given, L levels, S distinct SIDs, E_t edges of level t,
K beams, V codes of a level.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint16]
Bools = npt.NDArray[np.bool_]
Step = Callable[[Codes, npt.NDArray[np.int64]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Level:
    """Edges of one level in code order. Node n owns the edges first[n] … first[n + 1] - 1."""

    codes: Codes
    """[E_t]"""
    first: npt.NDArray[np.int64]
    """[E_{t-1} + 1]; the root is the only node of level 0"""


@dataclass(frozen=True)
class ReferenceTrie:
    """A trie as plain arrays."""

    sizes: tuple[int, ...]
    sids: Codes
    """[S, L], sorted"""
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class ReferenceResult:
    """Best SIDs first: codes [n, L], scores [n], leaf indices [n], beams kept on each level."""

    codes: Codes
    scores: npt.NDArray[np.float32]
    leaves: npt.NDArray[np.int64]
    beams: tuple[int, ...]


def build(codes: Codes, sizes: Sequence[int]) -> ReferenceTrie:
    """Sort, drop duplicates, and cut the sorted rows into prefixes: a prefix is new where the rows first differ."""
    sids = np.unique(codes, axis=0)
    changed = np.ones(sids.shape, dtype=bool)
    changed[1:] = np.logical_or.accumulate(sids[1:] != sids[:-1], axis=1)
    levels = []
    parent_new = np.zeros(len(sids), dtype=bool)
    parent_new[:1] = True  # the root
    for level in range(sids.shape[1]):
        new = changed[:, level]
        edge = np.cumsum(new) - 1
        first = np.append(edge[parent_new], new.sum()) if len(sids) else np.zeros(2 - min(level, 1))
        levels.append(Level(sids[new, level], first.astype(np.int64)))
        parent_new = new
    return ReferenceTrie(tuple(sizes), sids, tuple(levels))


def children(trie: ReferenceTrie, prefix: Sequence[int]) -> Codes:
    """Codes that may follow a prefix of t < L codes, ascending."""
    matches = (trie.sids[:, : len(prefix)] == np.asarray(prefix, dtype=np.int64)).all(axis=1)
    return np.unique(trie.sids[matches, len(prefix)])


def index(trie: ReferenceTrie, codes: Codes) -> npt.NDArray[np.int64]:
    """Leaf index of each SID of codes [M, L], -1 when absent."""
    equal = (trie.sids[None, :, :] == codes[:, None, :]).all(axis=2)
    return np.where(equal.any(axis=1), equal.argmax(axis=1) if len(trie.sids) else 0, -1)


def subset(trie: ReferenceTrie, mask: Bools) -> tuple[Bools, ...]:
    """Legal edges of every level: an edge is legal while a SID below it is. mask is [S]."""
    legal = [mask]
    for level in reversed(trie.levels[1:]):
        below = np.concatenate([[0], np.cumsum(legal[0])])
        legal.insert(0, below[level.first[1:]] > below[level.first[:-1]])
    return tuple(legal)


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Over the last axis, in double."""
    shifted: npt.NDArray[np.float64] = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def beam_search(
    step: Step, trie: ReferenceTrie, width: int, top_n: int, legal: bool, mask: Bools | None = None
) -> ReferenceResult:
    """The search of `onesearch.decode.beam_search`, one candidate at a time.

    It asks for logits of every beam, also where the native search knows that the answer cannot matter.
    """
    allowed = subset(trie, np.ones(len(trie.sids), dtype=bool) if mask is None else mask)
    nodes, scores = np.zeros(1 if allowed[-1].any() else 0, dtype=np.int64), np.zeros(1)
    codes, parents = np.empty((len(nodes), 0), dtype=np.uint16), np.zeros(len(nodes), dtype=np.int64)
    beams = []
    for t, level in enumerate(trie.levels):
        candidates: list[tuple[float, int, int, float]] = []  # (-float score, edge, parent, score)
        logits = step(codes, parents).astype(np.float64) if len(nodes) else np.empty((0, 0))
        for row, node in enumerate(nodes):
            edges = np.arange(level.first[node], level.first[node + 1])
            edges = edges[allowed[t][edges]]
            picked = level.codes[edges]
            logp = log_softmax(logits[row, picked]) if legal else log_softmax(logits[row])[picked]
            for edge, value in zip(edges, scores[row] + logp, strict=True):
                candidates.append((-float(np.float32(value)), int(edge), row, float(value)))
        best = sorted(candidates)[: top_n if t + 1 == len(trie.levels) else width]
        best.sort(key=lambda candidate: candidate[1])
        nodes = np.array([edge for _, edge, _, _ in best], dtype=np.int64)
        parents = np.array([row for _, _, row, _ in best], dtype=np.int64)
        scores = np.array([score for _, _, _, score in best])
        codes = np.concatenate([codes[parents], level.codes[nodes][:, None]], axis=1)
        beams.append(len(best))
    order = np.argsort(-scores[: len(nodes)].astype(np.float32), kind="stable")
    return ReferenceResult(codes[order], scores[order].astype(np.float32), nodes[order], tuple(beams))
