"""Self-distillation fine-tuning (spec §4.4, §4.5, §4.7): the student, who sees no keywords, follows a teacher who
does; R-Drop, focal loss and FGM beside it.

Teacher and student are scored under teacher forcing of the same target, so position t of both predicts code t,
whatever the lengths of their prompts and for every backbone. Passes of one step run as one forward of stacked rows.

Legend: B rows, S prompt tokens, L SID levels, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onesearch.model import OneSearchModel
from onesearch.sequence import Renderer
from training.batches import Batch, Inputs
from training.losses import class_weights, hidden_l1, sid_kl, sid_nll, symmetric_kl
from training.objective import evaluating, perturbed
from training.recipe import Precision
from training.samples import Sample
from training.sft import TEXT_TASKS, SftObjective
from training.stages import SdftStage

Levels = list[Tensor]


@dataclass(frozen=True)
class _Teaching:
    """What the teacher says of a batch: logits per level [B, sizes[t]] and, for codi, hidden states per layer."""

    levels: Levels
    hidden: Sequence[Tensor] = ()


class SdftObjective(SftObjective):
    """CE or focal + α_KL KL + α_R R-Drop + adversarial (CE + α_KL KL) (paper Eq. 8).

    Text tasks of the stage keep their plain cross-entropy; batches without a teacher prompt have no KL.
    """

    def __init__(
        self,
        model: OneSearchModel,
        renderer: Renderer,
        data: Mapping[str, Sequence[Sample]],
        stage: SdftStage,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(model, renderer, data, precision)
        self.stage = stage
        self.code_weights = self._code_weights() if stage.class_balance else []
        if stage.mode == "ema":
            self.average = deepcopy(model).requires_grad_(False)
        if stage.mode == "codi" and stage.projection:
            self.projection = nn.Linear(model.config.d_model, model.config.d_model)
            nn.init.eye_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def batch_gradients(self, batch: Batch) -> dict[str, float]:
        """See `Objective`; logs each term before its factor."""
        if batch.task in TEXT_TASKS:
            return super().batch_gradients(batch)
        with self.autocast():
            teaching = self.teach(batch)
            loss, parts = self.base(batch, teaching, regularised=True)
        self.backward(loss)
        parts = {"loss": loss.item(), **parts}
        if self.stage.epsilon:
            with perturbed(self.model.embedding, self.stage.epsilon, self.renderer.pad) as moved:  # type: ignore[arg-type]
                if moved:
                    with self.autocast():
                        loss, _ = self.base(batch, teaching, regularised=False)
                    self.backward(loss)
                parts["adversarial"] = loss.item() if moved else 0.0
        return parts

    def stepped(self) -> None:
        """Moving average of the weights, once per optimiser step: θ′ ← mθ′ + (1 − m)θ; buffers are copied."""
        if self.stage.mode != "ema":
            return
        with torch.no_grad():
            for average, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
                average.lerp_(new, 1 - self.stage.ema_decay)
            for kept, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
                kept.copy_(buffer)

    def teach(self, batch: Batch) -> _Teaching | None:
        """The teacher's answer without gradient; None when nothing follows it or it is part of the student's pass."""
        if batch.teacher is None or self.stage.mode in ("off", "joint"):
            return None
        model = self.average if self.stage.mode == "ema" else self.model
        with torch.no_grad(), ExitStack() as stack:
            if self.stage.mode == "ema" or not self.stage.teacher_dropout:
                stack.enter_context(evaluating(model))
            if self.stage.mode != "codi":
                return _Teaching(model.sid_logits(*batch.teacher, batch.target))
            states = stack.enter_context(_first_code_states(model, batch.target.shape[1]))
            return _Teaching(model.sid_logits(*batch.teacher, batch.target), states)

    def base(self, batch: Batch, teaching: _Teaching | None, regularised: bool) -> tuple[Tensor, dict[str, float]]:
        """The loss of one forward, with or without R-Drop's second pass, and its terms."""
        stage = self.stage
        joint = stage.mode == "joint" and batch.teacher is not None
        passes = 2 if regularised and stage.alpha_r else 1
        prompts = [batch.prompt] * passes
        if stage.mode == "token" and teaching is not None:
            prompts += [_ended(batch.prompt, self.renderer)] * passes
        if joint:
            prompts.append(batch.teacher)  # type: ignore[arg-type]
        with _first_code_states(self.model, batch.target.shape[1]) as hidden:
            stacked = self.model.sid_logits(
                *_stacked(prompts, self.renderer.pad), batch.target.repeat(len(prompts), 1)
            )
        runs: list[Levels] = [list(run) for run in zip(*(x.chunk(len(prompts)) for x in stacked), strict=True)]
        codes = self.codes(batch.target)
        teacher = runs.pop() if joint else teaching.levels if teaching else None
        counted = runs[:1] if stage.r_drop_single else runs
        alpha = self.alpha(codes)
        nll = [sid_nll(run, codes, stage.gamma, alpha) for run in counted]
        terms = {"ce": batch.mean(torch.stack(nll).mean(dim=0))}
        loss = terms["ce"]
        if joint and regularised and stage.teacher_ce:
            terms["teacher_ce"] = batch.mean(sid_nll(teacher, codes, stage.gamma, alpha))  # type: ignore[arg-type]
            loss = loss + stage.teacher_ce * terms["teacher_ce"]
        if teacher is not None and stage.alpha_kl:
            fixed = [level if joint and stage.symmetric else level.detach() for level in teacher]
            students = runs[passes:] or counted  # the distillation token's passes, where there are any
            terms["kl"] = batch.plain_mean(
                torch.stack([sid_kl(fixed, run, stage.tau) for run in students]).mean(0)
            )
            loss = loss + stage.alpha_kl * terms["kl"]
        if passes == 2:
            pairs = zip(runs[::2], runs[1::2], strict=True)
            terms["r_drop"] = batch.plain_mean(torch.stack([symmetric_kl(a, b) for a, b in pairs]).mean(0))
            loss = loss + stage.alpha_r * terms["r_drop"]
        if teaching is not None and teaching.hidden:
            terms["l1"] = self._l1(batch, teaching, hidden, len(prompts))
            loss = loss + stage.alpha_l1 * terms["l1"]
        return loss, {name: term.item() for name, term in terms.items()}

    def alpha(self, codes: Tensor) -> float | Tensor:
        """α of the focal loss: one factor, or with class balance one per code, float32 [B, L], of int64 [B, L]."""
        if not self.code_weights:
            return self.stage.focal_alpha
        weights = [level[codes[:, t]] for t, level in enumerate(self.code_weights)]
        return self.stage.focal_alpha * torch.stack(weights, dim=1)

    def _code_weights(self) -> list[Tensor]:
        """Per level the class weights float32 [sizes[t]] of its codes, counted over the SID targets of the stage."""
        targets = [s.target for task, rows in self.data.items() if task not in TEXT_TASKS for s in rows]
        sizes = self.renderer.sids.spec.sizes
        if not targets:
            return [torch.ones(size) for size in sizes]
        codes = self.codes(torch.from_numpy(np.stack(targets)))
        counts = [torch.bincount(codes[:, t], minlength=size) for t, size in enumerate(sizes)]
        return [class_weights(count, self.stage.class_balance) for count in counts]

    def _l1(self, batch: Batch, teaching: _Teaching, hidden: Sequence[Tensor], prompts: int) -> Tensor:
        """Distance of hidden states, a mean over rows."""
        project = self.projection if self.stage.projection else nn.Identity()
        gaps = [
            hidden_l1(teaching.hidden, [project(layer) for layer in run])
            for run in zip(*(layer.chunk(prompts) for layer in hidden), strict=True)
        ]
        return batch.plain_mean(torch.stack(gaps).mean(dim=0) * batch.target.shape[1])


def _stacked(prompts: Sequence[Inputs], pad: int) -> Inputs:
    """Prompts of several passes, one below the other, padded to the longest."""
    width = max(prompt.ids.shape[1] for prompt in prompts)

    def wide(table: Tensor, value: int) -> Tensor:
        return F.pad(table, (0, width - table.shape[1]), value=value)

    return Inputs(
        torch.cat([wide(prompt.ids, pad) for prompt in prompts]),
        torch.cat([wide(prompt.mask, 0) for prompt in prompts]),
        torch.cat([prompt.history for prompt in prompts]),
    )


def _ended(prompt: Inputs, renderer: Renderer) -> Inputs:
    """Prompts with the distillation token behind their last token, or in its place when they are full."""
    width = min(prompt.ids.shape[1] + 1, renderer.config.max_ids)
    at = prompt.mask.sum(dim=1, keepdim=True).clamp_max(width - 1)
    longer = width - prompt.ids.shape[1]
    ids = F.pad(prompt.ids, (0, longer), value=renderer.pad).scatter(1, at, renderer.distill)
    return Inputs(ids, F.pad(prompt.mask, (0, longer)).scatter(1, at, 1), prompt.history)


@contextmanager
def _first_code_states(model: OneSearchModel, targets: int) -> Iterator[list[Tensor]]:
    """Collects, per decoder layer, the hidden states [B, D] that predict the first of `targets` codes."""
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList)][-1]
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        states.append(hidden[:, -targets])

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
