import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.metrics import (
    bootstrap,
    calibration_error,
    compare,
    coverage,
    exposure_gini,
    free_beams,
    graded,
    hits,
    item_rank,
    leaf_numbers,
    ndcg,
    optimistic_rank,
    per_view,
    reciprocal,
    sid_rank,
    top_rows,
    valid_share,
)

COLLIDING = np.asarray([[0, 0], [0, 0], [0, 0], [0, 1], [2, 0]], dtype=np.uint16)


def rows(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


def test_collisions_separate_the_three_ways_to_count():
    leaf = leaf_numbers(COLLIDING)
    assert leaf.tolist() == [0, 0, 0, 1, 2]
    ranked = rows(3, 4, 0, 1, 2)
    assert item_rank(ranked, 2) == 5
    assert sid_rank(leaf[ranked], 0) == 3
    assert optimistic_rank(leaf[ranked], 0) == 3
    ranked = rows(0, 1, 2, 3)
    assert (item_rank(ranked, 3), sid_rank(leaf[ranked], 1), optimistic_rank(leaf[ranked], 1)) == (4, 2, 4)


def test_a_target_that_is_absent_or_not_in_the_catalog_has_rank_zero():
    assert item_rank(rows(3, 1), 2) == 0
    assert item_rank(rows(-1, 1), -1) == 0
    assert sid_rank(rows(3, 1), -1) == optimistic_rank(rows(3, 1), -1) == 0
    assert item_rank(rows(), 0) == 0


@given(st.permutations(range(8)), st.integers(0, 8), st.integers(0, 7), st.integers(1, 20))
def test_hit_rate_and_reciprocal_rank_equal_a_plain_scorer(order, length, target, k):
    listed = order[:length]
    rank = np.asarray([item_rank(rows(*listed), target)])
    assert hits(rank, k)[0] == (target in listed[:k])
    assert reciprocal(rank, k)[0] == (1 / (listed.index(target) + 1) if target in listed[:k] else 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=9), st.randoms(), st.data())
def test_sid_ranks_equal_a_plain_scorer(codes, random, data):
    sids = np.asarray(sorted(codes), dtype=np.uint16)
    beams = sorted(set(map(tuple, sids.tolist())))
    random.shuffle(beams)
    listed = [row for beam in beams for row, sid in enumerate(sids.tolist()) if tuple(sid) == beam]
    target = data.draw(st.integers(0, len(sids) - 1))
    leaf = leaf_numbers(sids)
    assert sid_rank(leaf[listed], leaf[target]) == beams.index(tuple(sids[target].tolist())) + 1
    first = next(i for i, row in enumerate(listed) if sids[row].tolist() == sids[target].tolist())
    assert optimistic_rank(leaf[listed], leaf[target]) == first + 1
    assert optimistic_rank(leaf[listed], leaf[target]) <= item_rank(rows(*listed), target)


def test_page_views_weigh_the_same_however_much_was_clicked():
    values, views = np.asarray([1.0, 0.0, 0.0, 1.0, 1.0]), rows(0, 0, 0, 0, 2)
    assert per_view(values, views, np.ones(5, dtype=bool)).tolist() == [0.5, 1.0]
    kept = np.asarray([True, False, False, False, False])
    assert per_view(values, views, kept).tolist() == [1.0]
    assert per_view(values, views, np.zeros(5, dtype=bool)).tolist() == []


def test_graded_measures_equal_values_computed_by_hand():
    ratings = [{0: 3, 1: 2, 2: 0}]
    values = graded(ratings, [rows(2, 9, 0, 1)])
    ideal = 3 + 2 / math.log2(3)
    assert values["nDCG@10"][0] == pytest.approx((3 / 2 + 2 / math.log2(5)) / ideal)
    assert values["nDCG@10 judged only"][0] == pytest.approx((3 / math.log2(3) + 2 / 2) / ideal)
    assert values["MRR@10"][0] == pytest.approx(1 / 3)
    assert values["recall@10"][0] == 1
    assert values["judged@10"][0] == 0.75


def test_graded_measures_cut_at_ten_and_count_what_no_list_can_reach():
    ratings = [{20: 1, -1: 1}, {5: 2}, {7: 0}]
    values = graded(ratings, [np.arange(30), rows(), rows(7)])
    assert values["recall@10"].tolist() == [0, 0, 0]
    assert values["recall@100"].tolist() == [0.5, 0, 0]
    assert values["MRR@10"].tolist() == [0, 0, 0]
    assert values["nDCG@10"].tolist() == [0, 0, 0]


def test_graded_measures_keep_the_order_of_the_list():
    ratings = [{row: row % 4 for row in range(60)}]
    order = np.random.default_rng(0).permutation(60)
    gains = [row % 4 for row in order[:10]]
    best = sorted((row % 4 for row in range(60)), reverse=True)[:10]
    expected = [sum(g / math.log2(i + 2) for i, g in enumerate(found)) for found in (gains, best)]
    assert graded(ratings, [order])["nDCG@10"][0] == pytest.approx(expected[0] / expected[1])


def test_bootstrap_interval_is_close_to_the_normal_one_and_repeats_by_seed():
    values = np.random.default_rng(0).normal(2.0, 1.0, (400, 1))
    (found,) = bootstrap(values, seed=1)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.2 * half)
    assert bootstrap(values, seed=1) == [found]
    assert bootstrap(values, seed=2) != [found]


def test_differences_are_paired():
    base = np.random.default_rng(0).random(200)
    values = {"HR@10": {"model": base + 0.1, "bm25": base}, "SID HR@10": {"model": base}}
    first, second = compare("clicks", values, "model", seed=0, resamples=200)
    gap = first.differences["bm25"]
    assert gap.value == pytest.approx(0.1)
    assert gap.high - gap.low < 1e-9 < first.systems["model"].high - first.systems["model"].low
    assert (first.slice, first.measure, first.count) == ("clicks", "HR@10", 200)
    assert second.differences == {}


def test_an_empty_slice_gives_no_measures():
    assert compare("orders", {"HR@10": {"model": np.empty(0)}}, "model", seed=0) == []


def test_wide_free_beams_equal_brute_force_over_all_codes():
    sizes = (3, 4, 2)
    rng = np.random.default_rng(0)
    tables = {
        p: rng.normal(size=size) for t, size in enumerate(sizes) for p in itertools.product(*map(range, sizes[:t]))
    }
    sent = []

    def step(codes, parents):
        sent.append((codes, parents))
        return np.asarray([tables[tuple(c)] for c in codes.tolist()], dtype=np.float32)

    def score(codes):
        return sum(tables[codes[:t]][c] - np.log(np.exp(tables[codes[:t]]).sum()) for t, c in enumerate(codes))

    best = sorted(itertools.product(*map(range, sizes)), key=score, reverse=True)
    assert free_beams(step, sizes, width=24, top_n=7).tolist() == [list(c) for c in best[:7]]
    for (before, _), (codes, parents) in itertools.pairwise(sent):
        assert codes[:, :-1].tolist() == before[parents].tolist()


def test_narrow_free_beams_keep_the_best_prefixes_only():
    def step(codes, parents):
        if not codes.shape[1]:
            return np.asarray([[0, 0.1]], dtype=np.float32)
        return np.where(codes == 0, [[0, 9]], [[0, 0]]).astype(np.float32)

    assert free_beams(step, (2, 2), width=4, top_n=1).tolist() == [[0, 1]]
    assert free_beams(step, (2, 2), width=1, top_n=5).tolist() == [[1, 0]]


def test_valid_share_counts_beams_that_do_not_exist_as_invalid():
    codes = np.asarray([[0], [1], [2]], dtype=np.uint16)
    assert valid_share(codes, lambda c: c[:, 0] != 1, 2) == 0.5
    assert valid_share(codes, lambda c: c[:, 0] != 1, 4) == 0.5


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 40))
def test_top_rows_breaks_ties_by_position(scores, count):
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    assert top_rows(np.asarray(scores, dtype=np.float32), count).tolist() == expected


def test_coverage_and_gini_of_hand_made_lists():
    assert coverage([rows(0, 1, 7), rows(1, 2)], num_items=8, k=2) == 3 / 8
    assert exposure_gini([rows(0), rows(1), rows(2), rows(3)], num_items=4, k=10) == 0
    assert exposure_gini([rows(2), rows(2)], num_items=4, k=10) == 0.75
    assert exposure_gini([rows()], num_items=4, k=10) == 0


def test_ndcg_by_hand_and_as_ir_measures_has_it():
    grades = np.array([3, 0, 2, 1])
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert ndcg(np.array([2, 1, 0]), grades, 10) == pytest.approx((2 + 3 / 2) / ideal)
    assert ndcg(np.array([0, 2, 3, 1]), grades, 10) == pytest.approx(1)
    assert ndcg(np.array([0]), grades, 1) == 1 and ndcg(np.empty(0, np.int64), grades, 10) == 0
    rng = np.random.default_rng(0)
    for _ in range(20):
        grades, ranked = rng.integers(0, 4, 30), rng.permutation(30)[:12]
        grades[0] = 3
        ours = graded([dict(enumerate(grades.tolist()))], [ranked])["nDCG@10"][0]
        assert ndcg(ranked, grades, 10) == pytest.approx(ours)


def test_calibration_error_by_hand():
    probabilities, outcomes = np.array([0.1, 0.2, 0.8, 1.0]), np.array([0.0, 0.0, 1.0, 0.5])
    assert calibration_error(probabilities, outcomes, bins=2) == pytest.approx(0.15)
    assert calibration_error(probabilities, outcomes, bins=4) == pytest.approx((0.1 + 0.2 + 0.2 + 0.5) / 4)
    assert calibration_error(np.array([0.9, 0.1]), np.array([0.0, 1.0]), bins=1) == pytest.approx(0)
    rng = np.random.default_rng(1)
    drawn = rng.random(20_000)
    assert calibration_error(drawn, (rng.random(20_000) < drawn).astype(float)) < 0.02
