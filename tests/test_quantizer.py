"""Frozen codebooks: nearest centroids, independence of the batch, spill-over of new items, and the file."""

from pathlib import Path

import numpy as np
import pytest

from onesearch.errors import BundleError, ConfigError
from onesearch.quantizer import Capacity, Codebooks, capacity_limit, pack_prefix

SIZES, DIM = (8, 6, 4, 5, 7), 10


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    rows = rng.standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def books() -> Codebooks:
    rng = np.random.default_rng(0)
    rq = tuple(unit(rng, size) / np.float32(1 + level) for level, size in enumerate(SIZES[:3]))
    rotation = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
    return Codebooks(rq, rotation, tuple(unit(rng, size)[:, : DIM // 2].copy() for size in SIZES[3:]))


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return unit(np.random.default_rng(1), 500)


def test_encode_takes_the_nearest_centroid_at_every_level(books: Codebooks, rows: np.ndarray) -> None:
    codes = books.encode(rows)
    assert codes.dtype == np.uint16 and codes.shape == (500, 5)
    assert books.sizes == SIZES == books.spec.sizes and books.dim == DIM
    for row, code in zip(rows[:50].astype(np.float64), codes, strict=False):
        for level in range(3):
            assert code[level] == ((row - books.rq[level]) ** 2).sum(axis=1).argmin()
            row = row - books.rq[level][code[level]]
        halves = np.split(row @ books.rotation, 2)
        for part in range(2):
            assert code[3 + part] == ((halves[part] - books.opq[part]) ** 2).sum(axis=1).argmin()


def test_a_row_alone_gives_the_codes_it_gets_in_a_batch(books: Codebooks, rows: np.ndarray) -> None:
    assert (np.concatenate([books.encode(row[None]) for row in rows]) == books.encode(rows)).all()
    assert books.encode(rows[:0]).shape == (0, 5)


def test_equal_centroids_give_the_lowest_code(books: Codebooks, rows: np.ndarray) -> None:
    doubled = Codebooks((np.concatenate([books.rq[0]] * 2), *books.rq[1:]), books.rotation, books.opq)
    assert (doubled.encode(rows) == books.encode(rows)).all()


def test_decode_adds_the_centroids_and_turns_the_rest_back(books: Codebooks, rows: np.ndarray) -> None:
    codes = books.encode(rows)
    levels = books.level_vectors(codes)
    assert levels.shape == (500, 3, DIM) and (levels[7, 2] == books.rq[2][codes[7, 2]]).all()
    left = books.residual(rows, codes[:, :3])
    np.testing.assert_allclose(rows - levels.sum(axis=1), left, atol=1e-6)
    turned = np.concatenate([books.opq[0][codes[:, 3]], books.opq[1][codes[:, 4]]], axis=1)
    np.testing.assert_allclose((books.decode(codes) - levels.sum(axis=1)) @ books.rotation, turned, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"), [(np.zeros((2, 3), np.float32), r"\[2, 3\]"), (np.zeros((2, DIM)), "64")]
)
def test_embeddings_of_another_shape_or_type_are_refused(
    books: Codebooks, wrong: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        books.encode(wrong)
    with pytest.raises(ValueError, match="not finite"):
        books.encode(np.full((1, DIM), np.nan, np.float32))


def test_new_items_spill_over_when_their_code_is_full(books: Codebooks, rows: np.ndarray) -> None:
    free = books.encode(rows)
    empty = Capacity.of(free[:0], SIZES)
    codes = books.encode(rows, empty)
    assert (codes[:, :2] == free[:, :2]).all() and (codes[:, 2] != free[:, 2]).any()
    parents, members = np.unique(codes[:, :2], axis=0, return_counts=True)
    for parent, count in zip(parents, members, strict=True):
        held = np.bincount(codes[(codes[:, :2] == parent).all(axis=1), 2])
        assert held.max() <= capacity_limit(int(count), SIZES[2], 0.1)
    first_of_parent = np.unique(free[:, :2], axis=0, return_index=True)[1]
    assert (codes[first_of_parent, 2] == free[first_of_parent, 2]).all()


def test_existing_items_take_up_room_and_equal_new_rows_share_a_code(books: Codebooks, rows: np.ndarray) -> None:
    row = rows[:1]
    nearest = books.encode(row)
    full = Capacity.of(np.concatenate([nearest, nearest]), SIZES)
    assert full.counts.tolist() == [1]
    assert full.used(int(nearest[0, 0]) * SIZES[1] + int(nearest[0, 1]))[nearest[0, 2]] == 1
    twins = books.encode(np.concatenate([row, row]), full)
    assert (twins[0] == twins[1]).all() and twins[0, 2] != nearest[0, 2]


@pytest.mark.parametrize(("members", "limit"), [(1, 1), (4, 1), (5, 2), (36, 9), (40, 11), (0, 0)])
def test_capacity_is_the_mean_rounded_up_plus_slack_rounded_down(members: int, limit: int) -> None:
    assert capacity_limit(members, 4, 0.1) == limit


def test_prefixes_pack_without_overflow_at_the_largest_sizes() -> None:
    codes = np.array([[65534, 65534, 65534, 0, 0]], np.uint16)
    assert pack_prefix(codes, (65535, 65535, 65535)).tolist() == [65535**3 - 1]


def test_save_and_load_gives_equal_bytes(books: Codebooks, rows: np.ndarray, tmp_path: Path) -> None:
    books.save(tmp_path / "a.npz")
    loaded = Codebooks.load(tmp_path / "a.npz")
    assert (loaded.encode(rows) == books.encode(rows)).all()
    loaded.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_a_damaged_file_is_refused_wherever_it_is_damaged(books: Codebooks, tmp_path: Path) -> None:
    path = tmp_path / "codebooks.npz"
    books.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(BundleError):
        Codebooks.load(path)
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            loaded = Codebooks.load(path)
        except BundleError:
            continue
        assert all((a == b).all() for a, b in zip(loaded.rq, books.rq, strict=True))  # a byte nobody reads


def test_every_fault_of_a_file_is_listed_at_once(books: Codebooks, tmp_path: Path) -> None:
    names = ("rq0", "rq1", "rq2", "rotation", "opq0", "opq1")
    arrays = dict(zip(names, (*books.rq, books.rotation, *books.opq), strict=True))
    path = tmp_path / "codebooks.npz"
    bad = arrays | {"rq0": arrays["rq0"].astype(np.float64), "rq1": arrays["rq1"] * np.nan, "extra": np.zeros(1)}
    del bad["opq1"]
    np.savez(path, **bad)
    with pytest.raises(BundleError) as raised:
        Codebooks.load(path)
    assert [fault.split("'")[1] for fault in raised.value.faults] == ["extra", "rq0", "rq1", "opq1"]
    np.savez(path, **(arrays | {"rotation": arrays["rotation"] * 2, "opq0": arrays["opq0"][:, :3]}))
    with pytest.raises(BundleError, match="not orthogonal") as raised:
        Codebooks.load(path)
    assert len(raised.value.faults) == 2


def test_a_pickled_archive_is_never_opened(books: Codebooks, tmp_path: Path) -> None:
    path = tmp_path / "codebooks.npz"
    np.savez(path, rq0=np.array([{}], dtype=object))
    with pytest.raises(BundleError, match="allow_pickle"):
        Codebooks.load(path)


def test_codebooks_that_do_not_fit_together_cannot_be_made(books: Codebooks) -> None:
    with pytest.raises(ConfigError, match="2 RQ levels"):
        Codebooks(books.rq[:2], books.rotation, books.opq)
