"""Stage 0: fit the text embedder that queries and items share.

Hashed n-grams → TF-IDF → truncated SVD, then, when clicks are known, a projection trained on clicked pairs and
a fine-tuning of the n-gram rows themselves, so that words that never occur in a title still find its items
(spec §3.1: L_q2i in-batch contrastive plus L_rank, the margin loss of show < click < order).
P pairs, N texts, C buckets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding_bag, normalize

from onesearch.embedder import Float32, HashedEmbedder, Int64, hash_features
from onesearch.errors import ConfigError
from onesearch.progress import StageProgress

Csr = Any  # scipy.sparse.csr_matrix, which has no type stubs

_TEXT_CHUNK = 4096
_POWER_ITERATIONS = 4
_OVERSAMPLING = 16


@dataclass(frozen=True)
class EmbedderConfig:
    """Sizes and training constants. `epochs` train the projection, `finetune_epochs` the n-gram rows."""

    buckets: int = 32768
    svd_dim: int = 128
    svd_texts: int = 50_000
    dim: int = 64
    epochs: int = 2
    finetune_epochs: int = 2
    batch: int = 512
    lr: float = 0.002
    temperature: float = 0.05
    margin: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("buckets", "svd_dim", "svd_texts", "dim", "batch", "lr", "temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"embedder {name}: {getattr(self, name)}, expected a positive number")
        if self.dim > self.svd_dim:
            raise ConfigError(f"embedder dim: {self.dim}, expected at most svd_dim = {self.svd_dim}")


@dataclass(frozen=True)
class ClickPairs:
    """Clicked (query, item) pairs as positions in the list of texts; three int64 arrays [P].

    `lower` is an item of the same result page one step down the funnel (shown below clicked, clicked below
    ordered), or -1 where none is known.
    """

    query: Int64
    item: Int64
    lower: Int64


def fit_embedder(
    texts: Sequence[str],
    pairs: ClickPairs | None,
    config: EmbedderConfig,
    progress: StageProgress = lambda stage, done, total: None,
) -> HashedEmbedder:
    """Fit on all texts (items and queries) and on clicked pairs. Equal input gives an equal embedder.

    Without pairs the vectors are the SVD's leading dimensions. Raises ConfigError when there are no texts.
    """
    if not texts:
        raise ConfigError("embedder texts: none, expected item titles and queries")
    tfidf, idf = _tfidf(texts, config.buckets, progress)
    rows = np.random.default_rng(config.seed).permutation(len(texts))[: config.svd_texts]
    basis = _right_singular_vectors(tfidf[np.sort(rows)], config, progress)
    if pairs is None or not len(pairs.query):
        matrix = basis[:, : config.dim]
    else:
        projected = _train_projection(tfidf, basis, pairs, config, progress)
        matrix = _finetune(tfidf, projected, pairs, config, progress)
    return HashedEmbedder(matrix * idf[:, None])


def _tfidf(texts: Sequence[str], buckets: int, progress: StageProgress) -> tuple[Csr, Float32]:
    """TF-IDF rows of length 1, CSR [N, C], and the idf of every bucket, float32 [C]."""
    parts = []
    for first in range(0, len(texts), _TEXT_CHUNK):
        chunk = texts[first : first + _TEXT_CHUNK]
        features = hash_features(chunk, buckets)
        coordinates = (features.weights, (features.rows, features.columns))
        parts.append(scipy.sparse.csr_matrix(coordinates, shape=(len(chunk), buckets), dtype=np.float32))
        progress("hash texts", min(first + _TEXT_CHUNK, len(texts)), len(texts))
    matrix = scipy.sparse.vstack(parts, format="csr")
    frequency = np.bincount(matrix.indices, minlength=buckets)
    idf = (np.log((1 + len(texts)) / (1 + frequency)) + 1).astype(np.float32)
    matrix.data *= idf[matrix.indices]
    row_of = np.repeat(np.arange(len(texts)), np.diff(matrix.indptr))
    norms = np.sqrt(np.bincount(row_of, weights=matrix.data**2, minlength=len(texts)))
    matrix.data /= norms[row_of].astype(np.float32)
    return matrix, idf


def _right_singular_vectors(matrix: Csr, config: EmbedderConfig, progress: StageProgress) -> Float32:
    """Leading right singular vectors, float32 [C, svd_dim], by randomised subspace iteration.

    Columns beyond the rank of the texts are zero.
    """
    width = min(config.svd_dim + _OVERSAMPLING, *matrix.shape)
    transposed = matrix.T.tocsr()
    basis = np.random.default_rng(config.seed).standard_normal((matrix.shape[1], width), dtype=np.float32)
    for iteration in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(transposed @ (matrix @ basis))
        progress("singular vectors", iteration + 1, _POWER_ITERATIONS)
    image = (matrix @ basis).astype(np.float64)
    values, rotation = np.linalg.eigh(image.T @ image)
    leading = np.argsort(-values)[: config.svd_dim]
    rotation = rotation[:, leading] * (values[leading] > 1e-9 * values.max())
    vectors = np.zeros((matrix.shape[1], config.svd_dim), dtype=np.float32)
    vectors[:, : len(leading)] = basis @ rotation.astype(np.float32)
    return vectors


def _train_projection(
    tfidf: Csr, basis: Float32, pairs: ClickPairs, config: EmbedderConfig, progress: StageProgress
) -> Float32:
    """Learn [svd_dim, dim] on fixed SVD vectors; returns the n-gram rows after projection, [C, dim]."""
    vectors = torch.from_numpy(tfidf @ basis)
    projection = torch.eye(config.svd_dim, config.dim).requires_grad_()

    def encode(ids: Int64) -> Tensor:
        return vectors[torch.from_numpy(ids)] @ projection

    _minimise(encode, projection, pairs, config, config.epochs, lambda *at: progress("train projection", *at))
    rows: Float32 = basis @ projection.detach().numpy()
    return rows


def _finetune(
    tfidf: Csr, rows: Float32, pairs: ClickPairs, config: EmbedderConfig, progress: StageProgress
) -> Float32:
    """Train the n-gram rows themselves, starting from the projected SVD."""
    matrix = torch.from_numpy(rows).requires_grad_()

    def encode(ids: Int64) -> Tensor:
        bags = tfidf[ids]
        return embedding_bag(
            torch.from_numpy(bags.indices.astype(np.int64)),
            matrix,
            torch.from_numpy(bags.indptr[:-1].astype(np.int64)),
            mode="sum",
            per_sample_weights=torch.from_numpy(bags.data),
        )

    _minimise(encode, matrix, pairs, config, config.finetune_epochs, lambda *at: progress("train n-grams", *at))
    return matrix.detach().numpy()


def _minimise(
    encode: Callable[[Int64], Tensor],
    parameter: Tensor,
    pairs: ClickPairs,
    config: EmbedderConfig,
    epochs: int,
    progress: Callable[[int, int], None],
) -> None:
    """Adam with a linearly falling rate over shuffled pairs."""
    rng = np.random.default_rng(config.seed)
    optimiser = torch.optim.Adam([parameter], lr=config.lr)
    starts = range(0, len(pairs.query), config.batch)
    total = epochs * len(starts)
    for step in range(total):
        if step % len(starts) == 0:
            order = rng.permutation(len(pairs.query))
        chosen = order[starts[step % len(starts)] :][: config.batch]
        optimiser.param_groups[0]["lr"] = config.lr * (1 - step / total)
        loss = _loss(encode, pairs, chosen, config)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        progress(step + 1, total)


def _loss(
    encode: Callable[[Int64], Tensor], pairs: ClickPairs, chosen: npt.NDArray[np.int64], config: EmbedderConfig
) -> Tensor:
    """In-batch contrastive loss plus the margin loss where a lower item is known."""
    query_ids, item_ids, lower_ids = pairs.query[chosen], pairs.item[chosen], pairs.lower[chosen]
    queries, items = normalize(encode(query_ids)), normalize(encode(item_ids))
    same = (query_ids[:, None] == query_ids) | (item_ids[:, None] == item_ids)
    np.fill_diagonal(same, False)  # another click of the same query, or on the same item, is no negative
    scores = (queries @ items.T / config.temperature).masked_fill(torch.from_numpy(same), -torch.inf)
    targets = torch.arange(len(chosen))
    loss = (cross_entropy(scores, targets) + cross_entropy(scores.T, targets)) / 2
    known = np.flatnonzero(lower_ids >= 0)
    if known.size:
        lower = normalize(encode(lower_ids[known]))
        margins = config.margin - (queries[known] * (items[known] - lower)).sum(dim=1)
        loss = loss + margins.relu().sum() / len(chosen)
    return loss
