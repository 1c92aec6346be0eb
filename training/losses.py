"""Losses as pure tensor functions. Every one returns a sum over target tokens per row; the caller averages.

A SID is scored by the softmax over its level's codebook alone, as in serving.

Legend: B rows, L SID levels, T target tokens, V vocabulary, C classes, sizes[t] codes of level t.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sid_nll(logits: Sequence[Tensor], codes: Tensor, gamma: float = 0.0, alpha: float | Tensor = 1.0) -> Tensor:
    """Focal negative log-likelihood −α (1 − p)^γ log p summed over levels, float32 [B] (spec §4.5).

    logits: L tensors [B, sizes[t]]. codes: int64 [B, L]. alpha: one factor, or float32 [B, L] with that of each code.
    γ = 0 and α = 1 give the cross-entropy.
    """
    log_p = -torch.stack(
        [F.cross_entropy(level.float(), codes[:, t], reduction="none") for t, level in enumerate(logits)], dim=1
    )
    if gamma:
        log_p = (1 - log_p.exp()).clamp_min(0) ** gamma * log_p
    return -(alpha * log_p).sum(dim=1)


def class_weights(counts: Tensor, beta: float) -> Tensor:
    """Weights (1 − β) / (1 − β^n), scaled to a mean of 1 over all that was counted, float32 [C]; 0 for n = 0.

    counts: int64 [C], how often each class was seen, n. The inverse of the effective number of samples (Cui et al.,
    Class-Balanced Loss, CVPR 2019): β = 0 weighs all alike, β → 1 by inverse frequency. They scale to a mean of 1 over
    the classes; over the samples the loss keeps its size beside the other terms, however skewed the classes are.
    """
    n = counts.double()
    weights = torch.where(n > 0, (1 - beta) / (1 - beta**n), 0.0)
    return (weights * n.sum() / (weights * n).sum()).float()


def text_nll(logits: Tensor, target: Tensor, pad: int) -> Tensor:
    """Negative log-likelihood summed over valid tokens, float32 [B].

    logits [B, T, V]; target int64 [B, T] with pad after the end.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none")
    return (losses * (target != pad)).sum(dim=1)


def sid_kl(target: Sequence[Tensor], logits: Sequence[Tensor], tau: float = 1.0) -> Tensor:
    """τ² KL(softmax(target/τ) ‖ softmax(logits/τ)) summed over codes and levels, float32 [B] (paper Eq. 4).

    target, logits: L tensors [B, sizes[t]] that predict the same codes. Detach target to keep it fixed.
    """
    divergence = torch.zeros(len(logits[0]))
    for a, b in zip(target, logits, strict=True):
        p, q = (F.log_softmax(x.float() / tau, dim=-1) for x in (a, b))
        divergence = divergence + F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)
    return tau**2 * divergence


def symmetric_kl(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """½ [KL(a ‖ b) + KL(b ‖ a)] summed over levels, float32 [B] (R-Drop, paper Eq. 6)."""
    return 0.5 * (sid_kl(a, b) + sid_kl(b, a))


def hidden_l1(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """Mean over layers and width of |teacher − student| in units of the teacher's standard deviation, [B] (CODI).

    Both: per layer [B, D]; teacher without gradient.
    """
    layers = zip(teacher, student, strict=True)
    gaps = [((t - s).abs() / t.std().clamp_min(1e-6)).mean(dim=1) for t, s in layers]
    return torch.stack(gaps).mean(dim=0)
