"""The training loop: a run killed anywhere ends with the same weights as an uninterrupted one."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_prompt, tiny_renderer

from onesearch.errors import ConfigError
from training.batches import PlannedStep, collate, plan
from training.distill import SdftObjective
from training.loop import learning_rate, read_log, run
from training.objective import Objective
from training.samples import Sample
from training.sft import SftObjective
from training.stages import SdftStage, SftStage

RENDERER = tiny_renderer()
STEPS = 9


def samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    sizes = RENDERER.sids.spec.sizes
    return [
        Sample(
            tiny_prompt(RENDERER, "red shoes blue"[: rng.integers(3, 14)], i),
            RENDERER.target(rng.integers(0, sizes).astype(np.uint16)),
            float(i % 2 + 1),
            tiny_prompt(RENDERER, "red shoes", i),
        )
        for i in range(count)
    ]


DATA = {"search": samples(30), "title_to_sid": samples(9, 1)}
PLAIN = SftStage("first", STEPS, 4, mixture={"search": 0.5, "title_to_sid": 0.5})
DISTILL = SdftStage("second", STEPS, 4, mixture={"search": 1.0}, mode="ema", alpha_r=0.5, epsilon=0.1, kw_mix=0)


class Stopping(SdftObjective):
    """Stops like an interrupted process."""

    left = -1

    def gradients(self, step: PlannedStep) -> dict[str, float]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().gradients(step)


def train(folder: Path, stop_at: int = -1, stage: SftStage = DISTILL) -> Objective:
    model = tiny_model(RENDERER)
    if isinstance(stage, SdftStage):
        objective: Objective = Stopping(model, RENDERER, DATA, stage)
        objective.left = stop_at  # type: ignore[attr-defined]
    else:
        objective = SftObjective(model, RENDERER, DATA)
    run(objective, stage, planned(stage), folder, seed=3, checkpoint_every=2)
    return objective


def planned(stage: SftStage) -> list[PlannedStep]:
    shares = stage.shares({task: len(rows) for task, rows in DATA.items()})
    return plan(shares, DATA, stage.steps, stage.batch, (3, 0))


def test_the_plan_is_decided_by_the_seed_and_covers_an_epoch_before_repeating() -> None:
    assert all((a.samples == b.samples).all() for a, b in zip(planned(PLAIN), planned(PLAIN), strict=True))
    assert [s.place for s in planned(PLAIN)] == list(range(STEPS))
    epoch = np.concatenate([s.samples for s in plan({"search": 1.0}, DATA, 8, 4, (0, 0))])
    assert sorted(epoch.tolist()) == list(range(30))


def test_shares_follow_the_mixture_or_the_root_of_the_sizes() -> None:
    sizes = {"search": 100, "title_to_sid": 25}
    assert SftStage("s", 1, tasks=("search", "title_to_sid")).shares(sizes) == pytest.approx(
        {"search": 2 / 3, "title_to_sid": 1 / 3}
    )
    mixed = SftStage("s", 1, mixture={"search": 4.0, "title_to_sid": 1.0}, kw_mix=0.25)
    assert mixed.wanted() == ("search", "title_to_sid", "search_keywords")
    assert mixed.shares(sizes | {"search_keywords": 100}) == pytest.approx(
        {"search": 0.6, "search_keywords": 0.2, "title_to_sid": 0.2}
    )
    assert mixed.shares({"title_to_sid": 1}) == {"title_to_sid": 1.0}  # no samples, no share
    with pytest.raises(ConfigError, match="no samples of search"):
        mixed.shares({})


def test_the_shares_of_several_processes_are_the_whole_batch() -> None:
    rows = DATA["search"][:5]
    whole = collate("search", rows, 0)
    losses = torch.arange(1.0, 6.0)
    weights = torch.tensor([s.weight for s in rows])
    assert whole.mean(losses).item() == pytest.approx((losses * weights).sum().item() / (5 * weights.sum().item()))
    assert whole.plain_mean(losses).item() == pytest.approx(losses.mean().item() / 5)
    for world in (2, 3, 7):
        parts = [collate("search", rows, 0, rank, world) for rank in range(world)]
        mine = [losses[rank::world] if rank < 5 else losses[:1] for rank in range(world)]
        for name in ("mean", "plain_mean"):
            total = sum(getattr(p, name)(x).item() for p, x in zip(parts, mine, strict=True))
            assert total == pytest.approx(getattr(whole, name)(losses).item())


@pytest.mark.parametrize("stop_at", [1, 2, 5, 8])
def test_resume_is_exact(tmp_path: Path, stop_at: int) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at)
    resumed = train(tmp_path / "cut")
    equal(whole, resumed)  # the moving average included
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")


def test_the_same_seed_gives_the_same_loss_curve(tmp_path: Path) -> None:
    equal(train(tmp_path / "a", stage=PLAIN), train(tmp_path / "b", stage=PLAIN))
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    assert {row["task"] for row in read_log(tmp_path / "a")} == {"search", "title_to_sid"}


def equal(a: Objective, b: Objective) -> None:
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_torn_log_line_does_not_survive_a_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 5)
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 5, "lo')
    train(tmp_path)
    assert [row["step"] for row in read_log(tmp_path)] == list(range(STEPS))


def test_a_run_killed_between_the_two_renames_of_a_checkpoint_resumes(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", 5)
    (tmp_path / "cut" / "checkpoint").rename(tmp_path / "cut" / "checkpoint.old")
    resumed = train(tmp_path / "cut")
    equal(whole, resumed)


def test_a_finished_run_is_not_trained_again_and_leaves_a_curve(tmp_path: Path) -> None:
    first = train(tmp_path)
    done = json.loads((tmp_path / "checkpoint" / "done.json").read_text())["steps"]
    second = train(tmp_path, stop_at=0)
    assert done == STEPS
    equal(first, second)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    stage = SftStage("s", 100, mixture={"search": 1.0}, lr=1.0, warmup=0.1)
    rates = [learning_rate(stage, i) for i in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))
