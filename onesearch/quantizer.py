"""Embedding to SID and back with frozen codebooks: three residual k-means levels, then two OPQ codes (spec §3.3-3.4).

Applies codebooks; fitting them is training's. N rows, k codes of a level, dim width of the embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from onesearch.arrays import load_arrays, save_arrays
from onesearch.errors import BundleError, ConfigError
from onesearch.sid import OPQ_CODES, RQ_LEVELS, Codes, SidSpec

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]

_BLOCK = 1 << 22  # distances held at once


@dataclass(frozen=True)
class Capacity:
    """Room left in the balanced third level: at most `limit` items for each code of one (a, b) parent.

    Sparse: `cells` are the used (a, b, c) packed as (a·k2 + b)·k3 + c, sorted; `counts` their items.
    """

    sizes: tuple[int, ...]
    slack: float
    cells: Int64
    counts: Int64

    @classmethod
    def of(cls, item_codes: Codes, sizes: Sequence[int], slack: float = 0.1) -> Self:
        """Occupancy by the distinct SIDs among item codes [N, 5]: exact duplicates take one place together."""
        distinct = np.unique(item_codes, axis=0).astype(np.int64)
        cells, counts = np.unique(pack_prefix(distinct, sizes), return_counts=True)
        return cls(tuple(sizes), slack, cells, counts)

    def used(self, parent: int) -> Int64:
        """Items under each code of the parent a·k2 + b, int64 [k3]."""
        size = self.sizes[RQ_LEVELS - 1]
        low, high = np.searchsorted(self.cells, [parent * size, (parent + 1) * size])
        used = np.zeros(size, dtype=np.int64)
        used[self.cells[low:high] - parent * size] = self.counts[low:high]
        return used


def capacity_limit(members: int, size: int, slack: float) -> int:
    """Most items one code may hold in a parent of `members`: ⌈members/size⌉·(1 + slack) rounded down (spec §3.3)."""
    return int(-(-members // size) * (1 + slack) + 1e-9)


def pack_prefix(codes: npt.NDArray[Any], sizes: Sequence[int]) -> Int64:
    """Codes [N, ≥ 3] → (a·k2 + b)·k3 + c, int64 [N]."""
    a, b, c = (codes[:, level].astype(np.int64) for level in range(RQ_LEVELS))
    return (a * sizes[1] + b) * sizes[2] + c


@dataclass(frozen=True, eq=False)
class ParentCodebooks:
    """Third-level centroids of each (a, b) parent of its own (spec §3.3): P used parents, C centroids in all.

    parents: int64 [P], a·k2 + b, ascending. starts: int64 [P + 1]; parent p owns centroids starts[p] … starts[p + 1],
    whose local numbers are the codes. centroids: float32 [C, dim]. Sparse: nothing is kept for unused parents.
    """

    parents: Int64
    starts: Int64
    centroids: Float32

    def rows(self, parents: Int64, codes: npt.NDArray[np.uint16]) -> Int64:
        """Row in `centroids` of each (parent, local code), int64 [N]; -1 where the parent has no such code."""
        at = np.minimum(np.searchsorted(self.parents, parents), len(self.parents) - 1)
        rows = self.starts[at] + codes
        known = (self.parents[at] == parents) & (rows < self.starts[at + 1])
        return np.where(known, rows, -1)

    def faults(self, dim: int, size: int) -> list[str]:
        """What is wrong with the arrays for vectors of width `dim` and a third level of `size` codes."""
        counts = np.diff(self.starts)
        fits = len(self.starts) == len(self.parents) + 1 and self.starts[0] == 0
        if (
            not fits
            or counts.min(initial=1) < 1
            or counts.max(initial=1) > size
            or (np.diff(self.parents) < 1).any()
        ):
            return [f"parent_starts: do not give each of {len(self.parents)} parents 1..{size} centroids"]
        if self.centroids.shape != (self.starts[-1], dim):
            return [f"parent_centroids: shape {self.centroids.shape}, expected {(int(self.starts[-1]), dim)}"]
        return []


@dataclass(frozen=True, eq=False)
class Codebooks:
    """Frozen centroids. rq: three float32 [k, dim]; rotation: float32 [dim, dim], orthogonal; opq: two [k, dim/2].

    third: codebooks of the third level for each parent of its own; parents it does not know use rq[2].
    Raises ConfigError listing every fault of the arrays.
    """

    rq: tuple[Float32, ...]
    rotation: Float32
    opq: tuple[Float32, ...]
    third: ParentCodebooks | None = None

    def __post_init__(self) -> None:
        faults = _faults(self.rq, self.rotation, self.opq, self.third)
        if faults:
            raise ConfigError("codebooks: " + "; ".join(faults))

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return int(self.rotation.shape[0])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level, five ints."""
        return tuple(len(centroids) for centroids in (*self.rq, *self.opq))

    @property
    def spec(self) -> SidSpec:
        """The SID grammar these codebooks write."""
        return SidSpec(self.sizes)

    def encode(self, embeddings: Float32, capacity: Capacity | None = None) -> Codes:
        """Embeddings [N, dim] → codes uint16 [N, 5]: nearest centroid level by level, ties to the lowest code.

        With `capacity`, rows are new items: each takes the nearest third-level code of its parent with room, in
        row order, and equal rows share a code. Raises ValueError for a wrong shape or values that are not finite.
        """
        residual = self._checked(embeddings)
        codes = np.empty((len(residual), RQ_LEVELS + OPQ_CODES), dtype=np.uint16)
        for level, search in enumerate(self._rq_search):
            codes[:, level] = search.nearest(residual)
            if level == RQ_LEVELS - 1:
                codes[:, level] = self._third_codes(residual, codes, capacity)
            residual = residual - self._centroids(codes, level)
        codes[:, RQ_LEVELS:] = self.opq_codes(residual)
        return codes

    def opq_codes(self, residual: Float32) -> Codes:
        """The two OPQ codes, uint16 [N, 2], of what three RQ levels leave, float32 [N, dim]."""
        turned = residual.astype(np.float64) @ self.rotation
        halves = np.split(turned, OPQ_CODES, axis=1)
        parts = [search.nearest(half) for search, half in zip(self._opq_search, halves, strict=True)]
        return np.stack(parts, axis=1).astype(np.uint16)

    def residual(self, embeddings: Float32, codes: Codes) -> Float32:
        """What the first codes of each row, [N, t] with t ≤ 3, leave of the embeddings, float32 [N, dim]."""
        residual = embeddings
        for level in range(codes.shape[1]):
            residual = residual - self._centroids(codes, level)
        return residual

    def decode(self, codes: Codes) -> Float32:
        """Codes [N, 5] → the embeddings they stand for, float32 [N, dim]."""
        halves = [centroids[codes[:, RQ_LEVELS + part]] for part, centroids in enumerate(self.opq)]
        decoded: Float32 = self.level_vectors(codes).sum(axis=1) + np.concatenate(halves, axis=1) @ self.rotation.T
        return decoded

    def level_vectors(self, codes: Codes) -> Float32:
        """Codes [N, 5] → the centroid of each RQ level, float32 [N, 3, dim] (history vectors, spec §3.6)."""
        return np.stack([self._centroids(codes, level) for level in range(RQ_LEVELS)], axis=1)

    def save(self, path: Path) -> None:
        """Write one `.npz` atomically; equal codebooks give equal bytes."""
        save_arrays(path, self._arrays())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises BundleError listing every fault."""
        arrays = load_arrays(path, dict.fromkeys(_NAMES, ("float32", 2)), _PARENT_ARRAYS)
        rq, rotation, opq = [arrays[n] for n in _NAMES[:3]], arrays["rotation"], [arrays[n] for n in _NAMES[4:]]
        own = [arrays[name] for name in _PARENT_ARRAYS if name in arrays]
        third = ParentCodebooks(*own) if own else None
        faults = _faults(rq, rotation, opq, third)
        if faults:
            raise BundleError(str(path), faults)
        return cls(tuple(rq), rotation, tuple(opq), third)

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        shared = dict(zip(_NAMES, (*self.rq, self.rotation, *self.opq), strict=True))
        if self.third is None:
            return shared
        own = (self.third.parents, self.third.starts, self.third.centroids)
        return shared | dict(zip(_PARENT_ARRAYS, own, strict=True))

    def _centroids(self, codes: npt.NDArray[Any], level: int) -> Float32:
        """Centroid of one RQ level for codes [N, > level], float32 [N, dim]."""
        vectors: Float32 = self.rq[level][codes[:, level]]
        if self.third is not None and level == RQ_LEVELS - 1:
            rows = self.third.rows(self._parents(codes), codes[:, level])
            vectors[rows >= 0] = self.third.centroids[rows[rows >= 0]]
        return vectors

    def _parents(self, codes: npt.NDArray[Any]) -> Int64:
        return np.asarray(codes[:, 0].astype(np.int64) * len(self.rq[1]) + codes[:, 1])

    def _third_codes(self, residual: Float32, codes: Codes, capacity: Capacity | None) -> npt.NDArray[np.uint16]:
        """Third-level codes uint16 [N] of what two levels leave; `codes` already holds the nearest shared ones."""
        if self.third is not None:
            return nearest_of_parent(residual, self._parents(codes), self.third, codes[:, RQ_LEVELS - 1])
        return codes[:, RQ_LEVELS - 1] if capacity is None else self._spill(residual, codes, capacity)

    @cached_property
    def _rq_search(self) -> tuple["NearestCentroid", ...]:
        return tuple(NearestCentroid(centroids) for centroids in self.rq)

    @cached_property
    def _opq_search(self) -> tuple["NearestCentroid", ...]:
        return tuple(NearestCentroid(centroids) for centroids in self.opq)

    def _checked(self, embeddings: Float32) -> Float32:
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim or embeddings.dtype != np.float32:
            shape = f"{embeddings.dtype} {list(embeddings.shape)}"
            raise ValueError(f"embeddings: {shape}, expected float32 [N, {self.dim}]")
        if not np.isfinite(embeddings).all():
            raise ValueError("embeddings: hold values that are not finite")
        return embeddings

    def _spill(self, residual: Float32, codes: Codes, capacity: Capacity) -> npt.NDArray[np.uint16]:
        """Third-level codes of new items under a capacity; a parent whose codes are all full takes the nearest."""
        parents = self._parents(codes)
        search, chosen = self._rq_search[RQ_LEVELS - 1], codes[:, RQ_LEVELS - 1].copy()
        used: dict[int, Int64] = {}
        seen: dict[tuple[int, bytes], int] = {}
        for row, parent in enumerate(parents.tolist()):
            key = (parent, residual[row].tobytes())
            if key not in seen:
                counts = used.setdefault(parent, capacity.used(parent))
                limit = capacity_limit(int(counts.sum()) + 1, len(counts), capacity.slack)
                order = np.argsort(search.distances(residual[row : row + 1])[0], kind="stable")
                free = order[counts[order] < limit]
                seen[key] = int(free[0] if free.size else order[0])
                counts[seen[key]] += 1
            chosen[row] = seen[key]
        return chosen


def nearest_of_parent(
    residual: Float32, parents: Int64, third: ParentCodebooks, otherwise: npt.NDArray[np.uint16]
) -> npt.NDArray[np.uint16]:
    """Nearest local code of each row in its parent's own codebook, uint16 [N]; `otherwise` where it has none."""
    chosen = otherwise.copy()
    order = np.argsort(parents, kind="stable")
    ids, starts = np.unique(parents[order], return_index=True)
    at = np.minimum(np.searchsorted(third.parents, ids), len(third.parents) - 1)
    for group, own, known in zip(np.split(order, starts[1:]), at, third.parents[at] == ids, strict=True):
        if known:
            centroids = third.centroids[third.starts[own] : third.starts[own + 1]]
            chosen[group] = NearestCentroid(centroids).nearest(residual[group])
    return chosen


class NearestCentroid:
    """Exact nearest neighbour in float64, so that the answer does not depend on the batch a row comes in."""

    def __init__(self, centroids: Float32) -> None:
        self._centroids = np.ascontiguousarray(centroids.T, dtype=np.float64)
        self._half_norms = (self._centroids**2).sum(axis=0) / 2

    def distances(self, rows: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """Half the squared distance, less the part that depends on the row alone, [N, k]."""
        distances: npt.NDArray[np.float64] = self._half_norms - rows.astype(np.float64) @ self._centroids
        return distances

    def nearest(self, rows: npt.NDArray[np.floating[Any]]) -> Int64:
        """Index of the nearest centroid, int64 [N]; ties to the lowest."""
        step = max(1, _BLOCK // len(self._half_norms))
        parts = [self.distances(rows[i : i + step]).argmin(axis=1) for i in range(0, len(rows), step)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


_NAMES = ("rq0", "rq1", "rq2", "rotation", "opq0", "opq1")
_PARENT_ARRAYS = {"parents": ("int64", 1), "parent_starts": ("int64", 1), "parent_centroids": ("float32", 2)}


def _faults(
    rq: Sequence[Float32], rotation: Float32, opq: Sequence[Float32], third: ParentCodebooks | None = None
) -> list[str]:
    dim = rotation.shape[0]
    faults = []
    if (len(rq), len(opq)) != (RQ_LEVELS, OPQ_CODES):
        faults.append(f"{len(rq)} RQ levels and {len(opq)} OPQ codes, expected {RQ_LEVELS} and {OPQ_CODES}")
    if rotation.shape != (dim, dim) or dim % 2:
        faults.append(f"rotation: shape {rotation.shape}, expected square with an even width")
    elif not np.allclose(rotation.T.astype(np.float64) @ rotation, np.eye(dim), atol=1e-4):
        faults.append("rotation: not orthogonal")
    widths = [dim] * len(rq) + [dim // 2] * len(opq)
    names = [name for name in _NAMES if name != "rotation"]
    for name, centroids, width in zip(names, (*rq, *opq), widths, strict=False):
        if centroids.ndim != 2 or centroids.shape[1] != width or not 1 <= len(centroids) <= 65535:
            faults.append(f"{name}: shape {centroids.shape}, expected [1..65535, {width}]")
        if centroids.dtype != np.float32 or not np.isfinite(centroids).all():
            faults.append(f"{name}: {centroids.dtype}, expected finite float32")
    return faults + (third.faults(dim, len(rq[-1])) if third and not faults else [])
