"""The native trie against the NumPy reference and against brute force; the file against damage."""

import os
import threading
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trie as public
from trie import SidTrie, reference


@st.composite
def catalogs(draw, max_items=40):
    """(codes [N, L] uint16 with duplicates, sizes), L from 1 to 8, codebooks down to one code."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    rows = draw(st.integers(1, max_items))
    columns = [draw(hnp.arrays(np.uint16, rows, elements=st.integers(0, size - 1))) for size in sizes]
    return np.stack(columns, axis=1), sizes


def skewed(rows, sizes, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([(rng.random(rows) ** 2 * size).astype(np.uint16) for size in sizes], axis=1)


def test_public_names_are_importable():
    assert all(hasattr(public, name) for name in public.__all__)


@given(catalogs(), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_every_query_equals_the_reference(catalog, random):
    codes, sizes = catalog
    native, plain = SidTrie.build(codes, sizes), reference.build(codes, sizes)
    assert (native.num_sids, native.levels, native.sizes) == (len(plain.sids), len(sizes), tuple(sizes))
    assert native.sids().dtype == np.uint16
    assert np.array_equal(native.sids(), plain.sids)
    asked = np.array([[random.randrange(size) for size in sizes] for _ in range(12)], dtype=np.uint16)
    assert np.array_equal(native.index(asked), reference.index(plain, asked))
    assert np.array_equal(native.contains(asked), reference.index(plain, asked) >= 0)
    assert np.array_equal(native.index(plain.sids), np.arange(len(plain.sids)))
    for row in asked[:5]:
        for t in range(len(sizes)):
            found = native.children(row[:t].tolist())
            assert found.dtype == np.uint16
            assert np.array_equal(found, reference.children(plain, row[:t]))


@given(catalogs())
@settings(max_examples=30, deadline=None)
def test_the_order_of_rows_and_duplicates_do_not_change_a_single_byte(catalog):
    codes, sizes = catalog
    one = SidTrie.build(codes, sizes).native.image()
    other = SidTrie.build(np.concatenate([codes, codes])[::-1], sizes).native.image()
    assert np.array_equal(one, other)


@given(catalogs(), st.data())
@settings(max_examples=40, deadline=None)
def test_saved_tries_open_equal(tmp_path_factory, catalog, data):
    codes, sizes = catalog
    path = tmp_path_factory.getbasetemp() / "roundtrip.bin"
    native = SidTrie.build(codes, sizes)
    native.save(path)
    opened = SidTrie.open(str(path))
    assert opened.nbytes == path.stat().st_size == native.nbytes
    assert opened.sizes == native.sizes
    assert np.array_equal(opened.sids(), native.sids())


@pytest.mark.parametrize("sizes", [(4096, 1024, 512, 256, 256), (65536,) * 4, (65536,) * 8, (1, 65536, 2)])
def test_large_codebooks_take_the_wide_paths(sizes, tmp_path):
    codes = skewed(50_000, sizes)
    native = SidTrie.build(codes, sizes)
    distinct = np.unique(codes, axis=0)
    assert np.array_equal(native.sids(), distinct)
    assert np.array_equal(native.index(distinct), np.arange(len(distinct)))
    native.save(tmp_path / "trie.bin")
    assert np.array_equal(SidTrie.open(tmp_path / "trie.bin").sids(), distinct)


def test_nodes_with_every_child_need_narrow_blocks():
    codes = np.stack(np.meshgrid(np.arange(70), np.arange(2000)), axis=-1).reshape(-1, 2)
    native = SidTrie.build(codes, (70, 2000))
    assert native.num_sids == 140_000
    assert np.array_equal(native.children([69]), np.arange(2000))


def test_an_empty_catalog_is_a_trie_without_sids(tmp_path):
    native = SidTrie.build(np.empty((0, 3), dtype=np.uint16), (4, 5, 6))
    native.save(tmp_path / "empty.bin")
    for each in (native, SidTrie.open(tmp_path / "empty.bin")):
        assert each.num_sids == 0
        assert each.children([]).tolist() == []
        assert each.contains([[0, 0, 0]]).tolist() == [False]
        assert each.sids().shape == (0, 3)
        assert each.subset(np.empty(0, dtype=bool)).num_legal == 0


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint64, np.uint16])
def test_any_integer_type_is_accepted(dtype):
    codes = np.array([[1, 2], [0, 3]], dtype=dtype)
    assert SidTrie.build(codes, (2, 4)).contains(codes).all()


def test_non_contiguous_codes_are_accepted():
    codes = skewed(100, (9, 9, 9, 9))
    assert np.array_equal(SidTrie.build(codes[::2, ::2], (9, 9)).sids(), np.unique(codes[::2, ::2], axis=0))


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (np.array([[0, 1], [1, 4]], np.uint16), (2, 4), r"codes\[1, 1\] is 4, expected 0\.\.3"),
        (np.array([[0, 1], [-1, 0]]), (2, 4), r"codes\[1, 0\] is -1, expected 0\.\.1"),
        (np.array([[70000, 1]]), (2, 4), r"codes\[0, 0\] is 70000"),
        (np.array([[2**63 + 1, 1]], np.uint64), (2, 4), r"codes\[0, 0\] is 9223372036854775809"),
        (np.array([[0.0, 1.0]]), (2, 4), "float64, expected integers"),
        (np.array([0, 1]), (2, 4), "1 dimensions, expected 2"),
        (np.array([[0, 1]]), (2.5, 4), "sizes is float64, expected integers"),
        (np.array([[0, 1]]), "24", "sizes is .*, expected integers"),
        (np.array([[0, 1]]), 2, "sizes has 0 dimensions, expected 1"),
        (np.zeros((1, 3), np.uint16), (2, 4), "3 columns, sizes has 2"),
        (np.zeros((1, 3), np.int64), (2, 4), "3 columns, sizes has 2"),
        (np.zeros((1, 0), np.uint16), (), r"0 levels, expected 1\.\.8"),
        (np.zeros((1, 9), np.uint16), (2,) * 9, r"9 levels, expected 1\.\.8"),
        (np.zeros((1, 2), np.uint16), (2, 0), r"sizes\[1\] is 0"),
        (np.zeros((1, 2), np.uint16), (2, 65537), r"sizes\[1\] is 65537"),
        (np.zeros((1, 2), np.uint16), (2, -1), r"sizes\[1\] is -1"),
    ],
)
def test_bad_builds_are_value_errors_that_say_where(codes, sizes, message):
    with pytest.raises(ValueError, match=message):
        SidTrie.build(codes, sizes)


def test_bad_queries_are_value_errors():
    native = SidTrie.build([[0, 1]], (2, 2))
    for call in (
        lambda: native.contains([[0, 1, 1]]),
        lambda: native.contains([0, 1]),
        lambda: native.contains([["a", "b"]]),
        lambda: native.children([0, 1]),
        lambda: native.children([0.5]),
        lambda: native.subset(np.ones(2, dtype=bool)),
        lambda: native.subset(np.ones(1, dtype=np.int64)),
        lambda: native.beam(width=1, top_n=2),
        lambda: native.beam(width=0, top_n=0),
    ):
        with pytest.raises(ValueError):
            call()


def test_codes_outside_their_codebook_are_absent_not_errors():
    native = SidTrie.build([[0, 1]], (2, 2))
    assert native.contains([[0, 1], [0, 65537], [-65536, 1], [2, 1]]).tolist() == [True, False, False, False]
    assert native.children([70000]).tolist() == native.children([-1]).tolist() == []


@given(catalogs(), st.data())
@settings(max_examples=40, deadline=None)
def test_masks_keep_exactly_the_edges_above_legal_sids(catalog, data):
    codes, sizes = catalog
    native = SidTrie.build(codes, sizes)
    mask = data.draw(hnp.arrays(bool, native.num_sids))
    subset = native.subset(mask)
    assert subset.num_legal == mask.sum()
    # A wide uniform search walks every legal edge and nothing else.
    beam = native.beam(width=1000, top_n=1000, mask=subset)
    for t, legal in enumerate(reference.subset(reference.build(codes, sizes), mask)):
        beam.advance(np.zeros((beam.rows, sizes[t]), dtype=np.float32))
        assert beam.kept[-1] == legal.sum()
    assert sorted(beam.results()[2].tolist()) == np.flatnonzero(mask).tolist()


def test_a_mask_belongs_to_its_own_trie():
    one, other = SidTrie.build([[0, 1]], (2, 2)), SidTrie.build([[0, 1]], (2, 2))
    with pytest.raises(ValueError, match="another trie"):
        one.beam(width=1, top_n=1, mask=other.subset(np.ones(1, dtype=bool)))


def test_many_threads_read_one_trie_alike(tmp_path):
    sizes = (64, 32, 16)
    codes = skewed(20_000, sizes)
    SidTrie.build(codes, sizes).save(tmp_path / "trie.bin")
    shared = SidTrie.open(tmp_path / "trie.bin")
    expected, wrong = shared.index(codes), []

    def read():
        for _ in range(20):
            if not np.array_equal(shared.index(codes), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the file ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> tuple[Path, bytes]:
    path = tmp_path / "trie.bin"
    SidTrie.build(skewed(60, (16, 8, 4)), (16, 8, 4)).save(path)
    return path, path.read_bytes()


def expect_refusal(path: Path, content: bytes, message: str = "") -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
        SidTrie.open(path)


def test_every_flipped_byte_is_refused(saved):
    path, good = saved
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 0x10
        expect_refusal(path, bytes(bad))


def test_every_truncation_and_every_extension_is_refused(saved):
    path, good = saved
    for length in range(len(good)):
        expect_refusal(path, good[:length])
    for extra in (1, 7, 64, 4096):
        expect_refusal(path, good + b"\0" * extra, "bytes")


@pytest.mark.parametrize("foreign", [b"", b"PK\x03\x04", b"\x93NUMPY" + b"\0" * 500, b"\xff" * 5000, b"\0" * 5000])
def test_foreign_files_are_refused(tmp_path, foreign):
    expect_refusal(tmp_path / "other.bin", foreign)


def resealed(content: bytearray) -> bytes:
    """The content with a right checksum: what a forger, not an accident, would write."""
    words = np.frombuffer(bytes(content[16:]) + b"\0" * (-(len(content) - 16) % 64), dtype=np.uint64).reshape(
        -1, 8
    )
    if (len(content) - 16) % 64 == 0:
        words = np.concatenate([words, np.zeros((1, 8), np.uint64)])
    lane = np.arange(8, dtype=np.uint64)
    odd, low = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFFFFFFFF)
    total = np.zeros(8, np.uint64)
    for i, word in enumerate(words):
        mixed = word ^ ((lane + np.uint64(1)) * np.uint64(0xC2B2AE3D27D4EB4F))
        total += (mixed & low) * (mixed >> np.uint64(32)) + word[[1, 0, 3, 2, 5, 4, 7, 6]]
        if i == len(words) - 1 or i % 16 == 15:
            total = (total ^ (total >> np.uint64(47))) * odd
    mask, value = 2**64 - 1, (len(content) - 16) * int(odd) % 2**64
    for each in total.tolist():
        value ^= each
        value = ((value << 29 | value >> 35) & mask) * int(odd) & mask
    content[8:16] = (value ^ value >> 32).to_bytes(8, "little")
    return bytes(content)


def test_a_resealed_file_without_changes_opens(saved):
    path, good = saved
    assert resealed(bytearray(good)) == good
    assert SidTrie.open(path).levels == 3


@pytest.mark.parametrize("position", [16, 20, 24, 32, 40, 44, 60, 64, 72, 76])
@pytest.mark.parametrize("value", [0, 2, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_forged_header_is_refused_although_its_checksum_is_right(saved, position, value):
    path, good = saved
    bad = bytearray(good)
    bad[position : position + 4] = value.to_bytes(4, "little")
    expect_refusal(path, resealed(bad))


def test_forged_sections_never_crash(saved):
    path, good = saved
    refused = 0
    for position in range(192, len(good), 2):
        bad = bytearray(good)
        bad[position : position + 2] = b"\xff\xff"
        path.write_bytes(resealed(bad))
        try:
            opened = SidTrie.open(path)
        except ValueError:
            refused += 1
        else:  # padding: nothing reads it
            assert len(opened.sids()) == opened.num_sids
    assert refused > 100


def test_save_replaces_a_file_whole_and_leaves_no_litter(saved):
    path, _ = saved
    path.write_bytes(b"old")
    path.chmod(0o600)
    opened_before = SidTrie.build([[1, 2]], (4, 4))
    opened_before.save(path)
    assert SidTrie.open(path).sids().tolist() == [[1, 2]]
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    with pytest.raises(OSError):
        opened_before.save(path.parent / "missing" / "trie.bin")


def test_an_open_trie_survives_the_replacement_of_its_file(saved):
    path, _ = saved
    opened = SidTrie.open(path)
    before = opened.sids()
    SidTrie.build([[1, 2]], (4, 4)).save(path)
    os.sync()
    assert np.array_equal(opened.sids(), before)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        SidTrie.open(tmp_path / "missing.bin")
