"""Listwise DPO (spec §4.10): a positive against several negatives of the same prompt, relative to the model the
stage began with.

Legend: B positives, n negatives of each, L SID levels.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from onesearch.model import OneSearchModel
from onesearch.sequence import Prompt
from training.batches import Inputs, PlannedStep
from training.objective import Objective, evaluating
from training.parallel import rank, world
from training.pars import Preference, gap_weight, preferences
from training.recipe import Precision
from training.rollout import score
from training.samples import Sources
from training.stages import DpoStage


@dataclass(frozen=True)
class Choice:
    """A prompt with codes int64 [1 + n, L], the positive first, and weights float32 [n] of its negatives."""

    prompt: Prompt
    codes: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.ids)


def choices(sources: Sources, stage: DpoStage, found: Sequence[Preference]) -> list[Choice]:
    """Preferences in random order, no more than the stage uses."""
    order = np.random.default_rng([sources.seed, 7]).permutation(len(found))[: stage.steps * stage.batch]
    return [choice(sources, stage, found[i]) for i in order]


def logged_preferences(sources: Sources, negatives: int) -> list[Preference]:
    """Preferences of the log over live items (PARS phase 2: levels 1–3 against 4–6)."""
    names = sources.items.select("item_id", "category_level1_name", "category_level2_name").iter_rows()
    categories = {item: f"{a}/{b}" for item, a, b in names if item in sources.item_sids}
    return preferences(sources.views, categories, _same_sid(sources), negatives, sources.seed, sources.learn)


def choice(sources: Sources, stage: DpoStage, preference: Preference) -> Choice:
    """A preference as the model reads it: the student's prompt, without keywords."""
    context = sources.views[preference.view].context
    prompt = sources.renderer.prompt("search", sources.encoder.fields(context, sources.query_sids[context.query]))
    best, *rest = preference.rewards
    weights = [
        gap_weight(best, reward, stage.exponent, stage.least_gap, stage.cap) if stage.weighted else 1.0
        for reward in rest
    ]
    codes = np.stack([sources.item_sids[item] for item in preference.items]).astype(np.int64)
    return Choice(prompt, codes, np.asarray(weights, dtype=np.float32))


def listwise_loss(
    gap: Tensor, present: Tensor, weights: Tensor, beta: float, margin: float = 0.0, drop: Tensor | None = None
) -> Tensor:
    """−log σ(−log Σ_l exp(w_l β (Δ_l − Δ_w) + δ)) = softplus(logsumexp(·)), [B]; finite for every input.

    gap [B, n]: Δ_l − Δ_w with Δ = log π_θ − log π_ref of whole SIDs. present bool [B, n]: which negatives there are.
    weights [B, n]. drop [B]: added to every exponent (keeps the positive likely).
    """
    exponents = weights * beta * gap + margin
    if drop is not None:
        exponents = exponents + drop[:, None]
    return F.softplus(torch.logsumexp(exponents.masked_fill(~present, -torch.inf), dim=1))


def without_shared_prefix(logp: Tensor, codes: Tensor) -> Tensor:
    """logp [B, 1 + n, L] with the gradient of every negative's codes before it leaves the positive cut off."""
    shared = (codes[:, 1:] == codes[:, :1]).long().cumprod(dim=2).bool()
    return torch.cat([logp[:, :1], torch.where(shared, logp[:, 1:].detach(), logp[:, 1:])], dim=1)


class DpoObjective(Objective):
    """Listwise DPO with a reference fixed at the start of the stage. Dropout is off, so the first gap is zero."""

    def __init__(
        self,
        model: OneSearchModel,
        pad: int,
        data: Mapping[str, Sequence[Choice]],
        stage: DpoStage,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(model, precision)
        self.reference = deepcopy(model).requires_grad_(False)
        self.pad, self.data, self.stage = pad, data, stage

    def gradients(self, step: PlannedStep) -> dict[str, float]:
        """See `Objective`; logs the mean gap and the share of negatives ranked below their positive."""
        every = [self.data[step.task][i] for i in step.samples]
        mine = every[rank() :: world()]
        rows = mine or every[:1]
        share = len(mine) and 1 / len(every)  # what a row counts of the whole batch's mean
        codes, present, weights = _padded(rows)
        prompts = Inputs.of([row.prompt for row in rows], self.pad)
        with evaluating(self), self.autocast():
            with torch.no_grad():
                reference = self.log_probabilities(self.reference, prompts, codes)
            policy = self.log_probabilities(self.model, prompts, codes)
            kept = without_shared_prefix(policy, codes) if self.stage.mask_shared_prefix else policy
            delta = (kept - reference).sum(dim=2)
            gap = delta[:, 1:] - delta[:, :1]
            drop = self.stage.regulariser * F.relu((reference - policy)[:, 0].sum(dim=1))
            losses = listwise_loss(gap, present, weights, self.stage.beta, self.stage.margin, drop)
            nll = -policy[:, 0].mean(dim=1)
            loss = share * (losses + self.stage.alpha_sft * nll).sum()
        self.backward(loss)
        ranked = ((gap < 0) & present).sum(dim=1) / present.sum(dim=1)
        values = {"dpo": losses, "nll": nll, "gap": (gap * present).sum(1) / present.sum(1), "ranked": ranked}
        return {"loss": loss.item(), **{name: share * value.sum().item() for name, value in values.items()}}

    def log_probabilities(self, model: OneSearchModel, prompts: Inputs, codes: Tensor) -> Tensor:
        """log π of each code, [B, 1 + n, L]; the prompt is encoded once."""
        count = codes.shape[1]
        memory = model.encode(*prompts).repeat_interleave(count, dim=0)
        flat = codes.flatten(0, 1)
        target = torch.from_numpy(model.config.sids.token_ids(flat.numpy()))
        levels = model.sid_head(model.decode(memory, prompts.mask.repeat_interleave(count, dim=0), target))
        return score(levels, flat).view(codes.shape)


def _padded(rows: Sequence[Choice]) -> tuple[Tensor, Tensor, Tensor]:
    """codes int64 [B, 1 + n, L], present bool [B, n], weights float32 [B, n]; a missing negative repeats the first."""
    most = max(len(row.weights) for row in rows)
    codes = np.stack(
        [np.concatenate([row.codes, row.codes[1:2].repeat(most - len(row.weights), 0)]) for row in rows]
    )
    present = np.stack([np.arange(most) < len(row.weights) for row in rows])
    weights = np.stack([np.pad(row.weights, (0, most - len(row.weights)), constant_values=1.0) for row in rows])
    return torch.from_numpy(codes), torch.from_numpy(present), torch.from_numpy(weights)


def _same_sid(sources: Sources) -> Callable[[int, int], bool]:
    keys = {item: tuple(sid.tolist()) for item, sid in sources.item_sids.items()}
    return lambda a, b: keys[a] == keys[b]
