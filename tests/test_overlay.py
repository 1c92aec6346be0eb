"""A base trie with additions against a trie built of both, and masks that lose a few leaves."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import SCORES, Model

from onesearch.decode import BeamConfig, beam_search
from trie import Overlay, SidTrie


@st.composite
def split_catalogs(draw):
    """(overlay, trie of all its SIDs, leaf of each of the trie's SIDs in the overlay); either part may be empty."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    rows = draw(st.integers(0, 60))
    columns = [draw(hnp.arrays(np.uint16, rows, elements=st.integers(0, size - 1))) for size in sizes]
    whole = SidTrie.build(np.stack(columns, axis=1), sizes)
    late = draw(hnp.arrays(bool, whole.num_sids))
    sids = whole.sids()
    overlay = Overlay(SidTrie.build(sids[~late], sizes), SidTrie.build(sids[late], sizes))
    return overlay, whole, overlay.index(sids)


@given(split_catalogs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_an_overlay_answers_as_the_trie_of_all_its_sids(split, random):
    overlay, whole, leaves = split
    assert (overlay.num_sids, overlay.levels, overlay.sizes) == (whole.num_sids, whole.levels, whole.sizes)
    assert sorted(leaves.tolist()) == list(range(whole.num_sids))
    assert np.array_equal(overlay.sids()[leaves], whole.sids())
    asked = np.array([[random.randrange(size) for size in whole.sizes] for _ in range(10)], dtype=np.uint16)
    assert np.array_equal(overlay.contains(asked), whole.contains(asked))
    for row in asked[:4]:
        for t in range(whole.levels):
            found = overlay.children(row[:t])
            assert found.dtype == np.uint16
            assert np.array_equal(found, whole.children(row[:t]))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("grid", [0.0, 1.0])
@given(split=split_catalogs(), data=st.data())
@settings(max_examples=120, deadline=None)
def test_searches_equal_those_over_the_trie_of_all_sids(score, grid, split, data):
    overlay, whole, leaves = split
    legal = data.draw(st.none() | hnp.arrays(bool, whole.num_sids))
    width = data.draw(st.integers(1, 30))
    top_n = data.draw(st.integers(1, width))
    early_stop = data.draw(st.integers(0, 5))
    model = Model(whole.sizes, data.draw(st.integers(0, 99)), grid)
    whole_mask = overlay_mask = None
    if legal is not None:
        by_leaf = np.empty_like(legal)
        by_leaf[leaves] = legal
        whole_mask, overlay_mask = whole.subset(legal), overlay.subset(by_leaf)
        assert overlay_mask.num_legal == legal.sum()
    expected = beam_search(model, whole, BeamConfig(width, top_n, score), whole_mask)
    found = beam_search(model, overlay, BeamConfig(width, top_n, score, early_stop), overlay_mask)
    assert np.array_equal(found.codes, expected.codes)
    assert found.scores.tobytes() == expected.scores.tobytes()
    assert np.array_equal(found.leaves, leaves[expected.leaves])
    assert found.beams == expected.beams


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("added", [0, 40, 4000])
def test_wide_levels_with_additions_equal_the_trie_of_all_sids(score, masked, added):
    sizes, rng = (700, 90, 40, 33), np.random.default_rng(added)
    whole = SidTrie.build(np.stack([rng.integers(0, size, 30_000) for size in sizes], axis=1), sizes)
    late = np.zeros(whole.num_sids, dtype=bool)
    late[rng.permutation(whole.num_sids)[:added]] = True
    overlay = Overlay(SidTrie.build(whole.sids()[~late], sizes), SidTrie.build(whole.sids()[late], sizes))
    legal = rng.random(whole.num_sids) < (0.3 if masked else 2)
    by_leaf = legal[np.argsort(overlay.index(whole.sids()))]
    masks = (whole.subset(legal), overlay.subset(by_leaf)) if masked else (None, None)
    model = Model(sizes, grid=0.5)
    expected = beam_search(model, whole, BeamConfig(100, 60, score), masks[0])
    found = beam_search(model, overlay, BeamConfig(100, 60, score), masks[1])
    assert np.array_equal(found.codes, expected.codes)
    assert found.scores.tobytes() == expected.scores.tobytes()
    assert found.beams == expected.beams


@pytest.mark.parametrize("score", SCORES)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_a_sid_that_both_tries_hold_is_found_once_while_either_leaf_is_legal(score, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    rows = data.draw(st.integers(1, 40))
    columns = [data.draw(hnp.arrays(np.uint16, rows, elements=st.integers(0, size - 1))) for size in sizes]
    whole = SidTrie.build(np.stack(columns, axis=1), sizes)
    in_base, in_added = (data.draw(hnp.arrays(bool, whole.num_sids)) for _ in range(2))
    overlay = Overlay(*(SidTrie.build(whole.sids()[part], sizes) for part in (in_base, in_added)))
    by_leaf = data.draw(hnp.arrays(bool, overlay.num_sids))
    legal = np.zeros(whole.num_sids, dtype=bool)
    legal[np.r_[np.flatnonzero(in_base), np.flatnonzero(in_added)][by_leaf]] = True
    model, config = Model(sizes, data.draw(st.integers(0, 99)), 1.0), BeamConfig(30, 20, score)
    expected = beam_search(model, whole, config, whole.subset(legal))
    found = beam_search(model, overlay, config, overlay.subset(by_leaf))
    assert np.array_equal(found.codes, expected.codes)
    assert found.scores.tobytes() == expected.scores.tobytes()
    assert np.array_equal(overlay.sids()[found.leaves], found.codes)
    assert by_leaf[found.leaves].all()
    twins = (found.leaves >= overlay.base.num_sids) & overlay.base.contains(found.codes)
    assert not by_leaf[overlay.base.index(found.codes[twins])].any()


@given(split_catalogs(), st.data())
@settings(max_examples=60, deadline=None)
def test_masks_lose_leaves(split, data):
    overlay, whole, _ = split
    for trie in (whole, overlay):
        legal = data.draw(hnp.arrays(bool, trie.num_sids))
        gone = data.draw(st.lists(st.integers(0, trie.num_sids - 1), max_size=9)) if trie.num_sids else []
        gone = np.array(gone, dtype=np.int64)
        left = legal.copy()
        left[gone] = False
        everything = np.ones(trie.num_sids, dtype=bool)
        everything[gone] = False
        assert_same_edges(trie, trie.subset(legal).without(gone), trie.subset(left))
        np.testing.assert_array_equal(trie.subset(legal).without(gone).legal(), left)
        assert trie.all().legal().all()
        assert_same_edges(trie, trie.all().without(gone), trie.subset(everything))


def assert_same_edges(trie, one, other):
    """The widest search of equal scores walks every legal edge: as many on every level, and the same leaves."""
    assert one.num_legal == other.num_legal
    walks = []
    for mask in (one, other):
        beam = trie.beam(width=1000, top_n=1000, mask=mask)
        for size in trie.sizes:
            beam.advance(np.zeros((beam.rows, size), dtype=np.float32))
        walks.append((beam.kept, beam.results()[2].tolist()))
    assert walks[0] == walks[1]


def test_what_does_not_fit_together_is_a_value_error():
    base, added = SidTrie.build([[0, 1], [1, 1]], (2, 2)), SidTrie.build([[0, 0]], (2, 2))
    overlay = Overlay(base, added)
    with pytest.raises(ValueError, match=r"sizes \(2, 3\), expected the base's \(2, 2\)"):
        Overlay(base, SidTrie.build([[0, 0]], (2, 3)))
    for leaf in (-1, 3):
        with pytest.raises(ValueError, match="leaf index"):
            overlay.all().without(np.array([leaf]))
    for trie, mask in ((overlay, base.all()), (base, overlay.all()), (Overlay(added, base), overlay.all())):
        with pytest.raises(ValueError, match="mask belongs to"):
            trie.beam(width=1, top_n=1, mask=mask)
    with pytest.raises(ValueError, match=r"expected bool \(3,\)"):
        overlay.subset(np.ones(2, dtype=bool))
