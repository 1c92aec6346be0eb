"""Advantages of GRPO and TPMA-GRPO as resolved in spec §4.12, and their policy loss. Pure functions.

Legend: P prompts, G rollouts of a prompt, K targets of a prompt, L SID levels.
"""

import torch
from torch import Tensor

DELTA = 1e-4
_MAX_LOG_RATIO = 20.0


def prefix_matches(codes: Tensor, targets: Tensor, strict: bool = True) -> Tensor:
    """P_{i,l}: codes of rollout i up to level l that match a target, the best of them; int64 [G, L].

    codes int64 [G, L], targets int64 [K, L]. strict counts the unbroken prefix; otherwise every matching position
    counts, the literal reading of Eq. 13.
    """
    equal = (codes[:, None] == targets[None]).long()
    matches = equal.cumprod(dim=2) if strict else equal
    return matches.cumsum(dim=2).amax(dim=1)


def marginal_rewards(matched: Tensor, weights: Tensor) -> Tensor:
    """ΔR_{i,l}: w_l where level l adds to the match, else 0; float32 [G, L]. weights float32 [L]."""
    before = torch.nn.functional.pad(matched[:, :-1], (1, 0))
    return (matched > before) * weights


def gates(matched: Tensor) -> Tensor:
    """g_1 = 1 and g_l = P_{l−1}/(l−1), in [0, 1]; float32 [G, L]."""
    levels = torch.arange(1, matched.shape[1])
    return torch.cat([torch.ones(len(matched), 1), matched[:, :-1] / levels], dim=1)


def normalised(rewards: Tensor) -> Tensor:
    """(R − mean) / (std + δ) over the first axis, population std; exactly 0 where all are equal.

    rewards [G, ...]. Raises ValueError for fewer than two rollouts.
    """
    if len(rewards) < 2:
        raise ValueError(f"{len(rewards)} rollouts, expected at least 2 to compare")
    deviation = rewards - rewards.mean(dim=0)
    same = rewards.amax(dim=0) == rewards.amin(dim=0)
    return torch.where(same, 0.0, deviation / (rewards.std(dim=0, correction=0) + DELTA))


def policy_loss(logp: Tensor, old: Tensor, advantages: Tensor, gate: Tensor, clip: float | None = None) -> Tensor:
    """−g · r · Â averaged over positions, per rollout; r = exp(log π − log π_old).

    logp, old [..., L]; advantages [..., L]; gate [..., L]. clip: PPO's ε, for several updates on one rollout batch.
    """
    ratio = (logp - old).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    gain = ratio * advantages
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(gate * gain).mean(dim=-1)
