"""Supervised fine-tuning (spec §4.1–4.3): cross-entropy of one batch of one task."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from onesearch.model import OneSearchModel
from onesearch.sequence import Renderer
from training.batches import Batch, PlannedStep, collate
from training.losses import sid_nll, text_nll
from training.objective import Objective
from training.parallel import rank, world
from training.recipe import Precision
from training.samples import Sample

TEXT_TASKS = {
    *("sid_to_query", "sid_to_title", "query_to_category", "title_to_category", "sid_to_category"),
    *("query_to_title", "title_to_query", "query_to_keywords", "user_to_keywords"),
}


class SftObjective(Objective):
    """Cross-entropy per token: SID targets over each level's codebook, text over the vocabulary."""

    def __init__(
        self,
        model: OneSearchModel,
        renderer: Renderer,
        data: Mapping[str, Sequence[Sample]],
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(model, precision)
        self.renderer = renderer
        self.data = data

    def gradients(self, step: PlannedStep) -> dict[str, float]:
        """See `Objective`."""
        return self.batch_gradients(self.batch(step))

    def batch(self, step: PlannedStep) -> Batch:
        """This process's share of a step."""
        rows = [self.data[step.task][i] for i in step.samples]
        return collate(step.task, rows, self.renderer.pad, rank(), world())

    def batch_gradients(self, batch: Batch) -> dict[str, float]:
        """`gradients` of a batch."""
        with self.autocast():
            loss = self.cross_entropy(batch)
        self.backward(loss)
        return {"loss": loss.item()}

    def cross_entropy(self, batch: Batch) -> Tensor:
        """Weighted mean per target token; scalar."""
        if batch.task in TEXT_TASKS:
            logits = self.model.text_logits(*batch.prompt, batch.target)
            return batch.mean(text_nll(logits, batch.target, self.renderer.pad))
        levels = self.model.sid_logits(*batch.prompt, batch.target)
        return batch.mean(sid_nll(levels, self.codes(batch.target)))

    def codes(self, target: Tensor) -> Tensor:
        """SID token ids int64 [B, L] → codes int64 [B, L]."""
        return torch.from_numpy(self.renderer.sids.codes(target.numpy()).astype("int64"))
