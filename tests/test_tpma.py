"""TPMA: the table of hand cases and the properties of spec §4.12."""

import pytest
import torch
from torch import Tensor

from training.tpma import gates, marginal_rewards, normalised, policy_loss, prefix_matches

SHARED, LITERAL = torch.tensor([2.0, 2, 2, 1, 1]), torch.tensor([2.0, 2, 1, 1, 0])
TARGET = torch.tensor([[1, 2, 3, 4, 5]])


def rollout(pattern: str) -> Tensor:
    """`✓✗…`: a rollout that has the target's code where the pattern says so."""
    return torch.tensor([[code if mark == "✓" else 0 for code, mark in zip(TARGET[0], pattern, strict=True)]])


@pytest.mark.parametrize(
    ("pattern", "matched", "marginals", "gate"),
    [
        ("✓✓✓✓✓", [1, 2, 3, 4, 5], [2, 2, 2, 1, 1], [1, 1, 1, 1, 1]),
        ("✗✓✓✓✓", [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]),  # the released code: 0 2 1 1 0, gates to .75
        ("✓✓✓✓✗", [1, 2, 3, 4, 4], [2, 2, 2, 1, 0], [1, 1, 1, 1, 1]),
        ("✓✗✓✓✓", [1, 1, 1, 1, 1], [2, 0, 0, 0, 0], [1, 1, 1 / 2, 1 / 3, 1 / 4]),
        ("✓✓✗✗✓", [1, 2, 2, 2, 2], [2, 2, 0, 0, 0], [1, 1, 1, 2 / 3, 1 / 2]),
    ],
)
def test_hand_cases(pattern: str, matched: list[int], marginals: list[float], gate: list[float]) -> None:
    found = prefix_matches(rollout(pattern), TARGET)
    assert found.tolist() == [matched]
    assert marginal_rewards(found, SHARED).tolist() == [marginals]
    assert gates(found)[0].tolist() == pytest.approx(gate)


def test_the_literal_reading_without_strict_prefixes_is_the_released_codes_table() -> None:
    found = prefix_matches(rollout("✗✓✓✓✓"), TARGET, strict=False)
    assert marginal_rewards(found, LITERAL).tolist() == [[0, 2, 1, 1, 0]]
    assert gates(found)[0].tolist() == pytest.approx([1, 0, 1 / 2, 2 / 3, 3 / 4])


def test_literal_weights_cannot_tell_a_wrong_last_code_and_the_default_can() -> None:
    group = torch.cat([rollout("✓✓✓✓✓"), rollout("✓✓✓✓✗")])
    literal, shared = (marginal_rewards(prefix_matches(group, TARGET), w) for w in (LITERAL, SHARED))
    assert torch.equal(literal[0], literal[1]) and not torch.equal(shared[0], shared[1])


def random_group(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randint(0, 3, (8, 5)), torch.randint(0, 3, (4, 5))


@pytest.mark.parametrize("seed", range(20))
def test_properties_on_random_groups(seed: int) -> None:
    codes, targets = random_group(seed)
    found = prefix_matches(codes, targets)
    rewards = marginal_rewards(found, SHARED)
    by_hand = [
        [
            max(next((k for k in range(level) if a[k] != t[k]), level) for t in targets.tolist())
            for level in range(1, 6)
        ]
        for a in codes.tolist()
    ]
    assert found.tolist() == by_hand
    total = torch.tensor([SHARED[:n].sum() for n in found[:, -1].tolist()])
    assert torch.allclose(rewards.sum(dim=1), total)  # ΣΔR telescopes to R_L of the best target
    assert torch.equal(found, prefix_matches(codes, targets.flip(0)))  # order of targets
    assert ((rewards == 0) | (rewards == SHARED)).all()
    assert (gates(found) >= 0).all() and (gates(found) <= 1).all()
    same = codes[:1].expand(8, 5)
    assert not normalised(marginal_rewards(prefix_matches(same, targets), SHARED)).any()


def test_advantages_use_the_population_deviation_and_equal_rewards_give_exactly_zero() -> None:
    by_hand = (torch.tensor([1.0, 3.0]) - 2) / (1 + 1e-4)
    assert torch.allclose(normalised(torch.tensor([1.0, 3.0])), by_hand)
    assert normalised(torch.full((8,), 0.1)).tolist() == [0.0] * 8
    with pytest.raises(ValueError, match="1 rollouts, expected at least 2"):
        normalised(torch.tensor([1.0]))


def test_the_loss_by_hand_its_clip_and_its_guard() -> None:
    logp, old = torch.log(torch.tensor([[0.5, 0.2]])), torch.log(torch.tensor([[0.25, 0.2]]))
    advantages, gate = torch.tensor([[1.0, -3.0]]), torch.tensor([[1.0, 0.5]])
    assert policy_loss(logp, old, advantages, gate).item() == pytest.approx(-(2.0 - 1.5) / 2)
    assert policy_loss(logp, old, advantages, gate, clip=0.2).item() == pytest.approx(-(1.2 - 1.5) / 2)
    far = torch.tensor([[100.0, 0.0]], requires_grad=True)
    loss = policy_loss(far, torch.zeros(1, 2), advantages, gate)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(far.grad).all()  # type: ignore[arg-type]


def test_the_gradient_of_a_three_token_policy_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    theta = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    codes, targets = torch.randint(0, 4, (6, 3)), torch.randint(0, 4, (2, 3))
    codes[0] = targets[0]
    matched = prefix_matches(codes, targets)
    advantages = (normalised(marginal_rewards(matched, torch.tensor([2.0, 2.0, 1.0]))) + 0.3).double()
    gate = gates(matched).double()

    def log_policy(parameters: Tensor) -> Tensor:
        table = torch.log_softmax(parameters, dim=1)
        return torch.stack([table[level, codes[:, level]] for level in range(3)], dim=1)

    old = log_policy(theta).detach() + 0.1
    policy_loss(log_policy(theta), old, advantages, gate).sum().backward()  # type: ignore[no-untyped-call]
    assert theta.grad is not None
    for i in range(3):
        for j in range(4):
            step = torch.zeros(3, 4, dtype=torch.float64)
            step[i, j] = 1e-6
            up, down = (policy_loss(log_policy(theta + s), old, advantages, gate).sum() for s in (step, -step))
            assert theta.grad[i, j].item() == pytest.approx(((up - down) / 2e-6).item(), abs=1e-7)


def test_open_gates_without_position_rewards_are_grpo() -> None:
    torch.manual_seed(0)
    logp, item = torch.randn(8, 5), normalised(torch.randn(8))
    combined = torch.zeros(8, 5) + 1.0 * item[:, None]  # w = 0, w_item = 1
    tpma = policy_loss(logp, logp, combined, torch.ones(8, 5)).mean()
    assert tpma.item() == pytest.approx(-item.mean().item(), abs=1e-6)  # 1/G Σ Â at ratio 1


SIZE, LEVELS, GROUP, LIMIT = 6, 3, 8, 400


def steps_to_solve(seed: int, tpma: bool) -> int:
    """Updates until a policy over 6³ items writes its one target with probability 0.5."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, SIZE, (1, LEVELS), generator=generator)
    theta = torch.zeros(1 + SIZE + SIZE**2, SIZE, requires_grad=True)
    first = torch.tensor([0, 1, 1 + SIZE])  # row of a prefix: first[level] + its number in base 6
    optimiser = torch.optim.SGD([theta], lr=2.0)

    def rows(codes: Tensor) -> Tensor:
        number, found = torch.zeros(len(codes), dtype=torch.long), []
        for level in range(LEVELS):
            found.append(first[level] + number)
            number = number * SIZE + codes[:, level]
        return torch.stack(found, dim=1)

    def log_policy(codes: Tensor) -> Tensor:
        return torch.log_softmax(theta[rows(codes)], dim=2).gather(2, codes[:, :, None])[:, :, 0]

    for step in range(LIMIT):
        with torch.no_grad():
            if log_policy(target).sum().exp() > 0.5:
                return step
            codes = torch.zeros(GROUP, LEVELS, dtype=torch.long)
            for level in range(LEVELS):
                shares = torch.softmax(theta[rows(codes)[:, level]], dim=1)
                codes[:, level] = torch.multinomial(shares, 1, generator=generator)[:, 0]
        matched = prefix_matches(codes, target)
        advantages = normalised((matched[:, -1] == LEVELS).float())[:, None].expand(GROUP, LEVELS)
        gate = torch.ones(GROUP, LEVELS)
        if tpma:
            advantages = normalised(marginal_rewards(matched, torch.tensor([2.0, 2.0, 1.0]))) + advantages
            gate = gates(matched)
        logp = log_policy(codes)
        optimiser.zero_grad()
        policy_loss(logp, logp.detach(), advantages, gate).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return LIMIT


def test_on_a_three_level_bandit_tpma_needs_fewer_steps_than_grpo() -> None:
    pairs = [(steps_to_solve(seed, tpma=True), steps_to_solve(seed, tpma=False)) for seed in range(20)]
    faster = sum(ours < theirs for ours, theirs in pairs)
    assert faster >= 17, pairs  # of 20: a fair coin gives that with probability 0.001
    assert sorted(a for a, _ in pairs)[10] * 2 < sorted(b for _, b in pairs)[10]
