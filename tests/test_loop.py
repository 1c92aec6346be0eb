"""The training loop: a run killed anywhere ends with the same weights as an uninterrupted one."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onesearch.sequence import Prompt
from training.batches import PlannedStep, collate, plan
from training.loop import LoopConfig, learning_rate, read_log, run
from training.recipe import StageConfig
from training.samples import Sample

STAGES = (
    StageConfig("first", 7, {"search": 0.5, "title_to_sid": 0.5}, batch=4),
    StageConfig("second", 6, {"search": 1.0}, batch=4, lr=3e-3),
)


def samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    history = np.zeros((3, 2), dtype=np.float32)
    return [
        Sample(Prompt(rng.integers(1, 9, rng.integers(2, 9)), history), rng.integers(1, 9, 5), float(i % 2 + 1))
        for i in range(count)
    ]


DATA = {"search": samples(30), "title_to_sid": samples(9, 1)}


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Embedding(10, 8), nn.Dropout(0.3), nn.Linear(8, 10))


def loss_of(network: nn.Module, stop_at: int | None = None) -> object:
    calls = {"count": 0}

    def loss(step: PlannedStep) -> Tensor:
        calls["count"] += 1
        if stop_at is not None and calls["count"] > stop_at:
            raise KeyboardInterrupt
        batch = collate(step.task, [DATA[step.task][i] for i in step.samples], pad=0)
        logits: Tensor = network(batch.ids).mean(dim=1)
        return nn.functional.cross_entropy(logits, batch.target[:, 0])

    return loss


def train(folder: Path, stop_at: int | None = None) -> nn.Module:
    network = model()
    config = LoopConfig(seed=3, precision="fp32", checkpoint_every=2)
    run(network, STAGES, plan(STAGES, DATA, 3), loss_of(network, stop_at), folder, config)  # type: ignore[arg-type]
    return network


def test_the_plan_is_decided_by_the_seed_and_covers_an_epoch_before_repeating() -> None:
    steps = plan(STAGES, DATA, 3)
    again = plan(STAGES, DATA, 3)
    assert all(a.task == b.task and (a.samples == b.samples).all() for a, b in zip(steps, again, strict=True))
    assert [s.place for s in steps] == [*range(7), *range(6)]
    stage = (StageConfig("one", 8, {"search": 1.0}, batch=4),)
    epoch = np.concatenate([s.samples for s in plan(stage, DATA, 0)])
    assert sorted(epoch.tolist()) == list(range(30))


def test_a_task_without_samples_gives_its_share_away() -> None:
    steps = plan(STAGES, {"search": DATA["search"], "title_to_sid": []}, 3)
    assert {s.task for s in steps} == {"search"}


@pytest.mark.parametrize("stop_at", [1, 2, 5, 8, 12])
def test_resume_is_exact(tmp_path: Path, stop_at: int) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", stop_at)
    resumed = train(tmp_path / "cut")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")


def test_a_torn_log_line_does_not_survive_a_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, 5)
    with (tmp_path / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 5, "lo')
    train(tmp_path)
    assert [row["step"] for row in read_log(tmp_path)] == list(range(13))


def test_a_run_killed_between_the_two_renames_of_a_checkpoint_resumes(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", 5)
    (tmp_path / "cut" / "checkpoint").rename(tmp_path / "cut" / "checkpoint.old")
    resumed = train(tmp_path / "cut")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_finished_run_is_not_trained_again_and_leaves_a_curve(tmp_path: Path) -> None:
    first = train(tmp_path)
    done = json.loads((tmp_path / "checkpoint" / "done.json").read_text())["steps"]
    second = train(tmp_path, stop_at=0)
    assert done == 13
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    stage = StageConfig("s", 100, {"search": 1.0}, lr=1.0, warmup=0.1)
    rates = [learning_rate(stage, i) for i in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[9:]))
