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
    (focal_alpha = 2 is the paper's scale). class_balance: β of the effective number of samples, by which rare codes
    of a level weigh more in it (`losses.class_weights`); 0 weighs all alike. epsilon: size of the FGM step on the
    embedding matrix.
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
    class_balance: float = 0.0
    epsilon: float = 0.0
    kw_mix: float = 0.5
    kind: str = "sdft"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha_kl", "teacher_ce", "alpha_l1", "alpha_r", "gamma", "epsilon"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("tau", "focal_alpha"):
            self._require(name, getattr(self, name) > 0, "a positive number")
        for name in ("ema_decay", "class_balance"):
            self._require(name, 0 <= getattr(self, name) < 1, "a share in 0..1, below 1")


@dataclass(frozen=True)
class RewardConfig:
    """The composite reward (spec §4.11). click, order: R_C&O. rate: what R_CTR is, the calibrated click rate or the
    adaptive reward of PARS, clipped to 0..1. invalid: reward of a SID without a live item. bonuses: a JSONL file of
    timed amounts per item, added to R_Rel. overlap: weight of the share of the SID that matches a target, an extra
    for plain GRPO.
    """

    click: float = 3.0
    order: float = 4.0
    rate: Literal["ctr", "adaptive"] = "ctr"
    invalid: float = 0.0
    bonuses: str = ""
    overlap: float = 0.0


@dataclass(frozen=True)
class DpoStage(StageConfig):
    """Listwise DPO on the preferences of PARS (spec §4.9, §4.10); one step is `batch` positives with their negatives.

    source: preferences of the log (phase 2 of PARS), or of `candidates` SIDs that the model writes for each of
    `prompts` page views and the reward model re-ranks (phase 1).
    weighted: weigh each negative by its reward gap, with exponent, least gap and cap. margin: target margin δ.
    alpha_sft: weight of the positive's mean negative log-likelihood. regulariser: keeps the positive's likelihood up.
    mask_shared_prefix: codes that a negative shares with the positive get no gradient from the negative.
    """

    batch: int = 64
    lr: float = 1e-4
    source: Literal["log", "model"] = "log"
    prompts: int = 2000
    candidates: int = 64
    negatives: int = 6
    beta: float = 0.1
    weighted: bool = True
    exponent: float = 1.0
    least_gap: float = 0.1
    cap: float = 4.0
    margin: float = 0.0
    alpha_sft: float = 1.0
    regulariser: float = 0.0
    mask_shared_prefix: bool = False
    kind: str = "dpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("negatives", "prompts", "candidates"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("beta", "least_gap", "cap"):
            self._require(name, getattr(self, name) > 0, "a positive number")
        for name in ("exponent", "margin", "alpha_sft", "regulariser"):
            self._require(name, getattr(self, name) >= 0, "0 or more")


@dataclass(frozen=True)
class GrpoStage(StageConfig):
    """GRPO on the composite reward (spec §4.12); one step is `batch` prompts with `group` rollouts each, one update.

    constrained: rollouts follow the trie, and log-probabilities are renormalised over its codes. aux_sft: weight of
    the cross-entropy of a target drawn from the page view, orders twice as likely. beta_kl: weight of the KL to the
    model the stage began with. logged_positive: a target of the page view takes the place of the last rollout.
    """

    batch: int = 32
    lr: float = 1e-5
    group: int = 8
    temperature: float = 1.0
    constrained: bool = False
    aux_sft: float = 0.1
    beta_kl: float = 0.0
    logged_positive: bool = False
    reward: RewardConfig = field(default_factory=RewardConfig)
    kind: str = "grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("group", self.group >= 2, "at least 2")
        self._require("temperature", self.temperature > 0, "a positive number")
        for name in ("aux_sft", "beta_kl"):
            self._require(name, getattr(self, name) >= 0, "0 or more")


@dataclass(frozen=True)
class TpmaStage(GrpoStage):
    """TPMA-GRPO: an advantage per position from the matched prefix, gated by it, plus w_item times GRPO's.

    weights: of the levels, (2, 2, 2, 1, 1), or the paper's literal (2, 2, 1, 1, 0). strict_prefix: only an unbroken
    prefix counts. w_item = 0 leaves the composite reward unused.
    """

    w_item: float = 1.0
    weights: Literal["shared", "literal"] = "shared"
    strict_prefix: bool = True
    kind: str = "tpma"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("w_item", self.w_item >= 0, "0 or more")

    def level_weights(self) -> tuple[float, ...]:
        """w_l of the five levels."""
        return (2.0, 2.0, 2.0, 1.0, 1.0) if self.weights == "shared" else (2.0, 2.0, 1.0, 1.0, 0.0)


Stage = SftStage | SdftStage | DpoStage | GrpoStage | TpmaStage
