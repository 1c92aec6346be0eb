"""The decode loop against brute force over all legal SIDs, and against the NumPy beam search when beams are pruned."""

import threading
import zlib

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onesearch.decode import BeamConfig, BeamResult, beam_search
from onesearch.errors import ConfigError, DecodeError
from trie import SidTrie, reference

SCORES = ("level", "legal")


class Model:
    """Logits that depend on the prefix alone. `grid` > 0 rounds them, so that many scores tie exactly."""

    def __init__(self, sizes, seed=0, grid=0.0, spread=2.0):
        self.sizes, self.seed, self.grid, self.spread = sizes, seed, grid, spread
        self.calls = []

    def row(self, prefix):
        seed = zlib.crc32(np.asarray(prefix, dtype=np.uint16).tobytes(), self.seed + 31 * len(prefix)) % 9973
        logits = np.sin(np.arange(1, self.sizes[len(prefix)] + 1) * (seed + 0.5)) * self.spread
        return (np.round(logits / self.grid) * self.grid if self.grid else logits).astype(np.float32)

    def __call__(self, codes, parents):
        assert codes.dtype == np.uint16
        assert parents.dtype == np.int64
        self.calls.append((codes, parents))
        return np.stack([self.row(prefix) for prefix in codes])


def brute_force(model, sids, sizes, legal):
    """Score of every SID in `sids`, float32, in their order."""
    scores = np.zeros(len(sids))
    for i, sid in enumerate(sids):
        for t in range(len(sizes)):
            logits = model.row(sid[:t]).astype(np.float64)
            if legal:
                picked = np.unique(sids[(sids[:, :t] == sid[:t]).all(axis=1), t])
                scores[i] += reference.log_softmax(logits[picked])[np.searchsorted(picked, sid[t])]
            else:
                scores[i] += reference.log_softmax(logits)[sid[t]]
    return scores.astype(np.float32)


@st.composite
def problems(draw):
    """(trie, mask or None, legal SIDs, model): catalogs of 1 … 60 items, half of them filtered."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    rows = draw(st.integers(1, 60))
    columns = [draw(hnp.arrays(np.uint16, rows, elements=st.integers(0, size - 1))) for size in sizes]
    trie = SidTrie.build(np.stack(columns, axis=1), sizes)
    mask = draw(st.none() | hnp.arrays(bool, trie.num_sids))
    legal = trie.sids() if mask is None else trie.sids()[mask]
    return trie, mask, legal, Model(sizes, draw(st.integers(0, 9)), draw(st.sampled_from([0.0, 1.0])))


def run(model, trie, config, mask=None):
    return beam_search(model, trie, config, None if mask is None else trie.subset(mask))


def assert_sorted_and_typed(result: BeamResult, levels: int) -> None:
    assert (result.codes.dtype, result.scores.dtype, result.leaves.dtype) == (np.uint16, np.float32, np.int64)
    assert result.codes.shape == (len(result.scores), levels)
    order = np.lexsort([*result.codes.T[::-1], -result.scores])
    assert np.array_equal(order, np.arange(len(order)))


@pytest.mark.parametrize("score", SCORES)
@given(problem=problems())
@settings(max_examples=80, deadline=None)
def test_a_beam_that_covers_the_catalog_equals_brute_force(score, problem):
    trie, mask, legal, model = problem
    result = run(model, trie, BeamConfig(64, 50, score), mask)
    scores = brute_force(model, legal, trie.sizes, score == "legal")
    order = np.argsort(-scores, kind="stable")[:50]
    assert_sorted_and_typed(result, trie.levels)
    assert len(result.scores) == min(50, len(legal))
    np.testing.assert_allclose(result.scores, scores[order], atol=1e-5)
    found = {tuple(sid): score for sid, score in zip(legal.tolist(), scores, strict=True)}
    np.testing.assert_allclose(result.scores, [found[tuple(sid)] for sid in result.codes.tolist()], atol=1e-5)
    assert np.array_equal(trie.index(result.codes), result.leaves)


@pytest.mark.parametrize("score", SCORES)
@given(problem=problems(), width=st.integers(1, 20), top_n=st.integers(1, 20), early_stop=st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_pruned_beams_equal_the_reference_search(score, problem, width, top_n, early_stop):
    trie, mask, _, model = problem
    top_n = min(top_n, width)
    result = run(model, trie, BeamConfig(width, top_n, score, early_stop), mask)
    plain = reference.build(trie.sids(), trie.sizes)
    expected = reference.beam_search(model, plain, width, top_n, score == "legal", mask)
    assert result.codes.tolist() == expected.codes.tolist()
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-6, rtol=2e-7)
    assert result.leaves.tolist() == expected.leaves.tolist()
    assert result.beams == (expected.beams if len(result.scores) else (0,) * trie.levels)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("grid", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_wide_dense_levels_equal_the_reference_search(score, grid, masked):
    sizes = (700, 90, 40, 33)
    rng = np.random.default_rng(3)
    trie = SidTrie.build(np.stack([rng.integers(0, size, 30_000) for size in sizes], axis=1), sizes)
    mask = rng.random(trie.num_sids) < 0.3 if masked else None
    model = Model(sizes, grid=grid)
    result = run(model, trie, BeamConfig(100, 60, score), mask)
    plain = reference.build(trie.sids(), sizes)
    expected = reference.beam_search(model, plain, 100, 60, score == "legal", mask)
    assert result.codes.tolist() == expected.codes.tolist()
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-6, rtol=2e-7)
    assert result.beams == expected.beams


def test_all_equal_logits_come_back_in_code_order():
    sizes = (5, 6, 7)
    trie = SidTrie.build(np.indices(sizes).reshape(3, -1).T, sizes)
    result = beam_search(
        lambda codes, _: np.zeros((len(codes), sizes[codes.shape[1]]), np.float32), trie, BeamConfig()
    )
    assert result.leaves.tolist() == list(range(50))
    np.testing.assert_allclose(result.scores, -np.log(210), rtol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_parents_are_rows_of_the_previous_call(score):
    sizes = (20, 10, 10, 10)
    rng = np.random.default_rng(0)
    trie = SidTrie.build(np.stack([rng.integers(0, size, 400) for size in sizes], axis=1), sizes)
    model = Model(sizes)
    beam_search(model, trie, BeamConfig(40, 10, score))
    assert model.calls[0][0].shape == (1, 0)
    assert model.calls[0][1].tolist() == [0]
    for (before, _), (codes, parents) in zip(model.calls, model.calls[1:], strict=False):
        assert np.array_equal(before[parents], codes[:, :-1])
        assert np.array_equal(codes, np.unique(codes, axis=0))  # code order, no prefix twice


@pytest.mark.parametrize("score", SCORES)
def test_early_stop_finds_the_same_with_fewer_rows(score):
    sizes = (20, 10, 10, 10)
    rng = np.random.default_rng(0)
    trie = SidTrie.build(np.stack([rng.integers(0, size, 3000) for size in sizes], axis=1), sizes)
    full, chunked = Model(sizes, spread=5.0), Model(sizes, spread=5.0)
    expected = beam_search(full, trie, BeamConfig(200, 10, score))
    found = beam_search(chunked, trie, BeamConfig(200, 10, score, early_stop=16))
    assert found.scores.tobytes() == expected.scores.tobytes()
    assert found.codes.tolist() == expected.codes.tolist()
    before, last = chunked.calls[2], chunked.calls[3:]
    assert all(len(codes) <= 16 for codes, _ in last)
    assert sum(len(codes) for codes, _ in last) < len(full.calls[3][0]) / 2
    for codes, parents in last:
        assert np.array_equal(before[0][parents], codes[:, :-1])


def test_legal_scores_ask_only_for_beams_that_can_still_branch():
    trie = SidTrie.build([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 3, 1]], (4, 4, 4))
    model = Model((4, 4, 4))
    result = beam_search(model, trie, BeamConfig(8, 8, "legal"))
    assert [codes.tolist() for codes, _ in model.calls] == [[[]], [[1]], [[1, 1]]]
    np.testing.assert_allclose(np.exp(result.scores.astype(np.float64)).sum(), 1.0, rtol=1e-6)
    # The skipped beams carry the score of their last branch.
    first = reference.log_softmax(model.row([])[[0, 1, 2]].astype(np.float64))
    scores = dict(zip(result.leaves.tolist(), result.scores.tolist(), strict=True))
    assert scores[0] == pytest.approx(first[0], abs=1e-6)
    assert scores[4] == pytest.approx(first[2], abs=1e-6)


def test_a_single_legal_sid_needs_no_model_call_under_legal_scores():
    trie = SidTrie.build(np.indices((4, 4)).reshape(2, -1).T, (4, 4))
    mask = np.arange(16) == 6
    model = Model((4, 4))
    result = run(model, trie, BeamConfig(score="legal"), mask)
    assert (result.codes.tolist(), result.scores.tolist(), result.leaves.tolist()) == ([[1, 2]], [0.0], [6])
    assert not model.calls


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("items", [0, 9])
def test_nothing_legal_gives_no_results_and_no_model_call(score, items):
    trie = SidTrie.build(np.indices((3, 3)).reshape(2, -1).T[:items], (3, 3))
    model = Model((3, 3))
    result = run(model, trie, BeamConfig(score=score), np.zeros(items, dtype=bool))
    assert_sorted_and_typed(result, 2)
    assert len(result.scores) == 0
    assert result.beams == (0, 0)
    assert not model.calls


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [3, 8, 37, 300])
def test_logits_that_are_not_finite_are_errors_that_say_where(bad, score, size):
    trie = SidTrie.build([[i % 2, i] for i in range(3)] + [[1, 0]], (2, size))

    for row in range(2):
        for code in range(size):

            def step(codes, _, row=row, code=code):
                logits = np.zeros((len(codes), 2 if codes.shape[1] == 0 else size), dtype=np.float32)
                if codes.shape[1] == 1:
                    logits[row, code] = bad
                return logits

            with pytest.raises(
                DecodeError, match=rf"level 1: logits\[{row}, {code}\] is -?(nan|inf), expected a finite"
            ):
                beam_search(step, trie, BeamConfig(score=score))


def test_a_refused_level_can_be_asked_again():
    sizes = (9, 200)
    trie = SidTrie.build(np.indices(sizes).reshape(2, -1).T, sizes)
    model, found = Model(sizes), []
    for refuse in (False, True):
        beam = trie.beam(8, 5)
        for _ in sizes:
            logits = model(beam.codes(), beam.parents())
            if refuse:
                bad = logits + np.float32(3)
                bad[-1, -1] = np.nan
                with pytest.raises(ValueError, match="expected a finite number"):
                    beam.advance(bad)
            beam.advance(logits)
        found.append([each.tolist() for each in beam.results()])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (np.zeros((1, 3)), "level 0: logits are float64"),
        (np.zeros((1, 3), np.float16), "level 0: logits are float16"),
        ([[0.0, 0.0, 0.0]], "level 0: logits are list"),
        (np.zeros((1, 4), np.float32), r"level 0: logits have shape \(1, 4\), expected \(1, 3\)"),
        (np.zeros((2, 3), np.float32), r"shape \(2, 3\)"),
        (np.zeros(3, np.float32), r"shape \(3,\)"),
    ],
)
def test_logits_of_a_wrong_type_or_shape_are_errors(logits, message):
    trie = SidTrie.build([[0, 1], [1, 2]], (3, 3))
    with pytest.raises(DecodeError, match=message):
        beam_search(lambda codes, parents: logits, trie, BeamConfig())


def test_logits_may_be_a_strided_view():
    sizes = (6, 7)
    trie = SidTrie.build(np.indices(sizes).reshape(2, -1).T, sizes)
    model = Model(sizes)
    strided = beam_search(lambda c, p: np.asfortranarray(model(c, p)), trie, BeamConfig())
    assert strided.codes.tolist() == beam_search(model, trie, BeamConfig()).codes.tolist()


@pytest.mark.parametrize("shift", [-1e9, 1e7])
@pytest.mark.parametrize("score", SCORES)
def test_huge_offsets_and_penalties_neither_overflow_nor_cost_precision(shift, score):
    sizes = (8, 8)
    trie = SidTrie.build(np.indices(sizes).reshape(2, -1).T, sizes)
    table = np.tile(np.arange(8, dtype=np.float32), (8, 1))

    def step(codes, _):
        return (table[: len(codes)] + np.float32(0)) if shift == 0 else penalised(table[: len(codes)], shift)

    result = beam_search(step, trie, BeamConfig(64, 64, score))
    row = penalised(table[:1], shift)[0].astype(np.float64)
    expected = np.sort(np.add.outer(*(reference.log_softmax(row),) * 2).reshape(-1))[::-1]
    np.testing.assert_allclose(result.scores, expected, rtol=1e-6, atol=1e-6)


def penalised(table, shift):
    """A large offset on every code, or a large penalty on every second one."""
    out = table.copy()
    if shift > 0:
        out += np.float32(shift)
    else:
        out[:, ::2] = shift
    return out


def test_extreme_finite_logits_are_searched_not_refused():
    trie = SidTrie.build([[0], [1], [2]], (3,))
    top = np.finfo(np.float32).max
    result = beam_search(lambda *_: np.array([[-top, top, 0]], np.float32), trie, BeamConfig())
    assert result.codes[0].tolist() == [1]
    assert result.scores[0] == 0.0


@pytest.mark.parametrize("score", SCORES)
def test_scores_beyond_the_range_of_a_float_end_the_search_all_the_same(score):
    sizes, top = (4, 3, 2), np.finfo(np.float32).max
    trie = SidTrie.build(np.argwhere(np.ones(sizes)), sizes)

    def step(codes, parents):
        return np.tile(np.float32([-top] * (sizes[codes.shape[1]] - 1) + [top]), (len(codes), 1))

    result = beam_search(step, trie, BeamConfig(8, 4, score))
    assert result.codes[0].tolist() == [3, 2, 1]
    assert result.scores.tolist() == [0.0, -np.inf, -np.inf, -np.inf]


def test_scores_are_accurate_to_float32_for_long_rows():
    size = 4096
    trie = SidTrie.build(np.arange(size)[:, None], (size,))
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 1 + 3 * seed, (1, size)).astype(np.float32)
        result = beam_search(lambda *_, logits=logits: logits, trie, BeamConfig(size, size))
        expected = reference.log_softmax(logits[0].astype(np.float64))[result.leaves]
        np.testing.assert_allclose(result.scores, expected, rtol=2e-7, atol=1e-6)


def test_the_answer_does_not_depend_on_other_searches_or_threads():
    sizes = (50, 20, 10)
    rng = np.random.default_rng(1)
    trie = SidTrie.build(np.stack([rng.integers(0, size, 3000) for size in sizes], axis=1), sizes)
    subset = trie.subset(rng.random(trie.num_sids) < 0.2)
    jobs = [
        (Model(sizes, seed), BeamConfig(64, 20, SCORES[seed % 2]), subset if seed % 3 else None)
        for seed in range(8)
    ]
    alone = [beam_search(model, trie, config, mask) for model, config, mask in jobs]
    together: list[BeamResult | None] = [None] * len(jobs)

    def work(i):
        model, config, mask = jobs[i]
        together[i] = beam_search(model, trie, config, mask)

    threads = [threading.Thread(target=work, args=(i,)) for i in reversed(range(len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert one.codes.tolist() == other.codes.tolist()
        assert one.scores.tobytes() == other.scores.tobytes()


def test_a_mask_of_another_trie_is_refused():
    one, other = (SidTrie.build([[0, 1]], (2, 2)) for _ in range(2))
    with pytest.raises(ValueError, match="another trie"):
        beam_search(Model((2, 2)), one, BeamConfig(), other.subset(np.ones(1, dtype=bool)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"width": 0}, "width: 0"),
        ({"width": 2.5}, "width: 2.5"),
        ({"width": True, "top_n": 1}, "width: True"),
        ({"width": 2**31}, "width: 2147483648"),
        ({"top_n": 0}, "top_n: 0"),
        ({"top_n": 513}, "top_n: 513 is more than width 512"),
        ({"early_stop": -1}, "early_stop: -1 is not an integer in 0"),
        ({"score": "sum"}, "score: 'sum' is not one of level, legal"),
    ],
)
def test_bad_configs_are_config_errors(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        BeamConfig(**kwargs)
