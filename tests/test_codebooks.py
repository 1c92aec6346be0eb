"""Fitting codebooks: determinism, the capacity bound, duplicates, OPQ, small catalogs; and SID metrics by hand."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from onesearch.errors import ConfigError
from onesearch.quantizer import Capacity, Codebooks, NearestCentroid, ParentCodebooks, capacity_limit
from training.codebooks import CodebookConfig, balanced_codes, fit_codebooks, fit_opq
from training.sid_metrics import prefix_agreement, sid_report

CONFIG = CodebookConfig(sizes=(12, 8, 6, 16, 16), iterations=8)
DIM = 16


def clustered(count: int, seed: int, dim: int = DIM) -> np.ndarray:
    """Unit rows around thirty shared centres, so that the parents differ much in size."""
    centres = np.random.default_rng(99).standard_normal((30, dim))
    rng = np.random.default_rng(seed)
    rows = centres[(30 * rng.random(count) ** 2).astype(int)] + 0.3 * rng.standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def items() -> np.ndarray:
    rows = clustered(900, 1)
    rows[850:] = rows[:50]  # exact duplicates
    return rows


@pytest.fixture(scope="module")
def fitted(items: np.ndarray) -> tuple[Codebooks, np.ndarray]:
    return fit_codebooks(items, clustered(300, 2), CONFIG)


def test_equal_input_gives_equal_bytes_and_another_seed_does_not(
    items: np.ndarray, fitted: tuple[Codebooks, np.ndarray]
) -> None:
    stages: dict[str, tuple[int, int]] = {}
    books, codes = fit_codebooks(
        items, clustered(300, 2), CONFIG, lambda stage, done, total: stages.update({stage: (done, total)})
    )
    assert codes.tobytes() == fitted[1].tobytes() and codes.dtype == np.uint16 and codes.shape == (900, 5)
    for ours, theirs in zip((*books.rq, *books.opq), (*fitted[0].rq, *fitted[0].opq), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert stages == {"residual k-means": (3, 3), "optimised product quantisation": (8, 8)}
    assert fit_codebooks(items, clustered(300, 2), replace(CONFIG, seed=5))[1].tobytes() != codes.tobytes()


def test_training_items_encode_to_their_codes_except_where_balanced(
    items: np.ndarray, fitted: tuple[Codebooks, np.ndarray]
) -> None:
    books, codes = fitted
    assert (books.encode(items)[:, :2] == codes[:, :2]).all()
    plain, plain_codes = fit_codebooks(items, clustered(300, 2), replace(CONFIG, third="plain"))
    assert (plain.encode(items) == plain_codes).all()
    assert (plain_codes[:, 2] != codes[:, 2]).any()


def test_codes_are_local_and_unseen_embeddings_encode(fitted: tuple[Codebooks, np.ndarray]) -> None:
    books, codes = fitted
    unseen = books.encode(clustered(200, 3))
    for table in (codes, unseen):
        assert (table < np.array(CONFIG.sizes)).all()
    assert books.sizes == CONFIG.sizes
    assert [centroids.shape for centroids in books.rq] == [(12, DIM), (8, DIM), (6, DIM)]


def test_no_third_level_code_holds_more_than_its_share_of_a_parent(
    items: np.ndarray, fitted: tuple[Codebooks, np.ndarray]
) -> None:
    codes = fitted[1][:850]  # the distinct items
    plain = fit_codebooks(items, clustered(300, 2), replace(CONFIG, third="plain"))[1][:850]
    overfull = 0
    for parent in np.unique(codes[:, :2], axis=0):
        held = np.bincount(codes[(codes[:, :2] == parent).all(axis=1), 2])
        limit = capacity_limit(int(held.sum()), 6, CONFIG.slack)
        assert held.max() <= limit
        overfull += np.bincount(plain[(plain[:, :2] == parent).all(axis=1), 2]).max() > limit
    assert overfull > 5  # the bound costs nothing unless the plain assignment breaks it


def test_exact_duplicates_share_their_whole_identifier(fitted: tuple[Codebooks, np.ndarray]) -> None:
    assert (fitted[1][850:] == fitted[1][:50]).all()


def test_codebooks_of_parents_are_local_sparse_and_survive_the_file(items: np.ndarray, tmp_path: Path) -> None:
    books, codes = fit_codebooks(items, clustered(300, 2), replace(CONFIG, third="per_parent"))
    assert books.third is not None
    assert (codes < np.array(CONFIG.sizes)).all() and (books.encode(items) == codes).all()
    assert (codes[850:] == codes[:50]).all()
    counts = np.diff(books.third.starts)
    assert counts.max() <= CONFIG.sizes[2] and len(books.third.centroids) == counts.sum() < 12 * 8 * 6
    joint = books.encode(np.concatenate([items, clustered(300, 2)]))
    for parent, count in zip(books.third.parents.tolist(), counts.tolist(), strict=True):
        distinct = len(np.unique(joint[(joint[:, 0] * 8 + joint[:, 1]) == parent, 2]))
        assert distinct <= count  # a local codebook never emits a code of another parent
    plain = fit_codebooks(items, clustered(300, 2), replace(CONFIG, third="plain"))[0]
    left = [np.square(b.residual(items, b.encode(items)[:, :3])).sum() for b in (books, plain)]
    assert left[0] < left[1]
    books.save(tmp_path / "codebooks.npz")
    loaded = Codebooks.load(tmp_path / "codebooks.npz")
    unseen = clustered(200, 3)
    assert (loaded.encode(unseen) == books.encode(unseen)).all()
    assert (loaded.level_vectors(codes) == books.level_vectors(codes)).all()


def test_a_parent_never_seen_uses_the_shared_third_level(items: np.ndarray) -> None:
    books = fit_codebooks(items, clustered(300, 2), replace(CONFIG, third="per_parent"))[0]
    assert books.third is not None
    one = ParentCodebooks(
        books.third.parents[:1], books.third.starts[:2], books.third.centroids[: books.third.starts[1]]
    )
    unseen = clustered(200, 3)
    shared = Codebooks(books.rq, books.rotation, books.opq).encode(unseen)
    mixed = Codebooks(books.rq, books.rotation, books.opq, one).encode(unseen)
    elsewhere = shared[:, 0].astype(int) * 8 + shared[:, 1] != one.parents[0]
    assert elsewhere.any() and (mixed[elsewhere] == shared[elsewhere]).all()


def test_damaged_codebooks_of_parents_are_refused(items: np.ndarray) -> None:
    books = fit_codebooks(items, clustered(300, 2), replace(CONFIG, third="per_parent"))[0]
    third = books.third
    assert third is not None
    for wrong, message in (
        (ParentCodebooks(third.parents[::-1], third.starts, third.centroids), "parent_starts"),
        (ParentCodebooks(third.parents, third.starts[:-1], third.centroids), "parent_starts"),
        (ParentCodebooks(third.parents, third.starts, third.centroids[:-1]), "parent_centroids"),
    ):
        with pytest.raises(ConfigError, match=message):
            Codebooks(books.rq, books.rotation, books.opq, wrong)


def test_the_member_with_most_to_lose_keeps_its_nearest_code() -> None:
    centroids = np.array([[0, 0], [1, 0]], np.float32)
    rows = np.array([[0.4, 0], [0.0, 0], [0.3, 0], [0.4, 0]], np.float32)
    codes = balanced_codes(rows, np.array([0, 0, 1, 0]), centroids, slack=0.0)
    assert codes.tolist() == [1, 0, 0, 1]


def test_production_sizes_never_make_a_table_of_all_prefixes() -> None:
    sizes, rng = (4096, 1024, 512), np.random.default_rng(0)
    parents = rng.integers(0, sizes[0] * sizes[1], 2000) // 4096 * 4096
    tracemalloc.start()
    codes = balanced_codes(clustered(2000, 1), parents, clustered(512, 2), slack=0.1)
    table = np.stack([parents // sizes[1], parents % sizes[1], codes, codes, codes], axis=1).astype(np.uint16)
    capacity = Capacity.of(table, sizes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes.max() < sizes[2]  # local codes, not global numbers of (a, b, c)
    assert capacity.used(int(parents[0])).sum() == (parents == parents[0]).sum()
    assert peak < 64e6  # one byte a prefix would be 2.1 GB


def test_opq_turns_by_an_orthogonal_matrix_and_beats_plain_product_quantisation() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((DIM, DIM)) * np.linspace(2, 0.1, DIM)[:, None]
    residual = (rng.standard_normal((4000, DIM)) @ mixing).astype(np.float32)

    def distortion(rotation: np.ndarray, opq: tuple[np.ndarray, ...]) -> float:
        halves = np.split(residual.astype(np.float64) @ rotation, 2, axis=1)
        books = zip(opq, halves, strict=True)
        return float(sum(((half - book[NearestCentroid(book).nearest(half)]) ** 2).sum() for book, half in books))

    config = replace(CONFIG, iterations=20)
    rotation, opq = fit_opq(residual, (16, 16), config)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(DIM), atol=1e-5)
    plain = []
    for half in np.split(residual, 2, axis=1):
        kmeans = faiss.Kmeans(DIM // 2, 16, niter=40, seed=7, min_points_per_centroid=1)
        kmeans.train(half)
        plain.append(kmeans.centroids)
    assert distortion(rotation, opq) < 0.97 * distortion(np.eye(DIM), tuple(plain))


def test_a_catalog_smaller_than_its_codebooks_still_gets_identifiers() -> None:
    items = clustered(5, 1)
    books, codes = fit_codebooks(items, items[:0], CONFIG)
    assert books.sizes == CONFIG.sizes and len(np.unique(codes, axis=0)) == 5
    np.testing.assert_allclose(books.decode(codes), items, atol=0.05)
    assert fit_codebooks(items[:1], items[:1], CONFIG)[1].shape == (1, 5)


def test_ill_shaped_embeddings_and_settings_name_what_is_wrong(items: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="query embeddings: float64"):
        fit_codebooks(items, np.zeros((1, DIM)), CONFIG)
    with pytest.raises(ConfigError, match="even width"):
        fit_codebooks(items[:, :3].copy(), items[:1, :3].copy(), CONFIG)
    with pytest.raises(ConfigError, match="slack: -1"):
        replace(CONFIG, slack=-1)
    with pytest.raises(ConfigError, match="iterations: 0"):
        replace(CONFIG, iterations=0)


def test_sid_metrics_of_five_items_worked_out_by_hand() -> None:
    codes = np.array(
        [[0, 0, 0, 0, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 2, 1], [1, 1, 1, 2, 1]], np.uint16
    )
    report = sid_report(codes, (4, 2, 2, 3, 2), categories=["x", "x", "x", "y", "y"])
    assert report["cur_l1"] == {"rate": 2 / 4, "used": 2, "of": 4}
    assert report["cur_l1l2"] == {"rate": 3 / 8, "used": 3, "of": 8}
    assert report["cur_total"] == {"rate": 3 / 16, "used": 3, "of": 16}
    assert report["icr"] == 3 / 5 and report["icr_rq"] == 1 / 5
    assert report["collision_free"] == 4 / 5 and report["max_bucket"] == 2
    assert report["bucket_gini"] == pytest.approx(0.15)  # buckets 1, 1, 1, 2: Σ|x−y| / (2·n²·mean) = 6 / 40
    assert report["bucket_entropy"] == pytest.approx(-(3 * 0.2 * np.log(0.2) + 0.4 * np.log(0.4)))
    assert report["perplexity"][0] == pytest.approx(np.exp(-(0.6 * np.log(0.6) + 0.4 * np.log(0.4))))
    assert report["dead_codes"] == [2, 0, 0, 0, 0]
    assert report["category_nmi"][0] == pytest.approx(1.0)
    assert report["category_nmi"][1] == pytest.approx(2 * 0.6730116670 / (0.6730116670 + 1.0549201680))


def test_prefix_agreement_counts_equal_prefixes_not_equal_positions() -> None:
    queries = np.array([[1, 2, 3, 0, 0], [1, 2, 3, 0, 0], [1, 2, 3, 0, 0], [1, 2, 3, 0, 0]], np.uint16)
    items = np.array([[1, 2, 3, 4, 5], [1, 2, 0, 0, 0], [1, 0, 3, 0, 0], [0, 2, 3, 0, 0]], np.uint16)
    assert prefix_agreement(queries, items) == [3 / 4, 2 / 4, 1 / 4]
    assert sid_report(items, (2, 3, 4, 5, 6), (queries, items))["prefix_agreement"] == [0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="at least one"):
        sid_report(items[:0], (2, 3, 4, 5, 6))
