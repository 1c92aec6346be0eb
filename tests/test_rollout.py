"""Rollouts come from exactly the distribution whose log-probabilities they carry."""

import numpy as np
import pytest
import torch
from tiny import SHAPES, SIZES, tiny_model, tiny_prompt, tiny_renderer

from onesearch.model import OneSearchModel
from training.batches import Inputs
from training.rollout import legal_codes, sample, score
from trie import SidTrie

RENDERER = tiny_renderer()
SIDS = np.unique(np.random.default_rng(3).integers(0, SIZES, (40, 5)), axis=0)
TRIE = SidTrie.build(SIDS, SIZES)


def prompts(count: int = 2) -> Inputs:
    return Inputs.of([tiny_prompt(RENDERER, "red shoes"[: 9 - i], i) for i in range(count)], RENDERER.pad)


def draws(count: int, group: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, group, 5))


def teacher_forced(model: OneSearchModel, inputs: Inputs, codes: torch.Tensor, group: int) -> list[torch.Tensor]:
    rows = Inputs(*(x.repeat_interleave(group, dim=0) for x in inputs))
    return model.sid_logits(*rows, torch.from_numpy(RENDERER.sids.token_ids(codes.numpy())))


@pytest.mark.parametrize("backbone", SHAPES)
@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("group", [2, 4])
def test_carried_log_probabilities_are_those_of_the_gradient_pass(
    backbone: str, constrained: bool, group: int
) -> None:
    trie = TRIE if constrained else None
    model, inputs = tiny_model(RENDERER, backbone=backbone), prompts()
    rollouts = sample(model, inputs, draws(2, group), temperature=1.7, trie=trie)
    assert rollouts.codes.shape == rollouts.logp.shape == (2 * group, 5)
    logits = teacher_forced(model, inputs, rollouts.codes, group)
    assert torch.allclose(score(logits, rollouts.codes, 1.7, rollouts.legal), rollouts.logp, atol=1e-4)
    if trie is None:
        manual = torch.log_softmax(logits[0] / 1.7, dim=1).gather(1, rollouts.codes[:, :1])[:, 0]
        assert torch.allclose(manual, rollouts.logp[:, 0], atol=1e-4)
    else:
        assert TRIE.contains(rollouts.codes.numpy()).all()


def test_constrained_probabilities_of_all_live_sids_sum_to_one() -> None:
    model, inputs = tiny_model(RENDERER), prompts(1)
    codes = torch.from_numpy(SIDS)
    logits = teacher_forced(model, inputs, codes, len(SIDS))
    legal = [legal_codes(TRIE, codes[:, :t], size) for t, size in enumerate(SIZES)]
    assert score(logits, codes, 1.0, legal).sum(dim=1).exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    assert score(logits, codes).sum(dim=1).exp().sum().item() < 0.5  # the other 2,480 SIDs have their share


@pytest.mark.parametrize("constrained", [False, True])
def test_draws_follow_the_distribution(constrained: bool) -> None:
    trie = TRIE if constrained else None
    model, inputs, many = tiny_model(RENDERER), prompts(1), 1000
    uniform = np.full((1, many, 5), 0.5)
    uniform[0, :, 0] = (np.arange(many) + 0.5) / many
    codes = sample(model, inputs, uniform, temperature=0.7, trie=trie).codes[:, 0]
    logits = teacher_forced(model, inputs, torch.zeros(1, 5, dtype=torch.long), 1)[0][0] / 0.7
    if trie is not None:
        logits[[c for c in range(SIZES[0]) if c not in TRIE.children(())]] = -torch.inf
    shares = torch.bincount(codes, minlength=SIZES[0]) / many
    assert torch.allclose(shares, torch.softmax(logits, dim=0), atol=2 / many)


def test_equal_draws_give_equal_rollouts_whatever_else_is_in_the_batch() -> None:
    model, inputs, uniform = tiny_model(RENDERER), prompts(3), draws(3, 4)
    whole = sample(model, inputs, uniform)
    assert torch.equal(whole.codes, sample(model, inputs, uniform).codes)
    one = sample(model, Inputs(*(x[1:2] for x in inputs)), uniform[1:2])
    assert torch.equal(whole.codes[4:8], one.codes)


def test_the_ends_of_the_unit_interval_never_draw_an_illegal_code() -> None:
    model, inputs = tiny_model(RENDERER), prompts(1)
    for value in (0.0, 1 - 1e-16, np.nextafter(1.0, 0.0)):
        rollouts = sample(model, inputs, np.full((1, 1, 5), value), trie=TRIE)
        assert TRIE.contains(rollouts.codes.numpy()).all()
