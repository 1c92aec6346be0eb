"""Rollouts: SIDs sampled from the model, with the log-probabilities of exactly the distribution they came from.

Unconstrained rollouts use the softmax over a level's codebook; constrained ones renormalise over the codes that the
trie allows, and the gradient pass scores them with the same masks (spec §4.12).

Legend: P prompts, G rollouts of a prompt, R = P·G rows, S prompt tokens, L SID levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onesearch.model import OneSearchModel
from training.batches import Inputs
from trie import SidTrie

_NEVER = -1e9


@dataclass(frozen=True)
class Rollouts:
    """codes int64 [R, L]; logp float32 [R, L] of each code given the ones before it; legal: per level bool
    [R, sizes[t]], or None when unconstrained."""

    codes: Tensor
    logp: Tensor
    legal: tuple[Tensor, ...] | None


@torch.no_grad()
def sample(
    model: OneSearchModel,
    prompts: Inputs,
    draws: npt.NDArray[np.float64],
    temperature: float = 1.0,
    trie: SidTrie | None = None,
) -> Rollouts:
    """One rollout per row of `draws`, uniform numbers [P, G, L] in [0, 1): equal draws give equal rollouts.

    The model's mode decides about dropout; rollouts of a model that learns from them must have it off.
    """
    count, group, levels = draws.shape
    memory = model.encode(*prompts).repeat_interleave(group, dim=0)
    mask = prompts.mask.repeat_interleave(group, dim=0)
    uniform = torch.from_numpy(draws.reshape(count * group, levels))
    first = torch.from_numpy(model.config.sids.token_ids(np.zeros(levels, np.int64)))
    codes = torch.zeros(count * group, 0, dtype=torch.long)
    logp: list[Tensor] = []
    legal: list[Tensor] = []
    for level in range(levels):
        target = torch.nn.functional.pad(codes + first[:level], (0, 1), value=model.config.pad)
        logits = model.sid_head(model.decode(memory, mask, target))[level]
        if trie is not None:
            legal.append(legal_codes(trie, codes, logits.shape[1]))
        scores = level_scores(logits, temperature, legal[-1] if legal else None)
        drawn = _inverse(scores.double().exp(), uniform[:, level])
        logp.append(scores.gather(1, drawn[:, None])[:, 0])
        codes = torch.cat([codes, drawn[:, None]], dim=1)
    return Rollouts(codes, torch.stack(logp, dim=1), tuple(legal) if trie is not None else None)


def score(
    logits: Sequence[Tensor], codes: Tensor, temperature: float = 1.0, legal: Sequence[Tensor] | None = None
) -> Tensor:
    """Log-probability [R, L] of each code under logits (L tensors [R, sizes[t]]), as `sample` would draw it."""
    levels = [
        level_scores(level, temperature, legal[t] if legal is not None else None).gather(1, codes[:, t : t + 1])
        for t, level in enumerate(logits)
    ]
    return torch.cat(levels, dim=1)


def level_scores(logits: Tensor, temperature: float, legal: Tensor | None) -> Tensor:
    """Log-softmax of one level at a temperature, over the legal codes alone."""
    scaled = logits.float() / temperature
    if legal is not None:
        scaled = scaled.masked_fill(~legal, _NEVER)
    return torch.log_softmax(scaled, dim=-1)


def legal_codes(trie: SidTrie, prefixes: Tensor, size: int) -> Tensor:
    """bool [R, size]: codes that may follow each prefix int64 [R, t]."""
    allowed = np.zeros((len(prefixes), size), dtype=bool)
    rows = [tuple(row) for row in prefixes.tolist()]
    children = {prefix: trie.children(prefix) for prefix in set(rows)}
    for i, prefix in enumerate(rows):
        allowed[i, children[prefix]] = True
    return torch.from_numpy(allowed)


def _inverse(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The code at which the cumulative probability [R, H] passes each uniform number [R]; never one of zero weight."""
    total = probabilities.cumsum(dim=1)
    drawn = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)[:, 0]
    last = probabilities.shape[1] - 1 - (probabilities.flip(1) > 0).long().argmax(dim=1)
    return torch.minimum(drawn, last)
