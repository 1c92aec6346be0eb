"""Listwise DPO: hand-computed values, limits, gradients."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_prompt, tiny_renderer
from torch.nn import functional as F

from training.batches import PlannedStep
from training.dpo import Choice, DpoObjective, listwise_loss, without_shared_prefix
from training.stages import DpoStage

RENDERER = tiny_renderer()
SIZES = RENDERER.sids.spec.sizes


def all_present(gap: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(gap, dtype=torch.bool)


def plain(gap: torch.Tensor, beta: float = 0.1, weights: torch.Tensor | None = None) -> torch.Tensor:
    return listwise_loss(gap, all_present(gap), torch.ones_like(gap) if weights is None else weights, beta)


def test_one_negative_is_pairwise_dpo() -> None:
    gap = torch.randn(20, 1) * 30
    assert torch.allclose(plain(gap), -F.logsigmoid(-0.1 * gap[:, 0]), atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_at_the_start_the_loss_is_the_logarithm_of_one_and_the_negatives(n: int) -> None:
    assert plain(torch.zeros(1, n)).item() == pytest.approx(math.log(1 + n))


def test_weights_are_per_negative_and_absent_negatives_count_nothing() -> None:
    gap, weights = torch.tensor([[-3.0, 5.0, 700.0]]), torch.tensor([[2.0, 1.0, 3.0]])
    present = torch.tensor([[True, True, False]])
    by_hand = math.log1p(math.exp(2 * 0.1 * -3 + 0.2) + math.exp(0.1 * 5 + 0.2))
    assert listwise_loss(gap, present, weights, 0.1, margin=0.2).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("gap", [1e4, -1e4, 1e30, -1e30, 0.0])
def test_loss_and_gradient_are_finite_under_extremes(gap: float) -> None:
    values = torch.full((2, 3), gap, requires_grad=True)
    loss = plain(values, beta=1.0, weights=torch.full((2, 3), 5.0))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(values.grad).all()  # type: ignore[arg-type]


def test_the_gradient_pushes_negatives_down_hardest_where_they_violate_most() -> None:
    gap = torch.tensor([[-20.0, 1.0, 30.0]], requires_grad=True)
    plain(gap).sum().backward()
    assert gap.grad is not None
    pushed = gap.grad[0].tolist()
    assert 0 < pushed[0] < pushed[1] < pushed[2]


def test_codes_that_a_negative_shares_with_the_positive_get_no_gradient_from_it() -> None:
    codes = torch.tensor([[[1, 2, 3], [1, 2, 0], [1, 0, 3], [0, 2, 3]]])
    logp = torch.zeros(1, 4, 3, requires_grad=True)
    without_shared_prefix(logp, codes).sum().backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1]]


def choices(count: int = 5) -> list[Choice]:
    rng = np.random.default_rng(1)
    return [
        Choice(
            tiny_prompt(RENDERER, "red shoes"[: 3 + i], i),
            rng.integers(0, SIZES, (2 + i % 3, 5)),
            np.linspace(1, 2, 1 + i % 3).astype(np.float32),
        )
        for i in range(count)
    ]


def objective(**settings: object) -> DpoObjective:
    stage = DpoStage("s", 1, **settings)  # type: ignore[arg-type]
    return DpoObjective(tiny_model(RENDERER), RENDERER.pad, {"dpo": choices()}, stage)


STEP = PlannedStep(0, "dpo", np.arange(5))


def test_the_first_step_starts_at_a_gap_of_zero_and_moves_the_model_alone() -> None:
    made = objective(alpha_sft=0.5).train()
    start = deepcopy(made.reference)
    values = made.gradients(STEP)
    expected = np.mean([math.log(2 + i % 3) for i in range(5)])
    assert values["dpo"] == pytest.approx(expected, rel=1e-5)
    assert values["gap"] == pytest.approx(0, abs=1e-5)
    assert values["loss"] == pytest.approx(values["dpo"] + 0.5 * values["nll"], rel=1e-5)
    assert values["nll"] == pytest.approx(np.mean(np.log(SIZES)), rel=0.1)  # a mean over codes, not their sum
    optimiser = torch.optim.SGD(made.model.parameters(), lr=0.1)
    for _ in range(15):
        optimiser.step()
        made.zero_grad()
        values = made.gradients(STEP)
    assert values["gap"] < -1 and values["ranked"] > 0.9
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), made.reference.parameters(), strict=True))
    assert all(p.grad is None for p in made.reference.parameters())


def test_masking_changes_the_gradient_not_the_loss() -> None:
    shared = [
        Choice(c.prompt, np.stack([c.codes[0], (c.codes[0] + np.asarray([0, 0, 0, 0, 1])) % SIZES]), c.weights[:1])
        for c in choices()
    ]
    got = []
    for masked in (False, True):
        made = objective(mask_shared_prefix=masked, alpha_sft=0.0)
        made.data = {"dpo": shared}
        loss = made.gradients(STEP)["loss"]
        got.append((loss, made.model.embedding.grad.clone()))  # type: ignore[union-attr]
    assert got[0][0] == got[1][0] and not torch.allclose(got[0][1], got[1][1])


def test_the_parts_of_several_processes_sum_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = objective()
    values = whole.gradients(STEP)
    total = {name: 0.0 for name in values}
    summed = torch.zeros_like(whole.model.embedding)
    for rank in range(3):
        monkeypatch.setattr("training.dpo.rank", lambda rank=rank: rank)
        monkeypatch.setattr("training.dpo.world", lambda: 3)
        part = objective()
        for name, value in part.gradients(STEP).items():
            total[name] += value
        summed += part.model.embedding.grad  # type: ignore[arg-type]
    assert total == pytest.approx(values, abs=1e-5)
    assert torch.allclose(summed, whole.model.embedding.grad, atol=1e-6)  # type: ignore[arg-type]
