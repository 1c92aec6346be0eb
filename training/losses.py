"""Losses as pure tensor functions.

Legend: B batch, L SID levels, T target tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def sid_cross_entropy(logits: Sequence[Tensor], codes: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over samples of the mean cross-entropy of a SID's L codes; scalar.

    logits: L tensors [B, sizes[t]]. codes: int64 [B, L]. weight: float32 [B].
    """
    levels = [F.cross_entropy(level.float(), codes[:, t], reduction="none") for t, level in enumerate(logits)]
    per_sample = torch.stack(levels, dim=1).mean(dim=1)
    return (per_sample * weight).sum() / weight.sum()


def text_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, pad: int) -> Tensor:
    """Weighted mean over valid tokens; scalar. logits [B, T, V], target int64 [B, T] with pad after the end."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    valid = (target != pad) * weight[:, None]
    return (losses * valid).sum() / valid.sum()
