"""The policy objectives on a tiny model: gradients, groups, processes, resume."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SIZES, tiny_model, tiny_prompt, tiny_renderer
from torch import Tensor

from onesearch.context import SearchContext
from onesearch.errors import OneSearchError
from training import grpo
from training.batches import PlannedStep, plan
from training.grpo import GrpoObjective, PagePrompt
from training.loop import read_log, run
from training.sessions import PageView
from training.stages import GrpoStage, TpmaStage
from trie import SidTrie

RENDERER = tiny_renderer()
SIDS = np.unique(np.random.default_rng(3).integers(0, SIZES, (60, 5)), axis=0)
TRIE = SidTrie.build(SIDS, SIZES)
PLAIN = GrpoStage("s", 6, 3, group=4, aux_sft=0.0, lr=1e-3)
TPMA = TpmaStage("s", 6, 3, group=4, aux_sft=0.1, lr=1e-3, logged_positive=True, beta_kl=0.1)
STEP = PlannedStep(0, "rl", np.arange(3))


class FirstCode:
    """A reward that anybody can check: the first code, and every SID with an even one is an item."""

    def score(self, view: PageView, codes: np.ndarray) -> np.ndarray:
        return np.asarray(codes)[:, 0].astype(np.float64)

    def item(self, codes: list[int]) -> int | None:
        return 1 if codes[0] % 2 == 0 else None

    def judged_share(self, view: PageView, codes: np.ndarray) -> float:
        return 0.0


def pages(count: int = 5) -> list[PagePrompt]:
    view = PageView(1, 1, 1, "train", "log", SearchContext("q"), (1, 2), (1, 2), (2,))
    weights = np.asarray([1 / 3, 2 / 3])
    return [
        PagePrompt(view, tiny_prompt(RENDERER, "red shoes", i), SIDS[i : i + 2], weights) for i in range(count)
    ]


def objective(stage: GrpoStage, model: torch.nn.Module | None = None) -> GrpoObjective:
    network = model or tiny_model(RENDERER)
    return GrpoObjective(network, RENDERER.pad, {"rl": pages()}, FirstCode(), TRIE, stage, seed=1)  # type: ignore[arg-type]


def gradient(made: GrpoObjective) -> tuple[dict[str, float], Tensor]:
    made.zero_grad()
    values = made.gradients(STEP)
    assert made.model.embedding.grad is not None
    return values, made.model.embedding.grad.clone()


def test_an_item_advantage_of_plain_grpo_is_the_normalised_reward_at_every_position() -> None:
    made = objective(PLAIN)
    codes = torch.tensor([[0, 1, 1, 1, 1], [2, 1, 1, 1, 1], [4, 0, 0, 0, 0], [6, 0, 0, 0, 0]])
    credit = made.credit(pages()[0], codes)
    expected = (torch.tensor([0.0, 2, 4, 6]) - 3) / (5**0.5 + 1e-4)
    assert torch.allclose(credit.advantages, expected[:, None].expand(4, 5), atol=1e-5)
    assert (credit.gate == 1).all()
    assert credit.facts["valid"] == 1.0 and credit.facts["dead_item"] == 0.0


def test_tpma_without_position_rewards_and_with_open_gates_is_grpo(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = gradient(objective(PLAIN))
    stage = TpmaStage("s", 6, 3, group=4, aux_sft=0.0, w_item=1.0)
    _, different = gradient(objective(stage))
    monkeypatch.setattr(grpo, "gates", lambda matched: torch.ones(matched.shape))
    monkeypatch.setattr(grpo, "marginal_rewards", lambda matched, weights: torch.zeros(matched.shape))
    _, same = gradient(objective(stage))
    assert torch.allclose(plain, same, atol=1e-7) and not torch.allclose(plain, different, atol=1e-4)


def test_a_wrong_first_code_shuts_the_gates_of_all_later_ones() -> None:
    page = pages()[0]
    right = torch.from_numpy(page.targets[0])
    lost = right.clone()
    lost[0] = next(code for code in range(SIZES[0]) if code not in page.targets[:, 0])
    credit = objective(TPMA).credit(page, torch.stack([right, right, right, lost]))
    assert credit.gate.tolist() == [[1] * 5, [1] * 5, [1] * 5, [1, 0, 0, 0, 0]]
    item = torch.full((4,), float(right[0]))
    item[3] = float(lost[0])
    spread = (item - item.mean()) / (item.std(correction=0) + 1e-4)
    position = torch.tensor([1.0, 1.0, 1.0, -3.0]) / 3**0.5  # a marginal earned by three of four, of any weight
    assert torch.allclose(credit.advantages, spread[:, None] + position[:, None], atol=1e-3)


def test_dead_groups_are_counted_and_give_no_gradient() -> None:
    made = objective(TpmaStage("s", 6, 3, group=4, aux_sft=0.0))
    same = torch.from_numpy(SIDS[30:31]).expand(4, 5)
    credit = made.credit(pages()[0], same)
    assert credit.facts["dead_item"] == credit.facts["dead_position"] == 1.0
    assert not credit.advantages.any()
    assert credit.facts["item_advantage"] == credit.facts["position_advantage"] == 0.0
    values, _ = gradient(made)
    assert {"reward", "valid", "hit", "dead_item", "dead_position", "item_advantage", "position_advantage"} <= set(
        values
    )


def test_a_logged_positive_makes_every_group_hold_a_hit() -> None:
    stage = TpmaStage("s", 6, 3, group=4)
    assert gradient(objective(replace(stage, logged_positive=True)))[0]["hit"] == 1.0
    assert gradient(objective(replace(stage, logged_positive=True, constrained=True)))[0]["hit"] == 1.0
    assert gradient(objective(stage))[0]["hit"] < 1.0


def test_labels_are_drawn_from_all_targets_and_orders_twice_as_often() -> None:
    row = pages()[0]
    uniform = (np.arange(300) + 0.5) / 300
    labels = [tuple(grpo._label(row, u)) for u in uniform]
    assert labels.count(tuple(row.targets[0])) == 100 and labels.count(tuple(row.targets[1])) == 200


def test_the_auxiliary_term_is_the_mean_likelihood_of_the_label() -> None:
    model = tiny_model(RENDERER)
    alone, both = (objective(replace(PLAIN, aux_sft=share), model).gradients(STEP)["loss"] for share in (0.0, 0.5))
    assert both - alone == pytest.approx(0.5 * np.mean(np.log(SIZES)), rel=0.1)  # a fresh model knows nothing


def test_every_prompt_of_every_step_draws_a_label_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[float] = []
    label = grpo._label

    def drawn(row: PagePrompt, uniform: float) -> np.ndarray:
        draws.append(uniform)
        return label(row, uniform)

    monkeypatch.setattr(grpo, "_label", drawn)
    made = objective(TPMA)
    for place in range(6):
        made.gradients(PlannedStep(place, "rl", np.arange(3)))
    assert len(set(draws)) == len(draws) == 18 and min(draws) < 1 / 3 < max(draws)


def test_a_policy_that_is_not_the_one_that_was_sampled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = grpo.sample
    drifted = lambda *args: replace(original(*args), logp=original(*args).logp + 0.5)  # noqa: E731
    monkeypatch.setattr(grpo, "sample", drifted)
    with pytest.raises(OneSearchError, match="drifted"):
        objective(PLAIN).gradients(STEP)


@pytest.mark.parametrize("constrained", [False, True])
def test_updates_raise_the_reward(constrained: bool) -> None:
    made = objective(replace(PLAIN, group=8, constrained=constrained))
    optimiser = torch.optim.Adam(made.model.parameters(), lr=3e-3)
    rewards = []
    for place in range(25):
        optimiser.zero_grad()
        rewards.append(made.gradients(PlannedStep(place, "rl", np.arange(3)))["reward"])
        optimiser.step()
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.5


@pytest.mark.parametrize("stage", [PLAIN, TPMA], ids=["grpo", "tpma"])
def test_the_parts_of_several_processes_sum_up(stage: GrpoStage, monkeypatch: pytest.MonkeyPatch) -> None:
    values, whole = gradient(objective(stage))
    total, summed = dict.fromkeys(values, 0.0), torch.zeros_like(whole)
    monkeypatch.setattr(grpo, "world", lambda: 4)  # one more than there are prompts
    for rank in range(4):
        monkeypatch.setattr(grpo, "rank", lambda rank=rank: rank)
        part, piece = gradient(objective(stage))
        summed += piece
        for name, value in part.items():
            total[name] += value
    assert {k: v for k, v in total.items() if k != "drift"} == pytest.approx(
        {k: v for k, v in values.items() if k != "drift"}, abs=1e-5
    )
    assert torch.allclose(summed, whole, atol=1e-5)


class Stopping(GrpoObjective):
    """Stops like an interrupted process."""

    left = -1

    def gradients(self, step: PlannedStep) -> dict[str, float]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().gradients(step)


def test_resume_is_exact(tmp_path: Path) -> None:
    def train(folder: Path, stop_at: int = -1) -> GrpoObjective:
        data = {"rl": pages()}
        made = Stopping(tiny_model(RENDERER), RENDERER.pad, data, FirstCode(), TRIE, TPMA, seed=1)  # type: ignore[arg-type]
        made.left = stop_at
        run(made, TPMA, plan({"rl": 1.0}, data, TPMA.steps, TPMA.batch, (1, 0)), folder, 3, 2)
        return made

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", 5)
    resumed = train(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "cut")
