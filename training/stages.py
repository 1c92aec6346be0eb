"""Stages of a recipe: one frozen dataclass per kind, chosen by `kind` in its `[[stages]]` table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from onesearch.errors import ConfigError
from onesearch.sequence import TASKS

SAMPLE_TASKS = (*TASKS, "search_keywords", "search_served")
DistillMode = Literal["off", "self", "joint", "ema", "token", "codi"]


@dataclass(frozen=True)
class StageConfig:
    """What every stage has. warmup is a share of the steps; the rate then falls to a tenth along a cosine."""

    name: str
    steps: int
    batch: int = 256
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"stages.name: {self.name!r}, expected letters, digits, - and _")
        for name in ("steps", "batch"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("lr", self.lr > 0, "a positive rate")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"stages.{self.name}.{name}: {getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True)
class SftStage(StageConfig):
    """`steps` batches, each of one task (spec §4.1–4.3).

    Give either `mixture`, a share per task, or `tasks`: then shares follow the square root of the number of samples.
    kw_mix: share of the `search` batches whose prompt shows the training keywords (spec §4.4); these are the task
    `search_keywords`. `search_served` shows the keywords that serving would (retrieval-augmented training).
    """

    mixture: dict[str, float] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    kw_mix: float = 0.0
    kind: str = "sft"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = f"tasks among {', '.join(SAMPLE_TASKS)}"
        if bool(self.mixture) == bool(self.tasks):
            raise ConfigError(f"stages.{self.name}: expected either mixture, positive shares of {known}, or tasks")
        self._require("tasks", set(self.tasks) <= set(SAMPLE_TASKS), known)
        shares = set(self.mixture) <= set(SAMPLE_TASKS) and all(s > 0 for s in self.mixture.values())
        self._require("mixture", shares, f"positive shares of {known}")
        self._require("kw_mix", 0 <= self.kw_mix <= 1, "a share in 0..1")

    def wanted(self) -> tuple[str, ...]:
        """Tasks whose samples the stage needs."""
        named = self.tasks or tuple(self.mixture)
        return tuple(dict.fromkeys((*named, *(["search_keywords"] if "search" in named and self.kw_mix else []))))

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Share of steps per task, summing to 1. A task without samples gives its share to the others.

        Raises ConfigError when no task has samples.
        """
        raw = {task: math.sqrt(sizes.get(task, 0)) for task in self.tasks} or dict(self.mixture)
        if self.kw_mix and "search" in raw:
            search = raw["search"]
            raw["search"] = search * (1 - self.kw_mix)
            raw["search_keywords"] = raw.get("search_keywords", 0.0) + search * self.kw_mix
        kept = {task: share for task, share in raw.items() if share > 0 and sizes.get(task, 0)}
        if not kept:
            raise ConfigError(f"stages.{self.name}: the data has no samples of {', '.join(raw)}")
        total = sum(kept.values())
        return {task: share / total for task, share in kept.items()}


@dataclass(frozen=True)
class SdftStage(SftStage):
    """Self-distillation fine-tuning (spec §4.4, §4.5, §4.7). Zero switches a term off.

    The published setting is alpha_kl 0.1, tau 1, alpha_r 0.5, epsilon 0.6, gamma 3. kw_mix > 0 teaches the teacher to
    use keywords; the printed form has kw_mix = 0 (spec §9.2).

    mode: whose distribution the student follows. self: the same weights on the keyword prompt, no gradient. joint:
    the same with gradient and its own cross-entropy, weighted teacher_ce; `symmetric` lets the KL move the teacher
    too. ema: a moving average of the weights, decay ema_decay per optimiser step. token: the student also reads its
    prompt with a distillation token at the end, where it follows the teacher. codi: besides the KL an L1 between
    teacher's and student's hidden states of all decoder layers where the first code is predicted, weighted
    alpha_l1; `projection` maps the student's states first.
    alpha_r: R-Drop; r_drop_single: cross-entropy and KL on the first pass only. gamma, focal_alpha: focal loss
    (focal_alpha = 2 is the paper's scale). epsilon: size of the FGM step on the embedding matrix.
    teacher_dropout: keep dropout in the teacher's pass.
    """

    mode: DistillMode = "self"
    alpha_kl: float = 0.1
    tau: float = 1.0
    teacher_ce: float = 1.0
    symmetric: bool = False
    teacher_dropout: bool = False
    ema_decay: float = 0.999
    alpha_l1: float = 1.0
    projection: bool = False
    alpha_r: float = 0.0
    r_drop_single: bool = False
    gamma: float = 0.0
    focal_alpha: float = 1.0
    epsilon: float = 0.0
    kw_mix: float = 0.5
    kind: str = "sdft"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha_kl", "teacher_ce", "alpha_l1", "alpha_r", "gamma", "epsilon"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("tau", "focal_alpha"):
            self._require(name, getattr(self, name) > 0, "a positive number")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "a share in 0..1, below 1")
