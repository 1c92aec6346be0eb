"""Losses: hand-computed values."""

import math

import pytest
import torch

from training.losses import sid_cross_entropy, text_cross_entropy


def test_sid_loss_is_the_weighted_mean_of_level_means() -> None:
    uniform, sure = torch.zeros(2, 4), torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    codes = torch.tensor([[3, 0], [1, 0]])
    # sample 0: (ln 4 + 0) / 2; sample 1: (ln 4 + 100) / 2
    expected = (1.0 * math.log(4) / 2 + 2.0 * (math.log(4) + 100) / 2) / 3
    loss = sid_cross_entropy([uniform, sure], codes, torch.tensor([1.0, 2.0]))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_text_loss_skips_padding_and_weighs_tokens() -> None:
    logits = torch.zeros(2, 3, 8)
    logits[0, 2] = 1000  # a padded position must not count
    target = torch.tensor([[1, 2, 0], [3, 0, 0]])
    logits[1, 0, 3] = math.log(7)  # probability 7 / 14
    expected = (1.0 * 2 * math.log(8) + 3.0 * math.log(2)) / (2 * 1.0 + 1 * 3.0)
    loss = text_cross_entropy(logits, target, torch.tensor([1.0, 3.0]), pad=0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
