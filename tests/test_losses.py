"""Losses: hand-computed values and finite differences."""

import math

import pytest
import torch

from training.losses import class_weights, hidden_l1, sid_kl, sid_nll, symmetric_kl, text_nll


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([[math.log(p) for p in probabilities]])


def test_sid_loss_is_the_sum_over_levels_of_the_softmax_over_that_level() -> None:
    uniform, sure = torch.zeros(2, 4), torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    codes = torch.tensor([[3, 0], [1, 0]])
    expected = [math.log(4), math.log(4) + 100]
    assert sid_nll([uniform, sure], codes).tolist() == pytest.approx(expected, rel=1e-6)


def test_focal_loss_without_focus_is_cross_entropy_and_by_hand_otherwise() -> None:
    levels, codes = [torch.randn(5, 7), torch.randn(5, 3)], torch.tensor([[6, 2]] * 5)
    assert torch.equal(sid_nll(levels, codes, gamma=0, alpha=1), sid_nll(levels, codes))
    focal = sid_nll([logits_of(0.25, 0.75)], torch.tensor([[0]]), gamma=3, alpha=2)
    assert focal.item() == pytest.approx(-2 * 0.75**3 * math.log(0.25), rel=1e-6)
    sure = sid_nll([torch.tensor([[80.0, 0.0]], requires_grad=True)], torch.tensor([[0]]), gamma=3)
    sure.backward()
    assert sure.item() == 0.0


@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [1.0, torch.tensor([[0.5], [1.5]])])
def test_the_gradient_of_the_focal_loss_is_that_of_finite_differences(
    gamma: float, alpha: float | torch.Tensor
) -> None:
    level, codes = torch.randn(2, 4, requires_grad=True), torch.tensor([[1], [3]])
    (gradient,) = torch.autograd.grad(sid_nll([level], codes, gamma, alpha).sum(), level)
    for i in range(2):
        for j in range(4):
            step = torch.zeros(2, 4)
            step[i, j] = 1e-2
            up, down = (sid_nll([moved], codes, gamma, alpha).sum() for moved in (level + step, level - step))
            assert gradient[i, j].item() == pytest.approx((up - down).item() / 2e-2, abs=2e-4)


def test_class_weights_by_hand() -> None:
    """β = ½ gives 1, ⅔ and nothing for 1, 2 and 0 samples, whose mean is (1 + 2 · ⅔) / 3 = 7/9."""
    assert class_weights(torch.tensor([1, 2, 0]), 0.5).tolist() == pytest.approx([9 / 7, 6 / 7, 0])
    assert class_weights(torch.tensor([1, 2, 0]), 0.0).tolist() == [1, 1, 0]
    inverse = class_weights(torch.tensor([1, 2, 5]), 1 - 1e-9).tolist()
    assert inverse == pytest.approx([8 / 3, 4 / 3, 8 / 15], rel=1e-6)


def test_each_code_has_the_weight_of_its_class() -> None:
    levels, codes = [logits_of(0.25, 0.75), logits_of(0.5, 0.5)], torch.tensor([[0, 1]])
    weighted = sid_nll(levels, codes, gamma=1, alpha=torch.tensor([[3.0, 0.5]]))
    assert weighted.item() == pytest.approx(-3 * 0.75 * math.log(0.25) - 0.5 * 0.5 * math.log(0.5), rel=1e-6)


def test_text_loss_skips_padding() -> None:
    logits = torch.zeros(2, 3, 8)
    logits[0, 2] = 1000  # a padded position must not count
    target = torch.tensor([[1, 2, 0], [3, 0, 0]])
    logits[1, 0, 3] = math.log(7)  # probability 7 / 14
    assert text_nll(logits, target, pad=0).tolist() == pytest.approx([2 * math.log(8), math.log(2)], rel=1e-6)


def test_kl_is_forward_summed_over_codes_and_levels_and_scaled_by_the_square_of_the_temperature() -> None:
    teacher, student = [logits_of(0.5, 0.5), logits_of(0.9, 0.1)], [logits_of(0.25, 0.75), logits_of(0.9, 0.1)]
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert sid_kl(teacher, student).item() == pytest.approx(by_hand, rel=1e-5)
    # τ = 2: square roots of the odds, √(1/3) against 1
    p = math.sqrt(0.25) / (math.sqrt(0.25) + math.sqrt(0.75))
    warm = 4 * (0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)))
    assert sid_kl(teacher, student, tau=2).item() == pytest.approx(warm, rel=1e-5)
    assert sid_kl(teacher, teacher).item() == pytest.approx(0.0, abs=1e-7)


def test_r_drop_is_the_mean_of_both_directions() -> None:
    a, b = [torch.randn(3, 4), torch.randn(3, 2)], [torch.randn(3, 4), torch.randn(3, 2)]
    assert torch.allclose(symmetric_kl(a, b), symmetric_kl(b, a))
    assert torch.allclose(symmetric_kl(a, b), (sid_kl(a, b) + sid_kl(b, a)) / 2)
    assert symmetric_kl(a, a).abs().max() < 1e-6


def test_hidden_distance_is_in_units_of_the_teachers_spread() -> None:
    teacher = [torch.tensor([[0.0, 2.0], [4.0, 6.0]])]
    student = [teacher[0] + torch.tensor([[1.0, 3.0], [0.0, 0.0]])]
    assert hidden_l1(teacher, student).tolist() == pytest.approx([2 / teacher[0].std().item(), 0.0])
    assert torch.allclose(hidden_l1([10 * teacher[0]], [10 * student[0]]), hidden_l1(teacher, student))
