"""The vectors of a long history: gates by hand, the Q-Former against PyTorch's own attention, and what is absent."""

import math

import pytest
import torch
from tiny import HISTORY_DIM, tiny_model, tiny_renderer
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from onesearch.history import GatedMean, QFormer

CLICKS_ONLY, ORDERS_ONLY = (1.0, 0.0), (0.0, 1.0)
PRESENCE = (CLICKS_ONLY, ORDERS_ONLY, (1.0, 1.0), (0.0, 0.0))


@pytest.fixture(scope="module")
def renderer():
    return tiny_renderer()


@pytest.fixture
def gates(renderer):
    module = tiny_model(renderer).history
    assert isinstance(module, GatedMean)
    return module


@pytest.fixture
def qformer(renderer):
    module = tiny_model(renderer, history="qformer").history
    assert isinstance(module, QFormer)
    return module


def histories(presence=PRESENCE, seed=0):
    """One history [R, 3, E] for each row of presence."""
    torch.manual_seed(seed)
    return torch.randn(len(presence), 2, 3, HISTORY_DIM) * torch.tensor(presence)[:, :, None, None]


@torch.no_grad()
def test_gates_weigh_the_behaviours_that_are_there(gates):
    gates.gates.copy_(torch.tensor([math.log(3), 0.0]))  # sigmoid: 3/4 and 1/2
    history = histories()
    clicks, orders, both, none = gates(history)
    torch.testing.assert_close(clicks, history[0, 0] @ gates.projection.weight.T)
    torch.testing.assert_close(orders, history[1, 1] @ gates.projection.weight.T)
    mean = (0.75 * history[2, 0] + 0.5 * history[2, 1]) / 1.25
    torch.testing.assert_close(both, mean @ gates.projection.weight.T)
    assert not none.any()


@torch.no_grad()
def test_untrained_gates_make_the_plain_mean_of_what_is_there(renderer):
    module = GatedMean(tiny_model(renderer).config)
    history = histories()
    torch.testing.assert_close(module(history)[2], module.projection(history[2].mean(0)))
    torch.testing.assert_close(module(history)[0], module.projection(history[0, 0]))


def test_the_gradient_of_the_gates_is_that_of_finite_differences(gates):
    module, history = gates.double(), histories().double()
    start = module.gates.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda own: functional_call(module, {"gates": own}, (history,)), start)
    for row, moves in enumerate(
        (False, False, True, False)
    ):  # alone, a behaviour has all the weight whatever its gate
        (gradient,) = torch.autograd.grad(module(history)[row].square().sum(), module.gates)
        assert (gradient.abs() > 1e-6).tolist() == [moves, moves]


@torch.no_grad()
def reference(module, history, presence):
    """[3, D] of one history by PyTorch's own attention over the vectors of the behaviours that are there alone."""
    there = [r for r, known in enumerate(presence) if known]
    vectors = [
        module.projection.weight @ history[r, level] + module.behaviours[r, 0] + module.levels[level]
        for r in there
        for level in range(3)
    ]
    memory, width = module.memory_norm(torch.stack(vectors)), module.queries.shape[1]
    attention = nn.MultiheadAttention(width, 1).eval()
    attention.in_proj_weight.copy_(torch.cat([part.weight for part in (module.query, module.key, module.value)]))
    attention.in_proj_bias.copy_(torch.cat([part.bias for part in (module.query, module.key, module.value)]))
    attention.out_proj.load_state_dict(module.out.state_dict())
    x = module.queries + attention(module.query_norm(module.queries), memory, memory)[0]
    return x + module.down(F.gelu(module.up(module.ffn_norm(x))))


@torch.no_grad()
def test_the_qformer_attends_to_the_behaviours_that_are_there_alone(qformer):
    history = histories()
    found = qformer(history)
    for row in range(3):
        torch.testing.assert_close(found[row], reference(qformer, history[row], PRESENCE[row]))
    assert found[3].count_nonzero() == 0


@torch.no_grad()
@pytest.mark.parametrize(("presence", "absent"), [(CLICKS_ONLY, 1), (ORDERS_ONLY, 0)])
def test_nothing_of_an_absent_behaviour_changes_a_bit(qformer, presence, absent):
    history = histories((presence,))
    before = qformer(history)
    qformer.behaviours[absent] += 100
    assert torch.equal(qformer(history), before)
    qformer.behaviours[1 - absent] += torch.randn_like(qformer.behaviours[0])
    assert not torch.allclose(qformer(history), before)


@torch.no_grad()
def test_behaviours_are_told_apart_by_their_embeddings_alone(qformer):
    history = histories()
    before, swapped = qformer(history), history.flip(1)
    assert not torch.allclose(qformer(swapped)[:3], before[:3], atol=1e-3)
    qformer.behaviours.copy_(qformer.behaviours.flip(0))
    torch.testing.assert_close(qformer(swapped), before)


@torch.no_grad()
def test_levels_are_told_apart_by_their_embeddings_and_queries_alone(qformer):
    history, order = histories(), [2, 0, 1]
    before, moved = qformer(history), history[:, :, order]
    assert not torch.allclose(qformer(moved)[:3], before[:3], atol=1e-3)
    qformer.levels.copy_(qformer.levels[order])
    torch.testing.assert_close(qformer(moved), before)
    qformer.queries.copy_(qformer.queries[order])
    torch.testing.assert_close(qformer(moved), before[:, order])


@pytest.mark.parametrize("kind", ["gates", "qformer"])
def test_users_without_history_leave_gradients_finite_and_others_untouched(renderer, kind):
    module = tiny_model(renderer, history=kind).history
    history = histories()
    module(history).square().sum().backward()
    mixed = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    module(history[:3]).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(mixed[name], parameter.grad)
        assert mixed[name].isfinite().all()
