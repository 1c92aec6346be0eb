"""Self-distillation: who gets gradients, what lines up with what, and what a step leaves behind."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import SHAPES, tiny_model, tiny_prompt, tiny_renderer
from torch import Tensor, nn

from onesearch.model import OneSearchModel
from training.batches import Batch, Inputs, collate
from training.distill import SdftObjective, _ended
from training.losses import sid_kl, sid_nll
from training.objective import evaluating, perturbed
from training.samples import Sample
from training.stages import SdftStage

RENDERER = tiny_renderer()
STAGE = SdftStage("s", 1, mixture={"search": 1.0}, kw_mix=0, alpha_kl=0.5)
BACKBONES = pytest.mark.parametrize("backbone", SHAPES)
MODES = ("self", "joint", "ema", "token", "codi")


def batch(same: bool = False, extra: int = 0) -> Batch:
    """Three samples whose teacher prompt is longer, or the same; `extra` columns of padding."""
    rng = np.random.default_rng(5)
    rows = []
    for i, query in enumerate(("red shoes", "blue", "red bag")):
        prompt = tiny_prompt(RENDERER, query, i)
        teacher = prompt if same else tiny_prompt(RENDERER, query + " shoes", i)
        target = RENDERER.target(rng.integers(0, RENDERER.sids.spec.sizes).astype(np.uint16))
        rows.append(Sample(prompt, target, 1.0 + i % 2, teacher))
    made = collate("search", rows, RENDERER.pad)
    return replace(made, prompt=widened(made.prompt, extra), teacher=widened(made.teacher, extra))


def widened(inputs: Inputs | None, extra: int) -> Inputs:
    assert inputs is not None
    ids = nn.functional.pad(inputs.ids, (0, extra), value=RENDERER.pad)
    return Inputs(ids, nn.functional.pad(inputs.mask, (0, extra)), inputs.history)


def objective(model: OneSearchModel | None = None, **settings: object) -> SdftObjective:
    stage = replace(STAGE, **settings)  # type: ignore[arg-type]
    return SdftObjective(model or tiny_model(RENDERER), RENDERER, {}, stage)


def gradient(made: SdftObjective, of: Batch) -> tuple[dict[str, float], dict[str, Tensor]]:
    made.zero_grad()
    parts = made.batch_gradients(of)
    named = made.named_parameters()
    return parts, {name: p.grad.clone() for name, p in named if p.grad is not None}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@BACKBONES
@pytest.mark.parametrize("mode", MODES)
def test_a_teacher_with_the_same_prompt_and_no_dropout_teaches_nothing(mode: str, backbone: str) -> None:
    made = objective(tiny_model(RENDERER, backbone=backbone), mode=mode).eval()
    parts, _ = gradient(made, batch(same=True))
    if mode == "token":  # its student reads one token more
        assert parts["kl"] > 0
    else:
        assert parts["kl"] == pytest.approx(0, abs=1e-6)
        assert parts.get("l1", 0) == pytest.approx(0, abs=1e-5)
    assert gradient(made, batch())[0]["kl"] > 1e-4


@BACKBONES
def test_only_the_student_gets_the_gradient_of_the_divergence(backbone: str) -> None:
    model = tiny_model(RENDERER, backbone=backbone)
    frozen = deepcopy(model)
    of = batch()
    _, got = gradient(objective(model).eval(), of)
    model.zero_grad()
    codes = objective(model).codes(of.target)
    levels = model.sid_logits(*of.prompt, of.target)
    assert of.teacher is not None
    with torch.no_grad():
        target = frozen.sid_logits(*of.teacher, of.target)
    (of.mean(sid_nll(levels, codes)) + 0.5 * of.plain_mean(sid_kl(target, levels))).backward()  # type: ignore[no-untyped-call]
    assert close(got, {f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None})


@BACKBONES
def test_a_divergence_at_a_level_reaches_exactly_the_state_that_predicts_it(backbone: str) -> None:
    """The released code gave the first code none and a position behind the target some (spec §10 B6)."""
    model, of = tiny_model(RENDERER, backbone=backbone), batch()
    for level in range(5):
        hidden = model.decode(model.encode(*of.prompt), of.prompt.mask, of.target)
        hidden.retain_grad()
        student = model.sid_head(hidden)
        teacher = [torch.zeros_like(x) for x in student]
        sid_kl(teacher[level : level + 1], student[level : level + 1]).sum().backward()
        assert hidden.grad is not None
        assert [bool(hidden.grad[:, t].abs().max() > 1e-6) for t in range(5)] == [t == level for t in range(5)]
    first = RENDERER.sids.first_id
    changed = of.target.clone()
    changed[:, 2] = first + 7 + 5 + (changed[:, 2] - first - 7 - 5 + 1) % 4
    for t, (a, b) in enumerate(
        zip(model.sid_logits(*of.prompt, of.target), model.sid_logits(*of.prompt, changed), strict=True)
    ):
        assert torch.allclose(a, b, atol=1e-5) == (t <= 2)  # a code is predicted from the codes before it


@BACKBONES
@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(mode: str, backbone: str) -> None:
    settings = {"mode": mode, "alpha_r": 0.5, "epsilon": 0.1, "gamma": 2.0}
    made = objective(tiny_model(RENDERER, backbone=backbone), **settings).eval()
    parts, got = gradient(made, batch())
    padded, same = gradient(made, batch(extra=4))
    assert padded == pytest.approx(parts, abs=1e-5)
    assert all(torch.allclose(got[k], same[k], atol=1e-5) for k in got)


def test_r_drop_is_zero_without_dropout_and_one_forward_of_both_passes_is_two() -> None:
    model, of = tiny_model(RENDERER), batch()
    plain, base = gradient(objective(model).eval(), of)
    parts, got = gradient(objective(model, alpha_r=0.5).eval(), of)
    assert parts["r_drop"] == pytest.approx(0, abs=1e-6)
    assert {k: parts[k] for k in ("loss", "ce", "kl")} == pytest.approx(plain, abs=1e-5)
    assert close(base, got)
    torch.manual_seed(0)
    both = gradient(objective(model, alpha_r=0.5).train(), of)[0]
    torch.manual_seed(0)
    single = gradient(objective(model, alpha_r=0.5, r_drop_single=True).train(), of)[0]
    assert both["r_drop"] == single["r_drop"] > 1e-3
    assert both["ce"] != single["ce"]


def test_class_balance_weighs_the_codes_of_every_level_by_how_rare_they_are() -> None:
    """Two targets begin with code 0, one with code 1: β = ½ weighs them ⅔ and 1, over a mean of 7/9."""
    prompt, sids = tiny_prompt(RENDERER, "red shoes", 0), [(0, 0, 0, 0, 0), (0, 1, 0, 1, 0), (1, 0, 1, 1, 0)]
    rows = [Sample(prompt, RENDERER.target(np.asarray(sid, dtype=np.uint16)), 1.0) for sid in sids]
    data = {"search": rows, "sid_to_query": [Sample(prompt, RENDERER.target("red"), 1.0)]}  # text has no codes
    stage = replace(STAGE, class_balance=0.5, focal_alpha=2.0, gamma=1.0)
    made = SdftObjective(tiny_model(RENDERER), RENDERER, data, stage).eval()
    of = collate("search", rows, RENDERER.pad)
    common, rare = 2 * 6 / 7, 2 * 9 / 7
    weights = [
        [common, common, common, rare, 2.0],
        [common, rare, common, common, 2.0],
        [rare, common, rare, common, 2.0],
    ]
    alpha, codes = torch.tensor(weights), made.codes(of.target)
    assert torch.allclose(torch.as_tensor(made.alpha(codes)), alpha)
    expected = of.mean(sid_nll(made.model.sid_logits(*of.prompt, of.target), codes, 1.0, alpha))
    assert made.batch_gradients(of)["ce"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_the_sum_of_its_terms() -> None:
    settings = {"alpha_kl": 0.3, "alpha_r": 0.7, "teacher_ce": 0.2, "mode": "joint"}
    parts, _ = gradient(objective(**settings).train(), batch())
    total = parts["ce"] + 0.2 * parts["teacher_ce"] + 0.3 * parts["kl"] + 0.7 * parts["r_drop"]
    assert parts["loss"] == pytest.approx(total, rel=1e-5)


def test_a_mutual_teacher_learns_from_its_own_cross_entropy_and_only_if_asked_from_the_student() -> None:
    model, of = tiny_model(RENDERER), batch()
    without = gradient(objective(model, mode="joint", teacher_ce=0.0).eval(), of)[1]
    assert close(without, gradient(objective(model, mode="self").eval(), of)[1])
    assert not close(without, gradient(objective(model, mode="joint", teacher_ce=1.0).eval(), of)[1])
    assert not close(
        without, gradient(objective(model, mode="joint", teacher_ce=0.0, symmetric=True).eval(), of)[1]
    )


def test_a_teachers_dropout_is_off_unless_asked_for_and_the_students_stays_on() -> None:
    of = batch(same=True)
    made = objective(mode="self").train()
    with torch.no_grad():
        calm = [made.teach(of).levels[0] for _ in range(2)]  # type: ignore[union-attr]
        other = objective(teacher_dropout=True).train()
        noisy = [other.teach(of).levels[0] for _ in range(2)]  # type: ignore[union-attr]
    assert torch.equal(*calm) and not torch.equal(*noisy)
    assert all(module.training for module in made.modules())
    with pytest.raises(RuntimeError), evaluating(made):
        assert not made.model.training
        raise RuntimeError
    assert all(module.training for module in made.modules())


def test_the_moving_average_has_its_closed_form_and_moves_once_per_optimiser_step() -> None:
    made = objective(mode="ema", ema_decay=0.8)
    name = next(n for n, _ in made.model.named_parameters())
    start = made.model.get_parameter(name).detach().clone()
    for step in range(1, 4):
        with torch.no_grad():
            made.model.get_parameter(name).copy_(start + step)
        gradient(made, batch())
        made.stepped()
    # θ'_3 = start + Σ_k 0.2 · 0.8^(3−k) · k
    expected = 0.2 * (0.64 * 1 + 0.8 * 2 + 3)
    assert torch.allclose(made.average.get_parameter(name), start + expected, atol=1e-5)
    assert not any(p.requires_grad for p in made.average.parameters())


def test_the_moving_average_has_the_buffers_of_the_model() -> None:
    model = tiny_model(RENDERER)
    model.register_buffer("seen", torch.zeros(2))
    made = objective(model, mode="ema", ema_decay=0.9)
    model.seen.fill_(7.0)
    made.stepped()
    assert made.average.seen.tolist() == [7.0, 7.0]


def test_the_adversarial_pass_has_no_second_pass_of_r_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    made = objective(epsilon=0.05, alpha_r=0.5)
    forward, rows = made.model.sid_logits, []

    def counting(ids: Tensor, *rest: Tensor) -> list[Tensor]:
        rows.append(len(ids))
        return forward(ids, *rest)

    monkeypatch.setattr(made.model, "sid_logits", counting)
    made.batch_gradients(batch())
    assert rows == [3, 6, 3]  # the teacher once, both passes, the adversarial one


def test_the_distillation_token_ends_the_students_prompt_and_learns() -> None:
    of = batch()
    _, got = gradient(objective(mode="token").eval(), of)
    _, without = gradient(objective(mode="self").eval(), of)
    rows = next(n for n in got if got[n].shape == objective().model.embedding.shape)
    assert got[rows][RENDERER.distill].abs().max() > 0 and without[rows][RENDERER.distill].abs().max() == 0


def test_the_divergence_is_that_of_the_distillation_tokens_pass() -> None:
    of, model = batch(), tiny_model(RENDERER).eval()
    parts, _ = gradient(objective(model, mode="token").eval(), of)
    assert of.teacher is not None
    with torch.no_grad():
        teacher, ended, plain = (
            model.sid_logits(*prompt, of.target) for prompt in (of.teacher, _ended(of.prompt, RENDERER), of.prompt)
        )
    assert parts["kl"] == pytest.approx(of.plain_mean(sid_kl(teacher, ended)).item(), rel=1e-3)
    assert parts["kl"] != pytest.approx(of.plain_mean(sid_kl(teacher, plain)).item(), rel=1e-2)


@BACKBONES
def test_hidden_states_are_compared_on_all_decoder_layers_where_the_first_code_is_predicted(backbone: str) -> None:
    made = objective(tiny_model(RENDERER, backbone=backbone), mode="codi", projection=True, alpha_kl=0.0)
    teaching = made.teach(batch())
    assert teaching is not None
    assert [tuple(h.shape) for h in teaching.hidden] == [(3, 32)] * made.model.config.decoder_layers
    parts, got = gradient(made.eval(), batch())
    assert parts["l1"] > 0 and "kl" not in parts
    assert got["projection.weight"].abs().max() > 0
    assert not any(layer._forward_hooks for layer in made.model.modules())


@pytest.fixture
def weight() -> Iterator[nn.Parameter]:
    torch.manual_seed(1)
    made = nn.Parameter(torch.randn(6, 4))
    made.grad = torch.randn(6, 4)
    yield made


def test_fgm_moves_along_the_gradient_and_restores_every_bit(weight: nn.Parameter) -> None:
    before = weight.detach().clone()
    with pytest.raises(RuntimeError), perturbed(weight, 0.6, pad=2) as moved:
        assert moved
        step = weight.detach() - before
        assert step.norm().item() == pytest.approx(0.6, rel=1e-4)
        assert step[2].abs().max() == 0
        assert weight.grad is not None
        wanted = weight.grad.clone()
        wanted[2] = 0
        assert torch.allclose(step, 0.6 * wanted / wanted.norm(), atol=1e-5)
        raise RuntimeError
    assert torch.equal(weight, before)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), None])
def test_fgm_stays_where_there_is_no_direction(weight: nn.Parameter, value: float | None) -> None:
    weight.grad = None if value is None else torch.full_like(weight, value)
    before = weight.detach().clone()
    with perturbed(weight, 0.6, pad=0) as moved:
        assert not moved
        assert torch.equal(weight, before)


def test_an_adversarial_pass_adds_its_gradient_and_leaves_the_weights_alone() -> None:
    model, of = tiny_model(RENDERER), batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    clean, base = gradient(objective(model).eval(), of)
    parts, got = gradient(objective(model, epsilon=0.05).eval(), of)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert parts["adversarial"] > clean["loss"]  # uphill
    by_hand = deepcopy(model)
    rows = next(n for n, p in by_hand.named_parameters() if p.shape == by_hand.embedding.shape)
    direction = base[f"model.{rows}"].clone()
    direction[RENDERER.pad] = 0
    with torch.no_grad():
        by_hand.get_parameter(rows).add_(0.05 * direction / direction.norm())
    made = objective(by_hand).eval()
    teaching = objective(model).eval().teach(of)  # the clean teacher, reused
    loss, _ = made.base(of, teaching, regularised=False)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, p in made.named_parameters():
        if p.grad is not None:
            assert torch.allclose(got[name], base[name] + p.grad, atol=1e-5), name
