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
class Codebooks:
    """Frozen centroids. rq: three float32 [k, dim]; rotation: float32 [dim, dim], orthogonal; opq: two [k, dim/2].

    Raises ConfigError listing every fault of the arrays.
    """

    rq: tuple[Float32, ...]
    rotation: Float32
    opq: tuple[Float32, ...]

    def __post_init__(self) -> None:
        faults = _faults(self.rq, self.rotation, self.opq)
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
            if capacity is not None and level == RQ_LEVELS - 1:
                codes[:, level] = self._spill(residual, codes, capacity)
            residual = residual - self.rq[level][codes[:, level]]
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
            residual = residual - self.rq[level][codes[:, level]]
        return residual

    def decode(self, codes: Codes) -> Float32:
        """Codes [N, 5] → the embeddings they stand for, float32 [N, dim]."""
        halves = [centroids[codes[:, RQ_LEVELS + part]] for part, centroids in enumerate(self.opq)]
        decoded: Float32 = self.level_vectors(codes).sum(axis=1) + np.concatenate(halves, axis=1) @ self.rotation.T
        return decoded

    def level_vectors(self, codes: Codes) -> Float32:
        """Codes [N, 5] → the centroid of each RQ level, float32 [N, 3, dim] (history vectors, spec §3.6)."""
        return np.stack([centroids[codes[:, level]] for level, centroids in enumerate(self.rq)], axis=1)

    def save(self, path: Path) -> None:
        """Write one `.npz` atomically; equal codebooks give equal bytes."""
        save_arrays(path, {name: array for name, array in zip(_NAMES, self._arrays(), strict=True)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises BundleError listing every fault."""
        arrays = load_arrays(path, dict.fromkeys(_NAMES, ("float32", 2)))
        rq, rotation, opq = [arrays[n] for n in _NAMES[:3]], arrays["rotation"], [arrays[n] for n in _NAMES[4:]]
        faults = _faults(rq, rotation, opq)
        if faults:
            raise BundleError(str(path), faults)
        return cls(tuple(rq), rotation, tuple(opq))

    def _arrays(self) -> tuple[Float32, ...]:
        return (*self.rq, self.rotation, *self.opq)

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
        parents = codes[:, 0].astype(np.int64) * self.sizes[1] + codes[:, 1]
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


def _faults(rq: Sequence[Float32], rotation: Float32, opq: Sequence[Float32]) -> list[str]:
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
    return faults
