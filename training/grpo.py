"""GRPO and TPMA-GRPO (spec §4.12): one update per batch of rollouts, rewarded as items and, for TPMA, as prefixes.

Legend: P prompts of this process, G rollouts of a prompt, K targets, L SID levels, R = P·G rows.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onesearch.errors import DivergedError
from onesearch.model import OneSearchModel
from onesearch.sequence import Prompt
from training.batches import Inputs, PlannedStep
from training.losses import sid_nll
from training.objective import Objective, evaluating
from training.parallel import rank, world
from training.recipe import Precision
from training.rewards import Rewards
from training.rollout import Rollouts, legal_codes, sample, score
from training.samples import ORDER_WEIGHT, Sources
from training.sessions import PageView
from training.stages import GrpoStage, TpmaStage
from training.tpma import gates, marginal_rewards, normalised, policy_loss, prefix_matches
from trie import SidTrie

_DRIFT = {"fp32": 1e-2, "bf16": 0.5, "auto": 0.5}  # largest |log π − log π_old| of one and the same policy


@dataclass(frozen=True)
class PagePrompt:
    """A page view to answer: its prompt, target codes int64 [K, L] of its clicked items, their weights [K]."""

    view: PageView
    prompt: Prompt
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.ids)


def page_prompts(sources: Sources, most: int) -> list[PagePrompt]:
    """Page views with a click on a live item, at most `most`, drawn at random; prompts without keywords."""
    order = np.random.default_rng([sources.seed, 8]).permutation(len(sources.views))
    found: list[PagePrompt] = []
    wanted = order if sources.learn is None else (i for i in order if i in sources.learn)
    for view in (sources.views[i] for i in wanted):
        items = [item for item in view.clicked if item in sources.item_sids]
        if items and len(found) < most:
            fields = sources.encoder.fields(view.context, sources.query_sids[view.context.query])
            targets = np.stack([sources.item_sids[item] for item in items]).astype(np.int64)
            weights = np.asarray([ORDER_WEIGHT if item in view.ordered else 1.0 for item in items])
            found.append(
                PagePrompt(view, sources.renderer.prompt("search", fields), targets, weights / weights.sum())
            )
    return found


@dataclass(frozen=True)
class Credit:
    """What one prompt's rollouts earn: advantage and gate per position [G, L], and numbers for the log."""

    advantages: Tensor
    gate: Tensor
    facts: dict[str, float]


class GrpoObjective(Objective):
    """−1/G Σ_i 1/L Σ_l g · r · Â + aux_sft · CE (+ beta_kl · KL to the model the stage began with).

    Dropout is off, so that the policy that learns is the policy that was sampled and every ratio is 1.
    """

    def __init__(
        self,
        model: OneSearchModel,
        pad: int,
        data: Mapping[str, Sequence[PagePrompt]],
        rewards: Rewards,
        trie: SidTrie,
        stage: GrpoStage,
        seed: int,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(model, precision)
        self.pad, self.data, self.rewards, self.stage, self.seed = pad, data, rewards, stage, seed
        self.trie = trie if stage.constrained else None
        self._precision = precision
        if stage.beta_kl:
            self.reference = deepcopy(model).requires_grad_(False)

    def gradients(self, step: PlannedStep) -> dict[str, float]:
        """See `Objective`; logs reward, validity, dead groups and the size of both advantages."""
        every = [self.data[step.task][i] for i in step.samples]
        mine = every[rank() :: world()]
        rows = mine or every[:1]
        share = len(mine) and 1 / len(every)  # what a prompt counts of the whole batch's mean
        draws = np.stack([self._draws(step.place, i, rows[0].targets.shape[1]) for i in range(len(every))])
        draws = draws[rank() :: world()] if mine else draws[:1]
        prompts = Inputs.of([row.prompt for row in rows], self.pad)
        with evaluating(self):
            with self.autocast():
                rollouts = sample(self.model, prompts, draws[:, :-1], self.stage.temperature, self.trie)
            labels = np.stack([_label(row, draw[-1, 0]) for row, draw in zip(rows, draws, strict=True)])
            codes = rollouts.codes.view(len(rows), self.stage.group, -1)
            if self.stage.logged_positive:
                codes[:, -1] = torch.from_numpy(labels)
            credits = [self.credit(row, codes[i]) for i, row in enumerate(rows)]
            with self.autocast():
                loss, drift = self._loss(prompts, rollouts, codes, labels, credits)
        self.backward(share * loss.sum())
        facts = {name: share * sum(c.facts[name] for c in credits) for name in credits[0].facts}
        return {"loss": share * loss.sum().item(), **facts, "drift": share * drift * len(rows)}

    def credit(self, row: PagePrompt, codes: Tensor) -> Credit:
        """Advantages of one prompt's rollouts, codes int64 [G, L]."""
        matched = prefix_matches(codes, torch.from_numpy(row.targets))
        rewards = torch.from_numpy(self.rewards.score(row.view, codes.numpy())).float()
        overlap = self.stage.reward.overlap
        item = normalised(rewards + overlap * matched[:, -1] / codes.shape[1])
        advantages, gate = item[:, None].expand(codes.shape), torch.ones(codes.shape)
        facts = {
            "reward": rewards.mean().item(),
            "valid": sum(self.rewards.item(c) is not None for c in codes.tolist()) / len(codes),
            "hit": float((matched[:, -1] == codes.shape[1]).any()),
            "judged": self.rewards.judged_share(row.view, codes.numpy().astype(np.uint16)),
            "item_advantage": item.abs().mean().item(),
            "dead_item": float(not item.any()),
        }
        if isinstance(self.stage, TpmaStage):
            if not self.stage.strict_prefix:
                matched = prefix_matches(codes, torch.from_numpy(row.targets), strict=False)
            position = normalised(marginal_rewards(matched, torch.tensor(self.stage.level_weights())))
            advantages, gate = position + self.stage.w_item * advantages, gates(matched)
            facts |= {
                "position_advantage": position.abs().mean().item(),
                "dead_position": float(not position.any()),
            }
        return Credit(advantages, gate, facts)

    def _loss(
        self,
        prompts: Inputs,
        rollouts: Rollouts,
        codes: Tensor,
        labels: npt.NDArray[np.int64],
        credits: list[Credit],
    ) -> tuple[Tensor, float]:
        """Loss per prompt [P], and the largest log-ratio of the sampled rows."""
        group, levels = codes.shape[1:]
        flat = codes.flatten(0, 1)
        memory = self.model.encode(*prompts)
        many, mask = memory.repeat_interleave(group, dim=0), prompts.mask.repeat_interleave(group, dim=0)
        logits = self.model.sid_head(self.model.decode(many, mask, self._tokens(flat)))
        logp = score(logits, flat, self.stage.temperature, self._legal(rollouts, flat)).view(codes.shape)
        old = logp.detach().clone()
        sampled = slice(0, group - 1 if self.stage.logged_positive else group)
        old[:, sampled] = rollouts.logp.view(codes.shape)[:, sampled]
        drift = (logp.detach() - old).abs().max().item()
        if drift > _DRIFT[self._precision]:
            raise DivergedError(f"rollouts drifted: |log π − log π_old| is {drift:.3g} before the first update")
        advantages = torch.stack([c.advantages for c in credits])
        gate = torch.stack([c.gate for c in credits])
        loss = policy_loss(logp, old, advantages, gate).mean(dim=1)
        if self.stage.aux_sft:
            target = torch.from_numpy(labels)
            levels_of = self.model.sid_head(self.model.decode(memory, prompts.mask, self._tokens(target)))
            loss = loss + self.stage.aux_sft * sid_nll(levels_of, target) / levels
        if self.stage.beta_kl:
            with torch.no_grad():
                kept = self.reference.encode(*prompts).repeat_interleave(group, dim=0)
                logits = self.reference.sid_head(self.reference.decode(kept, mask, self._tokens(flat)))
                start = score(logits, flat, self.stage.temperature, self._legal(rollouts, flat)).view(codes.shape)
            loss = loss + self.stage.beta_kl * ((start - logp).exp() - (start - logp) - 1).mean(dim=(1, 2))
        return loss, drift

    def _legal(self, rollouts: Rollouts, codes: Tensor) -> tuple[Tensor, ...] | None:
        """The masks that scoring shares with sampling; a logged positive is always a path of the trie."""
        if rollouts.legal is None or self.trie is None or not self.stage.logged_positive:
            return rollouts.legal
        sizes = self.model.config.sid_sizes
        return tuple(legal_codes(self.trie, codes[:, :t], size) for t, size in enumerate(sizes))

    def _tokens(self, codes: Tensor) -> Tensor:
        return torch.from_numpy(self.model.config.sids.token_ids(codes.numpy()))

    def _draws(self, place: int, number: int, levels: int) -> npt.NDArray[np.float64]:
        """Uniform numbers [G + 1, L] of one prompt of one step, whichever process has it; the last draws its label."""
        return np.random.default_rng([self.seed, place, number]).random((self.stage.group + 1, levels))


def _label(row: PagePrompt, uniform: float) -> npt.NDArray[np.int64]:
    """One of the targets, orders twice as likely."""
    at = int(np.searchsorted(row.weights.cumsum(), uniform, side="right"))
    target: npt.NDArray[np.int64] = row.targets[min(at, len(row.targets) - 1)]
    return target
