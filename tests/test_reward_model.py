"""The three-tower reward model and the preferences that come of re-ranking by it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_samples import sources, view  # noqa: F401 (a fixture)

from onesearch.model import OneSearchModel
from onesearch.model_config import ModelConfig
from training.pars import Counts, Preference
from training.reranked import changed, reranked_preferences
from training.reward_model import RewardModel, Towers
from training.rewards import Relevance, Rewards
from training.samples import Sources
from training.stages import RewardConfig


@pytest.fixture
def shop(sources: Sources) -> Sources:  # noqa: F811
    """Users click and order red things (1, 6, 11, …), click blue ones, and are shown green ones."""
    views = [view((i, i + 1), (i,), replace(view(()).context)) for i in (1, 6, 11, 16, 21, 26)] * 20
    views = [replace(v, impressed=(*v.clicked, v.clicked[0] + 2)) for v in views]
    return replace(sources, views=views, keywords=[])


def test_towers_learn_what_was_clicked_and_what_was_ordered(shop: Sources) -> None:
    model = RewardModel(shop, Relevance(shop.items, shop.views, None))
    found = [Preference(0, (1, 2, 3), (1.0, 0.5, 0.1), (1, 3, 4))] * 400
    losses = [model.fit(shop.views, found, seed) for seed in range(15)]
    assert losses[-1] < losses[0] / 2
    rates = torch.sigmoid(model.towers(*model._inputs([(shop.views[0], i) for i in (1, 2, 3)])))
    clicked, ordered = rates[:, 0].tolist(), rates[:, 1].tolist()
    assert min(clicked[:2]) > 0.6 > 0.4 > clicked[2]
    assert ordered[0] > 0.6 > 0.4 > max(ordered[1:])


def test_the_score_is_the_weighted_sum_of_towers_and_relevance(shop: Sources) -> None:
    relevance = Relevance(shop.items, shop.views, None)
    model = RewardModel(shop, relevance)
    rates = torch.sigmoid(model.towers(*model._inputs([(shop.views[0], 3)])))[0].tolist()
    grade = relevance.grade("red shoes", 3)[0]
    expected = 2.0 * rates[0] + 1.5 * rates[1] + 1.0 * rates[2] + 10 * 0.5 * grade / 3
    assert model.score(shop.views[0], [3]) == pytest.approx([expected])


def test_what_is_not_there_is_not_attended_to() -> None:
    torch.manual_seed(0)
    towers, recent = Towers(4, 2), torch.randn(1, 3, 4)
    inputs = torch.randn(1, 4), torch.randn(1, 4)
    seen, profile = torch.tensor([[True, False, False]]), torch.tensor([1])
    other = recent.clone()
    other[:, 1:] = 9.0
    assert torch.equal(towers(*inputs, recent, seen, profile), towers(*inputs, other, seen, profile))
    nothing = towers(*inputs, recent, torch.zeros(1, 3, dtype=torch.bool), profile)
    assert torch.equal(nothing, towers(*inputs, 0 * recent, seen, profile))


@pytest.mark.parametrize(
    ("scores", "clicked", "expected"),
    [
        ({1: 3.0, 2: 2.0, 3: 1.0, 4: 0.0}, (), ()),  # the order stays
        ({1: 2.0, 2: 3.0, 3: 1.0, 4: 0.0}, (), (2, 1)),  # 2 was promoted over 1
        ({1: 0.0, 2: 1.0, 3: 2.0, 4: 3.0}, (), (4, 1, 2)),  # worst first
        ({1: 2.0, 2: 0.0, 3: 1.0, 4: 0.5}, (1,), (1, 2)),  # clicked, though it did not move
        ({1: 0.0, 2: 3.0, 3: 1.0, 4: 2.0}, (1,), ()),  # only clicked items lost places
    ],
)
def test_promoted_or_clicked_against_demoted(
    scores: dict[int, float], clicked: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert changed([1, 2, 3, 4], scores, clicked, 2) == expected


def test_candidates_of_the_model_become_preferences_where_scores_change_their_order(shop: Sources) -> None:
    torch.manual_seed(0)
    model = OneSearchModel(ModelConfig.for_renderer(shop.renderer, d_model=16, heads=2, ffn=16))
    relevance = Relevance(shop.items, shop.views, None)
    rewards = Rewards(RewardConfig(), shop.item_sids, {}, Counts(), relevance)
    scorer = RewardModel(shop, relevance)
    found = reranked_preferences(model, shop, rewards, scorer, 5, 12, 3)
    assert 0 < len(found) <= 5 and model.training
    for preference in found:
        assert isinstance(preference, Preference)
        assert len(set(preference.items)) == len(preference.rewards) >= 2
        assert preference.rewards[0] > max(preference.rewards[1:])
        assert np.isfinite(preference.rewards).all()
