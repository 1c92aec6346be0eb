"""Stage 1: fit the SID codebooks on queries and items together, and give every item its SID (spec §3.3-3.4).

Three k-means levels on residuals. The third comes in three forms: `plain` k-means; `balanced`, one shared codebook
assigned to items under a capacity inside each (a, b) parent, which lifts the share of items that own their SID; and
`per_parent`, a small codebook inside each parent. Then OPQ with two codes on what is left.
N points (items first, then queries), k codes of a level, dim width of the embeddings.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import faiss
import numpy as np
import numpy.typing as npt

from onesearch.errors import ConfigError
from onesearch.progress import StageProgress
from onesearch.quantizer import (
    Codebooks,
    Float32,
    Int64,
    NearestCentroid,
    ParentCodebooks,
    capacity_limit,
    nearest_of_parent,
)
from onesearch.sid import OPQ_CODES, RQ_LEVELS, Codes, SidSpec

_POINTS_PER_CENTROID = 10_000
_OPQ_POINTS = 200_000
_MEMBERS_PER_CODE = (
    4  # fewer members than that would own a code each and leave the OPQ nothing to code (spec §10 B16)
)

Third = Literal["plain", "balanced", "per_parent"]


@dataclass(frozen=True)
class CodebookConfig:
    """Codes per level, k-means iterations, the form of the third level and the slack of its balance."""

    sizes: tuple[int, ...] = (128, 64, 32, 64, 64)
    iterations: int = 25
    slack: float = 0.1
    third: Third = "balanced"
    seed: int = 0

    def __post_init__(self) -> None:
        SidSpec(self.sizes)
        if self.iterations < 1:
            raise ConfigError(f"codebooks iterations: {self.iterations}, expected at least 1")
        if self.third not in get_args(Third):
            raise ConfigError(f"codebooks third: {self.third!r}, expected one of {', '.join(get_args(Third))}")
        if self.slack < 0:
            raise ConfigError(f"codebooks slack: {self.slack}, expected 0 or more")


def fit_codebooks(
    item_embeddings: Float32,
    query_embeddings: Float32,
    config: CodebookConfig,
    progress: StageProgress = lambda stage, done, total: None,
) -> tuple[Codebooks, Codes]:
    """Fit on items [N_i, dim] and queries [N_q, dim]; returns the codebooks and the items' codes uint16 [N_i, 5].

    Items with equal embeddings get equal codes. Queries always take the nearest centroid: encode them with the
    codebooks. Raises ConfigError for arrays that do not fit together or are not finite.
    """
    points = _joined(item_embeddings, query_embeddings)
    items = len(item_embeddings)
    codes = np.empty((len(points), RQ_LEVELS), dtype=np.uint16)
    residual, levels, own = points, [], None
    for level in range(RQ_LEVELS):
        centroids = _kmeans(residual, config.sizes[level], config.iterations, config.seed + level)
        levels.append(centroids)
        codes[:, level] = NearestCentroid(centroids).nearest(residual)
        if level == RQ_LEVELS - 1:
            parents = codes[:, 0].astype(np.int64) * config.sizes[1] + codes[:, 1]
            if config.third == "balanced":
                codes[:items, level] = balanced_codes(residual[:items], parents[:items], centroids, config.slack)
            elif config.third == "per_parent":
                own = _parent_codebooks(residual, parents, config)
                codes[:, level] = nearest_of_parent(residual, parents, own, codes[:, level])
                centroids = own.centroids
        residual = residual - centroids[codes[:, level] if own is None else own.rows(parents, codes[:, level])]
        progress("residual k-means", level + 1, RQ_LEVELS)
    rotation, opq = fit_opq(residual, config.sizes[RQ_LEVELS:], config, progress)
    codebooks = Codebooks(tuple(levels), rotation, opq, own)
    return codebooks, np.concatenate([codes[:items], codebooks.opq_codes(residual[:items])], axis=1)


def _parent_codebooks(residual: Float32, parents: Int64, config: CodebookConfig) -> ParentCodebooks:
    """k-means inside every used (a, b) parent, one code for _MEMBERS_PER_CODE distinct members, at most k3 codes."""
    order = np.argsort(parents, kind="stable")
    ids, starts = np.unique(parents[order], return_index=True)
    books = []
    for group in np.split(order, starts[1:]):
        members = residual[group][_distinct_rows(residual[group])[0]]
        size = min(config.sizes[RQ_LEVELS - 1], -(-len(members) // _MEMBERS_PER_CODE))
        alone = size == 1
        books.append(
            members.mean(axis=0)[None] if alone else _kmeans(members, size, config.iterations, config.seed)
        )
    counts = np.asarray([len(book) for book in books], dtype=np.int64)
    return ParentCodebooks(ids, np.concatenate([[0], np.cumsum(counts)]), np.concatenate(books).astype(np.float32))


def balanced_codes(residual: Float32, parents: Int64, centroids: Float32, slack: float) -> npt.NDArray[np.uint16]:
    """Third-level codes of items under the capacity of their parent, uint16 [N].

    Equal rows of one parent are one member: they count once and share a code. Parents whose nearest codes fit
    are done at once; in the others the members that lose most by their second choice are placed first.
    """
    search = NearestCentroid(centroids)
    keys = np.concatenate([parents[:, None].view(np.float32), residual], axis=1)
    first, member = _distinct_rows(keys)
    rows, parents = residual[first], parents[first]
    codes = search.nearest(rows)
    order = np.argsort(parents, kind="stable")
    ids, starts, members = np.unique(parents[order], return_index=True, return_counts=True)
    cells, held = np.unique(parents * len(centroids) + codes, return_counts=True)
    limits = np.array([capacity_limit(int(n), len(centroids), slack) for n in members], dtype=np.int64)
    parent_of_cell = np.searchsorted(ids, cells // len(centroids))
    for parent in np.unique(parent_of_cell[held > limits[parent_of_cell]]):
        group = order[starts[parent] : starts[parent] + members[parent]]
        codes[group] = _place(search.distances(rows[group]), int(limits[parent]))
    return codes[member].astype(np.uint16)


def _place(distances: npt.NDArray[np.float64], limit: int) -> Int64:
    """Assign rows to columns, at most `limit` rows each, the row with the widest gap to its second choice first."""
    choices = np.argsort(distances, axis=1, kind="stable")
    nearest = np.take_along_axis(distances, choices[:, :2], axis=1)
    placed = np.empty(len(distances), dtype=np.int64)
    room = np.full(distances.shape[1], limit, dtype=np.int64)
    for row in np.argsort(nearest[:, 0] - nearest[:, -1], kind="stable"):
        column = choices[row, np.argmax(room[choices[row]] > 0)]
        placed[row] = column
        room[column] -= 1
    return placed


def fit_opq(
    residual: Float32,
    sizes: tuple[int, ...],
    config: CodebookConfig,
    progress: StageProgress = lambda stage, done, total: None,
) -> tuple[Float32, tuple[Float32, ...]]:
    """Rotation [dim, dim] and two codebooks [k, dim/2] that minimise the L2 error on residuals [N, dim].

    Starts from plain product quantisation and alternates the best rotation for fixed codes (orthogonal
    Procrustes) with one Lloyd step per half: no step raises the distortion (optimised product quantisation,
    Ge et al. 2013). L2, since a residual's length matters as much as its direction.
    """
    rng = np.random.default_rng(config.seed)
    sample = residual[np.sort(rng.permutation(len(residual))[:_OPQ_POINTS])].astype(np.float64)
    rotation = np.eye(residual.shape[1])
    halves = np.split(sample, OPQ_CODES, axis=1)
    books = [
        _kmeans(half.astype(np.float32), size, config.iterations, config.seed + RQ_LEVELS + part)
        for part, (half, size) in enumerate(zip(halves, sizes, strict=True))
    ]
    for iteration in range(config.iterations):
        codes = [NearestCentroid(book).nearest(half) for book, half in zip(books, halves, strict=True)]
        coded = np.concatenate([book[code] for book, code in zip(books, codes, strict=True)], axis=1)
        left, _, right = np.linalg.svd(sample.T @ coded)
        rotation = left @ right
        halves = np.split(sample @ rotation, OPQ_CODES, axis=1)
        books = [_means(half, code, book) for half, code, book in zip(halves, codes, books, strict=True)]
        progress("optimised product quantisation", iteration + 1, config.iterations)
    return rotation.astype(np.float32), tuple(books)


def _means(points: npt.NDArray[np.float64], codes: Int64, previous: Float32) -> Float32:
    """Mean of the points of each code; a code without points keeps its centroid."""
    order = np.argsort(codes, kind="stable")
    used, starts = np.unique(codes[order], return_index=True)
    counts = np.diff(starts, append=len(codes))
    means = previous.copy()
    means[used] = np.add.reduceat(points[order], starts, axis=0) / counts[:, None]
    return means


def _kmeans(points: Float32, size: int, iterations: int, seed: int) -> Float32:
    """Centroids float32 [size, dim]. With no more distinct points than codes, the points themselves."""
    distinct = points[_distinct_rows(points)[0]]
    if len(distinct) <= size:
        return _padded(distinct, size, seed)
    kmeans = faiss.Kmeans(
        points.shape[1],
        size,
        niter=iterations,
        seed=seed,
        max_points_per_centroid=_POINTS_PER_CENTROID,
        min_points_per_centroid=1,
    )
    kmeans.train(np.ascontiguousarray(points))
    return np.asarray(kmeans.centroids, dtype=np.float32).reshape(size, -1)


def _padded(points: Float32, size: int, seed: int) -> Float32:
    """Fill a codebook with slightly moved copies, so that all codes stay distinct and usable."""
    rng = np.random.default_rng(seed)
    copies = points[rng.integers(0, len(points), size - len(points))]
    noise = rng.standard_normal(copies.shape, dtype=np.float32) * np.float32(1e-3)
    return np.concatenate([points, copies + noise])


def _distinct_rows(rows: Float32) -> tuple[Int64, Int64]:
    """First position of each distinct row, in order of bytes, and the distinct row of every row."""
    packed = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]
    _, first, inverse = np.unique(packed, return_index=True, return_inverse=True)
    return first, inverse


def _joined(items: Float32, queries: Float32) -> Float32:
    for name, rows in (("item", items), ("query", queries)):
        if rows.ndim != 2 or rows.dtype != np.float32 or not np.isfinite(rows).all():
            raise ConfigError(f"{name} embeddings: {rows.dtype} {rows.shape}, expected finite float32 [N, dim]")
    if not len(items) or items.shape[1] != queries.shape[1] or items.shape[1] % 2:
        raise ConfigError(
            f"embeddings: {items.shape} items and {queries.shape} queries, expected items and one even width"
        )
    return np.concatenate([items, queries])
