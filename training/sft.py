"""Supervised fine-tuning, stages 1–3 (spec §4.1–4.3): samples of a recipe's tasks through the one training loop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from onesearch.model import ModelConfig, OneSearchModel
from onesearch.sequence import Renderer
from training.batches import Batch, PlannedStep, collate, plan
from training.loop import LoopConfig, run
from training.losses import sid_cross_entropy, text_cross_entropy
from training.progress import track
from training.recipe import Recipe, StageConfig
from training.samples import MAKERS, Sample, Sources

TEXT_TASKS = {
    *("sid_to_query", "sid_to_title", "query_to_category", "title_to_category", "sid_to_category"),
    *("query_to_title", "title_to_query"),
}


def train(recipe: Recipe, sources: Sources, folder: Path) -> tuple[OneSearchModel, dict[str, float]]:
    """Train a fresh model; returns it in eval mode with the mean loss per task of the last stage."""
    torch.manual_seed(recipe.seed)
    shape = asdict(recipe.model)
    model = OneSearchModel(
        ModelConfig.for_renderer(sources.renderer, max_positions=sources.renderer.config.max_ids, **shape)
    )
    tasks = list(dict.fromkeys(task for stage in recipe.stages for task in stage.mixture))
    data: dict[str, Sequence[Sample]] = {
        task: list(track(MAKERS[task](sources), f"render {task}")) for task in tasks
    }
    config = LoopConfig(recipe.seed, recipe.precision, recipe.checkpoint_every)
    losses = run(
        model,
        recipe.stages,
        plan(recipe.stages, data, recipe.seed),
        lambda step: batch_loss(model, sources.renderer, _batch(step, data, sources.renderer.pad)),
        folder,
        config,
    )
    return model, losses


def _render(task: str, sources: Sources, stages: Sequence[StageConfig]) -> list[Sample]:
    """Samples of a task, no more than the stages can be expected to use."""
    shares = (stage.mixture.get(task, 0.0) / sum(stage.mixture.values()) for stage in stages)
    uses = sum(share * stage.steps * stage.batch for share, stage in zip(shares, stages, strict=True))
    return list(track(islice(MAKERS[task](sources), math.ceil(uses)), f"render {task}"))


def batch_loss(model: OneSearchModel, renderer: Renderer, batch: Batch) -> Tensor:
    """Cross-entropy of one batch, per token: SID targets over each level's codebook, text over the vocabulary."""
    if batch.task in TEXT_TASKS:
        logits = model.text_logits(batch.ids, batch.mask, batch.history, batch.target)
        return text_cross_entropy(logits, batch.target, batch.weight, renderer.pad)
    levels = model.sid_logits(batch.ids, batch.mask, batch.history, batch.target)
    codes = torch.from_numpy(renderer.sids.codes(batch.target.numpy()).astype("int64"))
    return sid_cross_entropy(levels, codes, batch.weight)


def _batch(step: PlannedStep, data: Mapping[str, Sequence[Sample]], pad: int) -> Batch:
    return collate(step.task, [data[step.task][i] for i in step.samples], pad)
