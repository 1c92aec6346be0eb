"""Runs the training stages of a recipe one after the other; each starts from the weights of the one before.

A stage's folder is named by the fingerprint of everything that went into it, the stages before it included, so
recipes that begin alike share their first stages and a finished stage is loaded, not trained again.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from onesearch.errors import ConfigError
from onesearch.model import OneSearchModel
from onesearch.model_config import ModelConfig
from onesearch.progress import track
from training.batches import Sized, plan
from training.distill import SdftObjective
from training.dpo import DpoObjective, choices, logged_preferences
from training.grpo import GrpoObjective, PagePrompt, page_prompts
from training.loop import run, summary
from training.objective import Objective
from training.pars import Preference, count
from training.recipe import Precision, Recipe
from training.reranked import reranked_preferences
from training.reward_model import RewardModel
from training.rewards import Relevance, Rewards, read_bonuses
from training.samples import MAKERS, Sample, Sources
from training.sft import SftObjective
from training.stages import DpoStage, GrpoStage, RewardConfig, SdftStage, SftStage

FolderOf = Callable[[str, Mapping[str, Any]], Path]


def train(
    recipe: Recipe,
    sources: Sources,
    folder_of: FolderOf,
    inputs: Mapping[str, Any],
    model: OneSearchModel | None = None,
) -> tuple[OneSearchModel, dict[str, dict[str, float]]]:
    """A model that went through all stages, in eval mode, with the mean loss per stage and task at its end.

    `folder_of` names a stage's folder by what went into it; `inputs` is what went into all of them. model: what to go
    on from, changed in place; None for a new one of the recipe's shape and seed.
    """
    torch.manual_seed(recipe.seed)
    if model is None:
        model = OneSearchModel(ModelConfig.for_renderer(sources.renderer, **asdict(recipe.model)))
    losses: dict[str, dict[str, float]] = {}
    before = ""
    for number, stage in enumerate(recipe.stages):
        folder = folder_of(f"stage-{stage.name}", {**inputs, "stage": asdict(stage), "before": before})
        if (folder / "weights.safetensors").exists():
            model.load_weights(folder / "weights.safetensors")
            losses[stage.name] = summary(folder)
        else:
            losses[stage.name] = _train_stage(model, recipe, number, sources, folder)
        before = folder.name
    return model.eval(), losses


def _train_stage(
    model: OneSearchModel, recipe: Recipe, number: int, sources: Sources, folder: Path
) -> dict[str, float]:
    """Train `model` in place through one stage."""
    stage = recipe.stages[number]
    shares = dict.fromkeys([stage.kind], 1.0)
    if isinstance(stage, SftStage):
        samples = stage_samples(stage, sources)
        shares = stage.shares({task: len(rows) for task, rows in samples.items()})
        data: Mapping[str, Sequence[Sized]] = samples
        objective: Objective = _supervised(model, sources, samples, stage, recipe.precision)
    elif isinstance(stage, DpoStage):
        ranked = {stage.kind: choices(sources, stage, _preferences(model, sources, stage))}
        data, objective = ranked, DpoObjective(model, sources.renderer.pad, ranked, stage, recipe.precision)
    else:
        pages = {stage.kind: page_prompts(sources, stage.steps * stage.batch)}
        data, objective = pages, _rewarded(model, sources, pages, stage, recipe)
    if not any(len(rows) for rows in data.values()):
        raise ConfigError(f"stages.{stage.name}: the data has no clicks to learn from")
    steps = plan(shares, data, stage.steps, stage.batch, (recipe.seed, number))
    return run(objective, stage, steps, folder, 1009 * recipe.seed + number, recipe.checkpoint_every)


def _supervised(
    model: OneSearchModel,
    sources: Sources,
    samples: Mapping[str, Sequence[Sample]],
    stage: SftStage,
    precision: Precision,
) -> Objective:
    if isinstance(stage, SdftStage):
        return SdftObjective(model, sources.renderer, samples, stage, precision)
    return SftObjective(model, sources.renderer, samples, precision)


def _rewarded(
    model: OneSearchModel,
    sources: Sources,
    pages: Mapping[str, Sequence[PagePrompt]],
    stage: GrpoStage,
    recipe: Recipe,
) -> Objective:
    rewards = _rewards(sources, stage.reward)
    return GrpoObjective(
        model, sources.renderer.pad, pages, rewards, sources.trie, stage, recipe.seed, recipe.precision
    )


def _rewards(sources: Sources, config: RewardConfig) -> Rewards:
    relevance = Relevance(sources.items, sources.views, sources.judged)
    bonuses = read_bonuses(Path(config.bonuses)) if config.bonuses else []
    return Rewards(config, sources.item_sids, sources.popularity, count(sources.views), relevance, bonuses)


def _preferences(model: OneSearchModel, sources: Sources, stage: DpoStage) -> list[Preference]:
    logged = logged_preferences(sources, stage.negatives)
    if stage.source == "log":
        return logged
    rewards = _rewards(sources, RewardConfig())
    scorer = RewardModel(sources, rewards.relevance)
    scorer.fit(sources.views, logged, sources.seed)
    sizes = stage.prompts, stage.candidates, stage.negatives
    return reranked_preferences(model, sources, rewards, scorer, *sizes)


def stage_samples(stage: SftStage, sources: Sources) -> dict[str, list[Sample]]:
    """Samples per task, no more than a stage with a given mixture can be expected to use."""
    teach = replace(sources, teach=isinstance(stage, SdftStage) and stage.mode != "off")
    uses = stage.shares(dict.fromkeys(stage.wanted(), 1)) if stage.mixture else {}
    return {
        task: list(track(_some(MAKERS[task](teach), uses.get(task), stage), f"render {task}"))
        for task in stage.wanted()
    }


def _some(samples: Any, share: float | None, stage: SftStage) -> Iterator[Sample]:
    return islice(samples, None if share is None else math.ceil(share * stage.steps * stage.batch))
