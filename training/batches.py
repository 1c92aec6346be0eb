"""Batches and the plan of a run: which samples of which task make up every step, decided before the first step.

The plan depends on the seed alone, so a resumed run continues with exactly the batches it would have seen.

Legend: B batch, S prompt tokens, T target tokens, E history width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.recipe import StageConfig
from training.samples import Sample

_WINDOW = 32  # batches sorted by length together: little padding, still random


@dataclass(frozen=True)
class Batch:
    """ids, mask int64 [B, S]; history float32 [B, 3, E]; target int64 [B, T], pad where ended; weight float32 [B]."""

    task: str
    ids: Tensor
    mask: Tensor
    history: Tensor
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class PlannedStep:
    """One step: its stage number, its place in that stage, and the samples it trains on."""

    stage: int
    place: int
    task: str
    samples: npt.NDArray[np.int64]


def plan(stages: Sequence[StageConfig], data: Mapping[str, Sequence[Sample]], seed: int) -> list[PlannedStep]:
    """All steps of all stages. Tasks without samples (a shop without clicks, say) give their share to the others."""
    lengths = {
        task: np.asarray([len(s.prompt.ids) + len(s.target) for s in samples]) for task, samples in data.items()
    }
    steps: list[PlannedStep] = []
    for number, stage in enumerate(stages):
        rng = np.random.default_rng([seed, number])
        tasks = [task for task in stage.mixture if len(data.get(task, ()))]
        shares = np.asarray([stage.mixture[task] for task in tasks])
        order = rng.choice(len(tasks), size=stage.steps, p=shares / shares.sum())
        streams = {
            task: _stream(lengths[task], stage.batch, int((order == i).sum()), rng) for i, task in enumerate(tasks)
        }
        steps += [
            PlannedStep(number, place, tasks[i], streams[tasks[i]].pop()) for place, i in enumerate(order.tolist())
        ]
    return steps


def collate(task: str, samples: Sequence[Sample], pad: int) -> Batch:
    """Pad samples of one task into tensors."""
    ids = _padded([s.prompt.ids for s in samples], pad)
    return Batch(
        task=task,
        ids=ids,
        mask=(ids != pad).long(),
        history=torch.from_numpy(np.stack([s.prompt.history for s in samples])),
        target=_padded([s.target for s in samples], pad),
        weight=torch.tensor([s.weight for s in samples], dtype=torch.float32),
    )


def _stream(
    lengths: npt.NDArray[np.int64], batch: int, count: int, rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    """`count` batches of sample numbers: whole epochs in random order, similar lengths together within a window."""
    batches: list[npt.NDArray[np.int64]] = []
    while len(batches) < count:
        order = rng.permutation(len(lengths))
        epoch: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), batch * _WINDOW):
            window = order[start : start + batch * _WINDOW]
            window = window[np.argsort(lengths[window], kind="stable")]
            epoch += [window[i : i + batch] for i in range(0, len(window), batch)]
        batches += [epoch[i] for i in rng.permutation(len(epoch))]
    return batches[:count]


def _padded(rows: Sequence[npt.NDArray[np.int64]], pad: int) -> Tensor:
    width = max(len(row) for row in rows)
    table = np.full((len(rows), width), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)
