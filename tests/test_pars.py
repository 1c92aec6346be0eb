"""PARS: rates, rewards and gaps by hand; who becomes a negative of whom."""

import math

import pytest

from onesearch.context import SearchContext
from training.pars import adaptive_reward, calibrated, count, gap_weight, preferences
from training.sessions import PageView


def view(
    impressed: tuple[int, ...], clicked: tuple[int, ...] = (), ordered: tuple[int, ...] = (), user: int = 1
) -> PageView:
    return PageView(1, user, 1, "train", "log", SearchContext("q"), impressed, clicked, ordered)


def test_rates_are_calibrated_with_ten_of_each() -> None:
    ctr, cvr = calibrated(90, 20, 5)
    assert ctr == pytest.approx(math.log(30) / (math.log(100) + math.log(30) + math.log(15)))
    assert cvr == pytest.approx(math.log(15) / math.log(30))
    assert calibrated(0, 0, 0) == pytest.approx((1 / 3, 1.0))


def test_the_adaptive_reward_is_the_scaled_harmonic_mean_and_falls_with_the_level() -> None:
    assert adaptive_reward(1, 0.2, 0.5) == pytest.approx(2 * 2.0 * 0.1 / 0.7)
    rewards = [adaptive_reward(level, 0.2, 0.5) for level in range(1, 7)]
    assert rewards == sorted(rewards, reverse=True) and rewards[-1] == 0


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [(1.0, 0.5, 3.0), (1.0, 0.95, 5.0), (0.5, 0.5, 5.0), (0.2, 0.9, 5.0), (11.0, 1.0, 1.1)],
)
def test_gap_weights_are_finite_capped_and_larger_for_closer_pairs(
    better: float, worse: float, expected: float
) -> None:
    assert gap_weight(better, worse) == pytest.approx(expected)  # the released code: NaN for the third and fourth


def test_an_item_counts_once_a_page_view_and_a_click_is_an_exposure() -> None:
    counts = count([view((1, 1, 2), (1, 1), (1,)), view((2,), (3,))])
    assert (counts.shown, counts.clicked, counts.ordered) == ({1: 1, 2: 2, 3: 1}, {1: 1, 3: 1}, {1: 1})


CATEGORIES = {i: "a" for i in range(1, 30)} | {i: "b" for i in range(30, 60)}


def test_levels_one_to_three_stand_against_four_to_six() -> None:
    views = [view((40, 41), (40,), (40,)), view(tuple(range(1, 9)), (1, 2), (2,)), view((42,), (42,))]
    found = preferences(views, CATEGORIES, lambda a, b: False, 6, seed=1)
    here = {p.items[0]: p for p in found if p.view == 1}
    assert here.keys() == {1, 2}
    for p in here.values():
        negatives = p.items[1:]
        assert len(negatives) == 6 and not {1, 2} & set(negatives)
        shown = [i for i in negatives if i <= 8]
        same = [i for i in negatives if 8 < i < 30]
        other = [i for i in negatives if i >= 30]
        assert [len(shown), len(same), len(other)] == [2, 2, 2]
        assert sorted(p.levels[1:]) == [4, 4, 5, 5, 6, 6]
    assert (here[2].levels[0], here[1].levels[0]) == (1, 3)
    assert here[2].rewards[0] > here[1].rewards[0] > max(here[1].rewards[1:])
    # An earlier order of the same category is of level 2.
    assert {p.items[0]: p.levels[0] for p in found if p.view == 2} == {40: 2, 42: 3}
    alone = preferences(views[1:], CATEGORIES, lambda a, b: False, 6, 1)
    assert {p.items[0] for p in alone if p.view == 1} == {42}


def test_items_of_the_positives_sid_and_other_clicks_are_never_negatives() -> None:
    views = [view(tuple(range(1, 30)), (1, 3, 5))]
    for seed in range(20):
        for p in preferences(views, CATEGORIES, lambda a, b: a % 4 == b % 4, 6, seed):
            assert not any(i % 4 == p.items[0] % 4 or i in (1, 3, 5) for i in p.items[1:])


def test_items_out_of_the_catalog_are_left_out_and_draws_follow_the_seed() -> None:
    assert preferences([view((99,), (99,))], CATEGORIES, lambda a, b: False, 6, 1) == []
    views = [view(tuple(range(1, 9)), (1, 2))]
    runs = [preferences(views, CATEGORIES, lambda a, b: False, 6, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
